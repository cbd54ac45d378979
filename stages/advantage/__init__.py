"""Advantages (Algorithm 1, line 9): table in, kernel, table out."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pipeline.config import Config
from pipeline.stage import record_metrics, stage
from stages.tables import Advantages, Rewards, Rollouts

__all__ = ["AdvantageConfig", "estimate_advantages"]


class AdvantageConfig(Config):
    """How rewards become advantages (DeepSeekMath, 4.1.2)."""

    supervision: Literal["outcome"] = "outcome"
    """Outcome supervision: the normalised reward of the output at each of its tokens."""
    ddof: Literal[0, 1] = 1
    """Divisor G - ddof of the group's variance. The paper writes `std` only; 1 is torch's default and that of most
    implementations. 0 makes advantages larger by sqrt(G / (G - 1)): 1.069 for G = 8, 1.008 for G = 64."""
    eps: float = Field(0.0, ge=0)
    """Added to the standard deviation. Not in the paper, and not needed: groups of equal rewards are recognised and get
    exactly 0. With continuous rewards an eps of the order of their noise keeps tiny differences from being blown up."""
    truncated: Literal["keep", "mask"] = "keep"
    """Outputs cut at the length limit: `keep` trains on them like on others; `mask` leaves their reward in the group's
    statistics and them out of the loss. Leaving them out of both is the reward's choice (`truncated: no_reward`)."""


@stage(version="1")
def estimate_advantages(rewards: Rewards, outputs: Rollouts, config: AdvantageConfig) -> Advantages:
    """A-hat_{i,t} for every output token: the reward of its output against the other outputs of its question.

    Rows come in the order of `outputs`; rewards are joined by (question_id, sample). A row without reward keeps its slot
    with a null advantage and takes no part in the statistics.

    Metrics: `reward/std_within_group` (mean over groups), shares of groups `reward/frac_degenerate_groups`,
    `reward/frac_all_correct`, `reward/frac_all_wrong`, and of rows `reward/frac_masked`.

    Raises:
        ValueError: rows of one table that the other lacks; a question with a single output.
    """
    import numpy as np

    from stages.kernels.advantage import group_statistics, normalise

    sampled = outputs.read().select(["question_id", "sample", "output_ids", "finish_reason"])
    scored = _rows_by_key(rewards)
    keys = list(zip(sampled["question_id"].to_pylist(), sampled["sample"].to_pylist(), strict=True))
    _check_same_rows(keys, scored)
    slots: dict[str, int] = {}
    group = np.array([slots.setdefault(question_id, len(slots)) for question_id, _ in keys], dtype=np.int64)
    values = np.array([scored[key]["reward"] for key in keys], dtype=np.float64)
    _check_group_sizes(slots, np.bincount(group))
    statistics = group_statistics(values, group, ddof=config.ddof)
    advantages = normalise(values, group, statistics, eps=config.eps)
    if config.truncated == "mask":
        cut = np.array([reason == "length" for reason in sampled["finish_reason"].to_pylist()])
        advantages = np.where(cut, np.nan, advantages)
    right_Q = np.bincount(group, weights=[scored[key]["status"] == "ok" for key in keys]) / np.bincount(group)
    record_metrics(
        {
            "reward/std_within_group": float(statistics.std_Q.mean()),
            "reward/frac_degenerate_groups": float(statistics.degenerate_Q.mean()),
            "reward/frac_all_correct": float((right_Q == 1).mean()),
            "reward/frac_all_wrong": float((right_Q == 0).mean()),
            "reward/frac_masked": float(np.isnan(advantages).mean()),
        }
    )
    return Advantages.write(
        {
            "question_id": [question_id for question_id, _ in keys],
            "sample": [sample for _, sample in keys],
            "advantage": _per_token(advantages, sampled["output_ids"]),
        }
    )


def _rows_by_key(rewards: Rewards) -> dict[tuple[str, int], dict[str, Any]]:
    rows = rewards.read().select(["question_id", "sample", "reward", "status"]).to_pylist()
    by_key = {(row["question_id"], row["sample"]): row for row in rows}
    if len(by_key) < len(rows):
        raise ValueError("rewards hold a (question_id, sample) more than once")
    return by_key


def _check_same_rows(keys: list[tuple[str, int]], scored: dict[tuple[str, int], dict[str, Any]]) -> None:
    if not keys:
        raise ValueError("there are no outputs to estimate advantages of")
    wanted = set(keys)
    if len(wanted) < len(keys):
        raise ValueError("outputs hold a (question_id, sample) more than once")
    if wanted != scored.keys():
        example = min(wanted ^ scored.keys())
        raise ValueError(
            f"outputs and rewards are not of the same rows: {len(wanted - scored.keys())} outputs without a reward row, "
            f"{len(scored.keys() - wanted)} reward rows without an output, for example {example}"
        )


def _check_group_sizes(slots: dict[str, int], size_Q: Any) -> None:
    single = [question_id for question_id, slot in slots.items() if size_Q[slot] == 1]
    if single:
        raise ValueError(
            f"question {single[0]!r} has one output; a group-relative advantage needs G >= 2 outputs per question"
        )


def _per_token(advantages: Any, output_ids: Any) -> Any:
    """Each row's advantage once per output token, null for a masked row, as an Arrow list column."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    masked = np.isnan(advantages)
    lengths = np.where(masked, 0, pc.list_value_length(output_ids).to_numpy())
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = pa.array(np.repeat(advantages, lengths).astype(np.float32))
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pa.array(masked))
