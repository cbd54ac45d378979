"""Labels from rules: what a reward model learns from (DeepSeekMath, 5.2.1)."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.stage import record_metrics, stage
from stages.join import KEY, Ragged, align, key_at
from stages.models import Checkpoint, vocabulary_of
from stages.tables import VERDICTS, RewardLabels, Rewards, Rollouts

__all__ = ["label_outputs"]


@stage(version="1")
def label_outputs(outputs: Rollouts, rewards: Rewards, policy: Checkpoint) -> RewardLabels:
    """Label each output with the verdict of the rules, in the order of `outputs`: 1 where the status is `ok`, else 0.

    Left out is what the rules have no verdict on: time-outs, errors, rows without a reward. Step labels are the rules' step
    rewards, where they have them. The scored token is the last one of the output.

    Args:
        rewards: of the same outputs, by rules.
        policy: who sampled them: the `origin` of the labels and the vocabulary of the ids.

    Metrics: `rm/labelled` (rows), `rm/left_out` (share of all outputs), `rm/right_share` (of labelled rows),
    `rm/right_steps_share`.

    Raises:
        ValueError: by row: an output without a reward or without tokens, rewards of a model, step labels that do not fit their
            output.
    """
    import pyarrow.compute as pc

    table = outputs.read([*KEY, "prompt_ids", "output_ids"])
    verdicts = align(table, rewards.read([*KEY, "reward", "status", "scorer", "step_rewards", "step_ends"]), "rewards")
    length_N = pc.list_value_length(table["output_ids"]).to_numpy().astype(np.int64)
    _check_verdicts(verdicts, length_N)
    kept = pc.and_(verdicts["reward"].is_valid(), pc.is_in(verdicts["status"], pa.array(VERDICTS)))
    labelled, verdicts = table.filter(kept), verdicts.filter(kept)
    columns = {
        "scored_index": pa.array(length_N[kept.to_numpy()] - 1, pa.int32()),
        "label": pc.equal(verdicts["status"], "ok").cast(pa.float64()),
        "step_ends": verdicts["step_ends"],
        "step_labels": verdicts["step_rewards"],
        "origin": pa.array([policy.digest] * labelled.num_rows, pa.string()),
        "vocabulary": pa.array([vocabulary_of(policy)] * labelled.num_rows, pa.string()),
    }
    for name, column in columns.items():
        labelled = labelled.append_column(name, column)
    record_metrics(_metrics(labelled, table.num_rows))
    return RewardLabels.write(labelled)


def _check_verdicts(verdicts: pa.Table, length_N: NDArray[np.int64]) -> None:
    """Refuse outputs without tokens, rewards by a model, and steps that do not fit their output; names the row."""
    for row in np.flatnonzero(length_N == 0):
        raise ValueError(f"output {key_at(verdicts, row)} has no tokens; there is none to read its score at")
    for row in np.flatnonzero(verdicts["scorer"].is_valid()):
        raise ValueError(
            f"output {key_at(verdicts, row)} was rewarded by a model ({verdicts['scorer'][int(row)].as_py()[:12]}); labels are "
            "the rules' (DeepSeekMath, 5.2.1)"
        )
    ends, labels = Ragged.of(verdicts["step_ends"]), Ragged.of(verdicts["step_rewards"])
    for row in np.flatnonzero((ends.null != labels.null) | (ends.lengths != labels.lengths)):
        found = [verdicts[name][int(row)].as_py() for name in ("step_rewards", "step_ends")]
        raise ValueError(
            f"output {key_at(verdicts, row)}: expected one step reward for each step end, found {found[0]} and {found[1]}"
        )
    inside = (ends.values >= 0) & (ends.values < length_N[ends.row_of_value])
    for row in ends.row_of_value[~inside]:
        raise ValueError(
            f"output {key_at(verdicts, row)} has {length_N[row]} tokens, its steps end at {ends[row].tolist()}"
        )


def _metrics(labelled: pa.Table, outputs: int) -> dict[str, float | None]:
    rows, right = labelled.num_rows, float(labelled["label"].to_numpy().sum())
    steps = Ragged.of(labelled["step_labels"]).values.tolist()
    return {
        "rm/labelled": rows,
        "rm/left_out": 1 - rows / outputs if outputs else None,
        "rm/right_share": right / rows if rows else None,
        "rm/right_steps_share": sum(steps) / len(steps) if steps else None,
    }
