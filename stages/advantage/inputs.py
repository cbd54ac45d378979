"""The tables of an exploration, in chunks of whole questions, joined by (question_id, sample) and checked, as arrays.

Memory is bounded however many outputs there are: of all rows only keys and lengths are held. Everything else is read from
mapped files, a chunk at a time. A question is never cut, so no value depends on the chunks.

Tokens here are those that the policy wrote: what environments wrote (`Rollouts.turns`) is left out as it is read, and gets an
advantage of 0, which nothing reads.

Shapes: N outputs in the order of `Rollouts`, M tokens of all outputs one after another, Q questions, S steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.join import KEY, Ragged, align, group_rows, key_at, per_token, require_unique, same_keys, written_by_policy
from stages.tables import Logprobs, Rewards, Rollouts, Values

CHUNK_TOKENS: Final = 2**21
"""Output tokens of a chunk, up to those of one question more: 16 MiB for each array of a float64 a token."""
_ROW: Final = 16
"""What a row counts in addition to its tokens."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Exploration:
    """Hold the outputs, and the tables that other stages made from them, where there are any."""

    outputs: pa.Table
    rewards: pa.Table | None
    values: pa.Table | None
    logprobs: pa.Table | None

    def chunks(self, chunk_tokens: int = CHUNK_TOKENS) -> Iterator[Exploration]:
        """Yield some whole questions at a time, in their order.

        All at once where a question's outputs lie apart or are of another number than the next one's, and where tables are not
        in the same order: those are joined by key.
        """
        cuts = self._cuts(chunk_tokens)
        if len(cuts) == 2:
            yield self
            return
        for start, stop in itertools.pairwise(cuts):
            parts = (None if table is None else table.slice(start, stop - start) for table in self._tables)
            yield Exploration(*parts)

    @property
    def _tables(self) -> tuple[pa.Table | None, ...]:
        return (self.outputs, self.rewards, self.values, self.logprobs)

    def _cuts(self, chunk_tokens: int) -> list[int]:
        """Return the rows at which chunks begin, and the number of rows."""
        import pyarrow.compute as pc

        rows = self.outputs.num_rows
        cost = np.cumsum(pc.list_value_length(self.outputs["output_ids"]).to_numpy().astype(np.int64) + _ROW)
        if rows < 2 or cost[-1] <= chunk_tokens:
            return [0, rows]
        names, group_N = group_rows(self.outputs["question_id"])
        stops = np.append(np.flatnonzero(np.diff(group_N)) + 1, rows)
        even = len(set(np.diff(stops, prepend=0).tolist())) == 1
        joined = all(same_keys(self.outputs, table) for table in self._tables if table is not None)
        if not (even and len(names) == len(stops) and joined):
            return [0, rows]
        full = np.diff((cost[stops - 1] - 1) // chunk_tokens) > 0
        return [0, *stops[:-1][full].tolist(), rows]


def read_exploration(
    outputs: Rollouts, rewards: Rewards | None, values: Values | None, logprobs: Logprobs | None
) -> Exploration:
    """Read the columns that advantages are made of."""
    scores = ("reward", "status", "step_rewards", "step_ends", "scorer")
    return Exploration(
        outputs.read([*KEY, "output_ids", "finish_reason", "turns"]),
        None if rewards is None else rewards.read([*KEY, *scores]),
        None if values is None else values.read([*KEY, "value"]),
        None if logprobs is None else logprobs.read([*KEY, "policy", "reference"]),
    )


@dataclass(frozen=True)
class Scored:
    """The rewards of the outputs."""

    reward_N: Floats
    """NaN where there is none."""
    right_N: NDArray[np.bool_]
    """Whether the status is `ok`."""
    step_rewards: Ragged
    """Process supervision: r^index(j) of each output's steps; null where the output was scored as a whole."""
    step_ends: Ragged
    """index(j) of the same steps."""


@dataclass(frozen=True)
class Outputs:
    """Hold the sampled outputs."""

    table: pa.Table
    """Their rows of `Rollouts`."""
    names: Sequence[str]
    """question_id of each group."""
    group_N: NDArray[np.int64]
    """Index into `names` of each output."""
    sample_N: NDArray[np.int64]
    length_N: NDArray[np.int64]
    """Tokens."""
    cut_N: NDArray[np.bool_]
    """Whether it was cut at the length limit."""
    ids_N: NDArray[np.int64]
    """Length of `output_ids`: its tokens, and those that its environment wrote."""
    written_I: NDArray[np.bool_] | None
    """Of all ids one after another, which the policy wrote; None: all of them."""

    @property
    def output_of_token(self) -> NDArray[np.int64]:
        """Return for each token the output it belongs to (M)."""
        return np.repeat(np.arange(len(self.length_N)), self.length_N)

    def of_tokens(self, table: pa.Table, column: str, name: str) -> Floats:
        """Return a column with a number for each id as numbers of the tokens (M); raises as `per_token`, which has `name`."""
        values_I = per_token(table, column, self.ids_N, name, written_M=self.written_I).values.astype(np.float64)
        return values_I if self.written_I is None else values_I[self.written_I]

    def of_ids(self, values_M: Floats) -> Floats:
        """Return numbers of tokens as numbers of all ids, 0 at those that the policy did not write."""
        if self.written_I is None:
            return values_M
        values_I = np.zeros(len(self.written_I))
        values_I[self.written_I] = values_M
        return values_I

    def per_output(self, values_M: Floats) -> list[Floats]:
        """Split values of all tokens into one array per output."""
        return np.split(values_M, np.cumsum(self.length_N)[:-1])

    def require_groups(self, need: str) -> None:
        """Refuse questions without samples 0 .. G-1 for one G >= 2; `need` says what for.

        A row that is not to count keeps its slot with a null reward; a row that is gone would change its group unseen.

        Raises:
            ValueError: names the first such question.
        """
        size_Q = np.bincount(self.group_N)
        G = size_Q[0]
        least_Q, most_Q = np.zeros_like(size_Q), np.zeros_like(size_Q)
        np.minimum.at(least_Q, self.group_N, self.sample_N)
        np.maximum.at(most_Q, self.group_N, self.sample_N)
        # Samples are unique: as many as the largest one says are all of them.
        gap_Q = (least_Q < 0) | (most_Q >= size_Q)
        fault_Q = (size_Q < 2) | gap_Q | (size_Q != G)
        if not fault_Q.any():
            return
        group = int(np.argmax(fault_Q))
        question = f"question {self.names[group]!r}"
        if size_Q[group] == 1:
            raise ValueError(
                f"{question} has one output; {need} needs G >= 2 outputs per question (with one there is nothing to compare "
                "it with)"
            )
        if gap_Q[group]:
            highest = max(int(most_Q[group]), int(size_Q[group]) - 1)
            gap = sorted(set(range(highest + 1)) - set(self.sample_N[self.group_N == group].tolist()))
            raise ValueError(
                f"{question}: expected samples 0 .. {highest}, {gap[:5]} missing; a row that shall not count keeps its place "
                "with a null reward"
            )
        raise ValueError(
            f"{question} has {size_Q[group]} outputs, question {self.names[0]!r} has {G}; {need} needs the same G for every "
            "question: rows are missing"
        )


def read_outputs(table: pa.Table) -> Outputs:
    """Return keys, groups and lengths.

    Raises:
        ValueError: no outputs, or a key that occurs more than once.
    """
    import pyarrow.compute as pc

    if not table.num_rows:
        raise ValueError("there are no outputs to estimate advantages of")
    require_unique(table, "outputs")
    names, group_N = group_rows(table["question_id"])
    sample_N = table["sample"].to_numpy().astype(np.int64)
    ids_N = length_N = pc.list_value_length(table["output_ids"]).to_numpy().astype(np.int64)
    written_I = None
    if table["turns"].null_count < table.num_rows:
        written_I = written_by_policy(table)
        length_N = np.bincount(np.repeat(np.arange(len(ids_N)), ids_N), written_I, minlength=len(ids_N)).astype(
            np.int64
        )
    cut_N = pc.equal(table["finish_reason"], "length").to_numpy()
    return Outputs(table, names, group_N, sample_N, length_N, cut_N, ids_N, written_I)


def read_rewards(table: pa.Table, outputs: Outputs) -> Scored:
    """Return the rewards in the order of `outputs`.

    Raises:
        ValueError: rows that are missing, extra or repeated; a NaN or infinite reward; steps that do not fit their output; a
            question whose outputs were scored by two reward models.
    """
    import pyarrow.compute as pc

    table = align(outputs.table, table, "rewards")
    _check_rewards(table, outputs)
    steps = Ragged.of(table["step_rewards"]), Ragged.of(table["step_ends"])
    _check_steps(*steps, outputs)
    if outputs.written_I is not None:
        steps = _steps_of_policy(*steps, outputs)
    return Scored(table["reward"].to_numpy(), pc.equal(table["status"], "ok").to_numpy(), *steps)


def _steps_of_policy(rewards: Ragged, ends: Ragged, outputs: Outputs) -> tuple[Ragged, Ragged]:
    """Return the steps with their ends counted in tokens: a step ends with its last token; one without any is left out."""
    assert outputs.written_I is not None
    so_far_I = np.cumsum(outputs.written_I)
    row_S, first_N = ends.row_of_value, np.cumsum(outputs.ids_N) - outputs.ids_N
    before_N = np.where(first_N > 0, so_far_I[first_N - 1], 0)
    end_S = so_far_I[first_N[row_S] + ends.values] - before_N[row_S] - 1
    previous_S = np.where(np.diff(row_S, prepend=-1) == 0, np.concatenate([[-1], end_S])[:-1], -1)
    kept_S = end_S > previous_S
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_S[kept_S], minlength=len(ends)))])
    return Ragged(rewards.values[kept_S], offsets, rewards.null), Ragged(end_S[kept_S], offsets, ends.null)


def _check_rewards(table: pa.Table, outputs: Outputs) -> None:
    """Refuse a reward that is not a number, and rewards by two models in one group."""
    import pyarrow.compute as pc

    reward_N, is_there_N = table["reward"].to_numpy(), table["reward"].is_valid().to_numpy()
    bad = np.flatnonzero(is_there_N & ~np.isfinite(reward_N))
    if len(bad):
        raise ValueError(
            f"the reward of {key_at(table, bad[0])} is {reward_N[bad[0]]}; expected a finite number, or null for a missing one"
        )
    scorers, scorer_N = group_rows(pc.fill_null(table["scorer"], "rules"))
    if len(scorers) < 2:
        return
    rows = np.flatnonzero(is_there_N)
    _, first, group = np.unique(outputs.group_N[rows], return_index=True, return_inverse=True)
    other = np.flatnonzero(scorer_N[rows] != scorer_N[rows[first[group]]])
    if len(other):
        row, before = rows[other[0]], rows[first[group[other[0]]]]
        raise ValueError(
            f"question {outputs.names[outputs.group_N[row]]!r}: {key_at(table, before)} was scored by "
            f"{scorers[scorer_N[before]]}, {key_at(table, row)} by {scorers[scorer_N[row]]}; outputs of a question are "
            "compared by one scorer only: score them all anew"
        )


def _check_steps(rewards: Ragged, ends: Ragged, outputs: Outputs) -> None:
    """Refuse step rewards that do not fit the tokens of their output."""
    fault_N = (rewards.null != ends.null) | (rewards.lengths != ends.lengths)
    fault_N |= ~rewards.null & (rewards.lengths == 0) & (outputs.ids_N > 0)
    fault_N[rewards.row_of_value[~np.isfinite(rewards.values)]] = True
    row_S = ends.row_of_value
    inside_S = (ends.values >= 0) & (ends.values < outputs.ids_N[row_S])
    fault_N[row_S[~inside_S]] = True
    fault_N[row_S[1:][(np.diff(ends.values) < 0) & (np.diff(row_S) == 0)]] = True
    if fault_N.any():
        row = int(np.argmax(fault_N))
        fault = _step_fault(rewards, ends, row, int(outputs.ids_N[row]))
        raise ValueError(f"steps of {key_at(outputs.table, row)}: {fault}")


def _step_fault(rewards: Ragged, ends: Ragged, row: int, length: int) -> str:
    """Say what is wrong with the steps of an output."""
    if rewards.null[row] != ends.null[row]:
        only = "step_rewards" if ends.null[row] else "step_ends"
        return f"expected step_rewards and step_ends together or neither, found {only} alone"
    if rewards.lengths[row] != ends.lengths[row]:
        return f"expected one end for each step, found {rewards.lengths[row]} step_rewards and {ends.lengths[row]} step_ends"
    before = 0
    for step, (reward, end) in enumerate(zip(rewards[row], ends[row], strict=True)):
        if not math.isfinite(reward):
            return f"the reward of step {step} is {reward}; expected a finite number"
        if not 0 <= end < length:
            return f"step {step} ends at token {end}; the output has the tokens 0 .. {length - 1}"
        if end < before:
            return f"step {step} ends at token {end}, before the previous step ({before})"
        before = end
    return "there are none; an output in which no step is found counts as one step"


def read_k1(logprobs: pa.Table | None, outputs: Outputs, beta: float) -> Floats | None:
    """Return k1 = log pi - log pi_ref of every token (M); None where beta is 0 and it is not needed; raises as `read_ratio`."""
    return None if beta == 0 else read_ratio(logprobs, outputs, f"kl_in_reward = {beta}")


def read_ratio(logprobs: pa.Table | None, outputs: Outputs, need: str) -> Floats:
    """Return log pi - log pi_ref of every token (M); `need` says what for.

    Raises:
        ValueError: no table; rows or lengths that differ from the outputs; values that are not finite.
    """
    if logprobs is None:
        raise ValueError(
            f"{need} needs the log-probabilities of two policies; pass `logprobs` (made by compare_policies)"
        )
    table = align(outputs.table, logprobs, "logprobs")
    policy, reference = (
        outputs.of_tokens(table, column, f"log-probabilities under the {column}") for column in ("policy", "reference")
    )
    return policy - reference


def read_values(values: pa.Table | None, outputs: Outputs) -> Floats:
    """Return V(q, o_<t) before every token (M).

    Raises:
        ValueError: no table; rows or lengths that differ from the outputs; values that are not finite.
    """
    if values is None:
        raise ValueError("advantage kind gae needs a critic's values; pass `values` (made by estimate_values)")
    table = align(outputs.table, values, "values")
    return outputs.of_tokens(table, "value", "values")
