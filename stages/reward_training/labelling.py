"""Labels from rules: what a reward model learns from (DeepSeekMath, 5.2.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.stage import record_metrics, stage
from stages.models import Checkpoint, vocabulary_of
from stages.tables import VERDICTS, RewardLabels, Rewards, Rollouts

__all__ = ["label_outputs"]


@stage(version="1")
def label_outputs(outputs: Rollouts, rewards: Rewards, policy: Checkpoint) -> RewardLabels:
    """The verdict of the rules on each output, in the order of `outputs`: 1 where the status is `ok`, else 0.

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
    by_key = {(row["question_id"], row["sample"]): row for row in rewards.rows()}
    vocabulary = vocabulary_of(policy)
    table = outputs.read().select(["question_id", "sample", "prompt_ids", "output_ids"]).to_pylist()
    labelled = []
    for row in table:
        verdict = _verdict(row, by_key)
        if verdict["reward"] is None or verdict["status"] not in VERDICTS:
            continue
        labels = {
            "scored_index": len(row["output_ids"]) - 1,
            "label": float(verdict["status"] == "ok"),
            "step_ends": verdict["step_ends"],
            "step_labels": verdict["step_rewards"],
        }
        labelled.append({**row, **labels, "origin": policy.digest, "vocabulary": vocabulary})
    record_metrics(_metrics(labelled, len(table)))
    return RewardLabels.write(labelled)


def _verdict(row: Mapping[str, Any], by_key: Mapping[tuple[str, int], Mapping[str, Any]]) -> Mapping[str, Any]:
    key = (row["question_id"], row["sample"])
    if key not in by_key:
        raise ValueError(f"output {key} has no reward; were the rewards given for other rollouts?")
    if not row["output_ids"]:
        raise ValueError(f"output {key} has no tokens; there is none to read its score at")
    found = by_key[key]
    if found["scorer"] is not None:
        raise ValueError(
            f"output {key} was rewarded by a model ({found['scorer'][:12]}); labels are the rules' (DeepSeekMath, 5.2.1)"
        )
    ends, labels = found["step_ends"], found["step_rewards"]
    if (ends is None) != (labels is None) or (ends is not None and len(ends) != len(labels)):
        raise ValueError(f"output {key}: expected one step reward for each step end, found {labels} and {ends}")
    if ends and not 0 <= min(ends) <= max(ends) < len(row["output_ids"]):
        raise ValueError(f"output {key} has {len(row['output_ids'])} tokens, its steps end at {ends}")
    return found


def _metrics(labelled: list[dict[str, Any]], outputs: int) -> dict[str, float | None]:
    right = sum(row["label"] for row in labelled)
    steps = [label for row in labelled for label in row["step_labels"] or []]
    return {
        "rm/labelled": len(labelled),
        "rm/left_out": 1 - len(labelled) / outputs if outputs else None,
        "rm/right_share": right / len(labelled) if labelled else None,
        "rm/right_steps_share": sum(steps) / len(steps) if steps else None,
    }
