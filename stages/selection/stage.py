"""Which groups are learned from: DAPO's dynamic sampling (Yu et al. 2025, arXiv 2503.14476, section 3.2).

Shapes: N outputs of all draws, Q questions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.artifact import take_rows
from pipeline.stage import record_metrics, stage
from stages.join import KEY, align, group_rows
from stages.tables import Rewards, Rollouts


@stage(version="2")
def keep_informative(outputs: list[Rollouts], rewards: list[Rewards], *, size: int) -> Rollouts:
    """Keep the first `size` questions whose outputs differ in reward, with all their outputs, in the order drawn.

    Where fewer differ, questions whose outputs agree fill the batch up, so that it always has its size; their advantages are 0.
    A question drawn twice counts once. Outputs without a reward make no difference.

    Metrics: those of the rollouts, summed over all draws where they count (`rollout/samples`, `rollout/tokens`,
    `rollout/seconds`); `rollout/draws`; `rollout/agreeing_groups` (of the batch: 0 = no further draw is needed).

    Raises:
        ValueError: tables of unequal number, or fewer questions than `size`; rewards of other outputs.
    """
    if len(outputs) != len(rewards):
        raise ValueError(f"expected one table of rewards per table of outputs, found {len(rewards)} and {len(outputs)}")
    drawn = [each.read() for each in outputs]
    scored = [
        align(table, scores.read([*KEY, "reward"]), "rewards") for table, scores in zip(drawn, rewards, strict=True)
    ]
    table = pa.concat_tables(drawn)
    draw_N = np.repeat(np.arange(len(drawn)), [each.num_rows for each in drawn])
    questions, question_N = group_rows(table["question_id"])
    if len(questions) < size:
        raise ValueError(f"expected at least {size} questions, found {len(questions)}")
    first_Q = np.unique(question_N, return_index=True)[1]
    once_N = draw_N == draw_N[first_Q][question_N]
    reward_N = pa.concat_tables(scored)["reward"].to_numpy()
    differs_Q = _differs(reward_N[once_N], question_N[once_N], len(questions))
    chosen = np.argsort(~differs_Q, kind="stable")[:size]
    rank_Q = np.full(len(questions), size)
    rank_Q[chosen] = np.arange(size)
    rank_N = np.where(once_N, rank_Q[question_N], size)
    rows = np.argsort(rank_N, kind="stable")[: (rank_N < size).sum()]
    record_metrics(_metrics(outputs) | {"rollout/agreeing_groups": int((~differs_Q[chosen]).sum())})
    return Rollouts.write(take_rows(table, rows))


def _differs(reward_N: NDArray[np.float64], question_N: NDArray[np.int64], questions: int) -> NDArray[np.bool_]:
    """Return whether a question has at least two different rewards (Q); a reward that is NaN takes no part."""
    low_Q, high_Q = np.full(questions, np.inf), np.full(questions, -np.inf)
    np.fmin.at(low_Q, question_N, reward_N)
    np.fmax.at(high_Q, question_N, reward_N)
    return high_Q > low_Q


def _metrics(outputs: Sequence[Rollouts]) -> dict[str, float]:
    metrics = dict(outputs[0].metrics)
    for name in ("rollout/samples", "rollout/tokens", "rollout/seconds"):
        metrics[name] = sum(part.metrics.get(name, 0.0) for part in outputs)
    if metrics["rollout/seconds"]:
        metrics["rollout/tokens_per_s"] = metrics["rollout/tokens"] / metrics["rollout/seconds"]
    return metrics | {"rollout/draws": len(outputs)}
