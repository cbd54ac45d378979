"""Which groups are learned from: DAPO's dynamic sampling (Yu et al. 2025, arXiv 2503.14476, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.stage import record_metrics, stage
from stages.tables import Rewards, Rollouts

__all__ = ["keep_informative"]


@stage(version="1")
def keep_informative(outputs: list[Rollouts], rewards: list[Rewards], *, size: int) -> Rollouts:
    """The first `size` questions whose outputs differ in reward, with all their outputs, in the order drawn.

    Where fewer differ, questions whose outputs agree fill the batch up, so that it always has its size; their advantages are 0.
    A question drawn twice counts once.

    Metrics: those of the rollouts, summed over all draws where they count (`rollout/samples`, `rollout/tokens`,
    `rollout/seconds`); `rollout/draws`; `rollout/agreeing_groups` (of the batch: 0 = no further draw is needed).

    Raises:
        ValueError: tables of unequal number, or fewer questions than `size`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if len(outputs) != len(rewards):
        raise ValueError(f"expected one table of rewards per table of outputs, found {len(rewards)} and {len(outputs)}")
    groups: dict[str, tuple[pa.Table, bool]] = {}
    for drawn, scored in zip(outputs, rewards, strict=True):
        table = drawn.read()
        differs = _questions_that_differ(scored)
        for question_id in dict.fromkeys(table["question_id"].to_pylist()):
            rows = table.filter(pc.equal(table["question_id"], question_id))
            groups.setdefault(question_id, (rows, question_id in differs))
    if len(groups) < size:
        raise ValueError(f"expected at least {size} questions, found {len(groups)}")
    informative = [question for question, (_, differs) in groups.items() if differs][:size]
    filling = [question for question in groups if question not in informative][: size - len(informative)]
    record_metrics(_metrics(outputs) | {"rollout/agreeing_groups": sum(not groups[q][1] for q in filling)})
    return Rollouts.write(pa.concat_tables([groups[question][0] for question in [*informative, *filling]]))


def _questions_that_differ(rewards: Rewards) -> set[str]:
    """Questions with at least two different rewards; rows without a reward take no part."""
    found: dict[str, set[float]] = {}
    for row in rewards.read().select(["question_id", "reward"]).to_pylist():
        if row["reward"] is not None:
            found.setdefault(row["question_id"], set()).add(row["reward"])
    return {question for question, values in found.items() if len(values) > 1}


def _metrics(outputs: Sequence[Rollouts]) -> dict[str, float]:
    metrics = dict(outputs[0].metrics)
    for name in ("rollout/samples", "rollout/tokens", "rollout/seconds"):
        metrics[name] = sum(part.metrics.get(name, 0.0) for part in outputs)
    if metrics["rollout/seconds"]:
        metrics["rollout/tokens_per_s"] = metrics["rollout/tokens"] / metrics["rollout/seconds"]
    return metrics | {"rollout/draws": len(outputs)}
