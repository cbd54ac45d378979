"""Which questions are learned from: DAPO's dynamic sampling (Yu et al. 2025, arXiv 2503.14476, section 3.2); and which are
drawn: a curriculum by pass rates, a function of earlier rewards.

Shapes: N outputs of all draws, or rewards; Q questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from pipeline.artifact import take_rows
from pipeline.config import Config
from pipeline.stage import record_metrics, stage
from stages.join import KEY, align, group_rows
from stages.tables import DataError, Questions, Rewards, Rollouts, ToolCalls, has_verdict

_COLUMNS: Final = ("question_id", "reward", "status")


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


@stage(version="1")
def keep_calls(outputs: Rollouts, drawn: list[Rollouts], calls: list[ToolCalls]) -> ToolCalls:
    """Return the calls of the outputs that `keep_informative` kept.

    Args:
        outputs: what it kept.
        drawn: what it was given, in order.
        calls: of each table of `drawn`.

    Metrics: those of the calls of all draws: `tool/calls` and `time/tools` their sums, the others their means over outputs or,
    where they are shares of calls, over calls.

    Raises:
        ValueError: tables of unequal number.
    """
    import pyarrow.compute as pc

    left, parts = outputs.read(["question_id"])["question_id"].unique(), list[pa.Table]()
    tables = [each.read(["question_id"]) for each in drawn]
    for table, made in zip(tables, calls, strict=True):
        rows = made.read()
        # Of a question drawn twice the first outputs were kept.
        parts.append(rows.filter(pc.is_in(rows["question_id"], value_set=left)))
        left = left.filter(pc.invert(pc.is_in(left, value_set=table["question_id"].unique())))
    record_metrics(_metrics_of_calls([made.metrics for made in calls], [each.num_rows for each in tables]))
    return ToolCalls.write(pa.concat_tables(parts))


def _metrics_of_calls(metrics: Sequence[Mapping[str, float]], outputs: Sequence[int]) -> dict[str, float]:
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for part in metrics for name in part):
        if name in ("tool/calls", "time/tools"):
            merged[name] = sum(part.get(name, 0.0) for part in metrics)
            continue
        of_outputs = name in ("tool/calls_mean", "tool/used_rate")
        weights = outputs if of_outputs else [part.get("tool/calls", 0.0) for part in metrics]
        known = [(part[name], weight) for part, weight in zip(metrics, weights, strict=True) if name in part]
        merged[name] = sum(value * weight for value, weight in known) / sum(weight for _, weight in known)
    return merged


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


class PassRateBand(Config):
    """Pass rates that questions are drawn at: the share of a question's outputs that are right. The numbers are ours."""

    low: float = Field(0.1, ge=0, le=1)
    "The lowest. A question below it is too hard for now."
    high: float = Field(0.9, ge=0, le=1)
    "The highest. A question above it is solved, and evicted."
    unseen: float = Field(0.5, ge=0, le=1)
    "What a question counts as that has no outputs with a verdict."

    @model_validator(mode="after")
    def _leaves_some_out(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low: expected at most high={self.high:g}, found {self.low:g}")
        if self.low == 0 and self.high == 1:
            raise ValueError("low and high: expected a band that leaves a pass rate out, found 0 and 1; narrow it")
        return self


@stage(version="1")
def draw_from_band(
    questions: Questions,
    earlier: list[Rewards],
    drawn: list[Rewards],
    band: PassRateBand,
    *,
    size: int,
    step: int,
    seed: int,
) -> Questions:
    """Draw D_b (Algorithm 1, line 5) from the questions whose pass rate lies in the band, without replacement.

    The pass rate of a question is that of the last table of `earlier` with a verdict on it. Questions of the band have the same
    chance each, by (seed, step). Where they are fewer than `size`, questions below the band follow, then those above it, each
    time the nearest first.

    Args:
        questions: the whole set.
        earlier: rewards by which questions are chosen, the newest last; those of other questions are left out.
        drawn: rewards of what this step has drawn already; these questions come after all others.
        size: questions of the batch.

    Metrics: shares of the set, `curriculum/band` (seen, and within the band), `curriculum/evicted` (above it) and
    `curriculum/unseen`; `curriculum/refilled`, the share of the batch that is from outside of the band or drawn again.

    Raises:
        DataError: the set has fewer than `size` questions, or `size` is below 1.
    """
    table = questions.read()
    count = table.num_rows
    if not 1 <= size <= count:
        raise DataError(f"expected size in 1..{count} (the set's questions), found {size}")
    right_Q, judged_Q = _verdicts(table, earlier)
    is_seen_Q = judged_Q > 0
    rate_Q = np.divide(right_Q, judged_Q, out=np.full(count, band.unseen), where=is_seen_Q)
    below_Q, above_Q = rate_Q < band.low, rate_Q > band.high
    is_drawn_Q = np.zeros(count, dtype=bool)
    is_drawn_Q[_places(table, drawn)[2]] = True
    class_Q = np.select([is_drawn_Q, above_Q, below_Q], [3, 2, 1], 0)
    distance_Q = np.maximum(np.maximum(band.low - rate_Q, rate_Q - band.high), 0.0)
    chance_Q = np.random.default_rng((seed, step)).random(count)
    chosen = np.lexsort((chance_Q, distance_Q, class_Q))[:size]
    shares = {"band": is_seen_Q & ~below_Q & ~above_Q, "evicted": is_seen_Q & above_Q, "unseen": ~is_seen_Q}
    shares["refilled"] = class_Q[chosen] > 0
    record_metrics({f"curriculum/{name}": float(np.mean(which)) for name, which in shares.items()})
    return Questions.write(take_rows(table, chosen))


def _verdicts(questions: pa.Table, earlier: Sequence[Rewards]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how many outputs of each question are right, and how many have a verdict, in the last table that has one."""
    import pyarrow.compute as pc

    rows, number_N, place_N = _places(questions, earlier)
    is_judged_N = has_verdict(rows).to_numpy()
    newest_Q = np.full(questions.num_rows, -1)
    np.maximum.at(newest_Q, place_N[is_judged_N], number_N[is_judged_N])
    is_counted_N = is_judged_N & (number_N == newest_Q[place_N])
    is_right_N = is_counted_N & pc.equal(rows["status"], "ok").to_numpy()
    right_Q, judged_Q = (
        np.bincount(place_N[which_N], minlength=questions.num_rows) for which_N in (is_right_N, is_counted_N)
    )
    return right_Q, judged_Q


def _places(questions: pa.Table, tables: Sequence[Rewards]) -> tuple[pa.Table, NDArray[np.int64], NDArray[np.int64]]:
    """Return the rewards of these questions, the number of the table of each, and the row of its question (N)."""
    parts = [Rewards.schema.empty_table().select(_COLUMNS), *(table.read(_COLUMNS) for table in tables)]
    rows = pa.concat_tables(parts)
    number_N = np.repeat(np.arange(len(parts)), [part.num_rows for part in parts])
    rows_Q = pa.table({"question_id": questions["question_id"], "row": np.arange(questions.num_rows)})
    by = ("question_id",)
    found = align(rows, rows_Q, "questions", to="rewards", by=by, extra=True, missing=True, several=True)
    place_N = found["row"]
    is_theirs_N = place_N.is_valid()
    return rows.filter(is_theirs_N), number_N[is_theirs_N.to_numpy()], place_N.filter(is_theirs_N).to_numpy()
