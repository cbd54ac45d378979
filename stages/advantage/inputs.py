"""The tables of an exploration, joined by (question_id, sample) and checked, as arrays.

What is sound is found so for whole columns at once; only what is not is looked at row by row, to be named.

Shapes: N outputs in the order of `Rollouts`, M tokens of all outputs one after another, Q questions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.advantage.checks import Key, check_groups, check_rewards, check_same_rows, check_steps
from stages.keys import repeated_key, same_keys, slots

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Steps:
    """Process supervision of one output: r^index(j) and index(j) of its steps."""

    rewards: Sequence[float]
    ends: Sequence[int]


@dataclass(frozen=True)
class Scored:
    """What the rewards say of the outputs."""

    reward_N: Floats
    """NaN where there is none."""
    right_N: NDArray[np.bool_]
    """Whether the status is `ok`."""
    steps: Sequence[Steps | None]
    """None where the output was scored as a whole."""


@dataclass(frozen=True)
class Outputs:
    """The sampled outputs."""

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

    @functools.cached_property
    def keys(self) -> list[Key]:
        """(question_id, sample) of each, for whoever has to name one."""
        return _keys(self.table)

    @property
    def output_of_token(self) -> NDArray[np.int64]:
        """For each token the output it belongs to."""
        import numpy as np

        return np.repeat(np.arange(len(self.length_N)), self.length_N)

    def per_output(self, values_M: Floats) -> list[Floats]:
        """Values of all tokens, one array per output."""
        import numpy as np

        return np.split(values_M, np.cumsum(self.length_N)[:-1])

    def require_groups(self, need: str) -> None:
        """Refuse questions without samples 0 .. G-1 for one G >= 2, as `check_groups` does."""
        import numpy as np

        size_Q = np.bincount(self.group_N)
        G = size_Q[0]  # samples are unique: G of them between 0 and G-1 are all
        if G < 2 or (size_Q != G).any() or self.sample_N.min() < 0 or self.sample_N.max() >= G:
            check_groups(self.keys, need)


def read_outputs(table: pa.Table) -> Outputs:
    """Keys, groups and lengths.

    Raises:
        ValueError: no outputs, or a row twice.
    """
    import numpy as np
    import pyarrow.compute as pc

    if not table.num_rows:
        raise ValueError("there are no outputs to estimate advantages of")
    if repeated_key(table):
        raise ValueError("outputs hold a (question_id, sample) more than once")
    names, group_N = slots(table["question_id"])
    sample_N = table["sample"].to_numpy().astype(np.int64)
    length_N = pc.list_value_length(table["output_ids"]).to_numpy().astype(np.int64)
    return Outputs(table, names, group_N, sample_N, length_N, pc.equal(table["finish_reason"], "length").to_numpy())


def read_rewards(table: pa.Table, outputs: Outputs) -> Scored:
    """The rewards in the order of `outputs`.

    Raises:
        ValueError: rows that are missing, surplus or repeated; a NaN or infinite reward; steps that do not fit their output; a
            question whose outputs were scored by two reward models.
    """
    import pyarrow.compute as pc

    table = _in_order(table, outputs, "rewards")
    scorers = table["scorer"].filter(table["reward"].is_valid())
    finite = pc.all(pc.is_finite(table["reward"]), min_count=0).as_py()
    if not finite or pc.count_distinct(scorers, mode="all").as_py() > 1:
        check_rewards(outputs.keys, table.select(["reward", "scorer"]).to_pylist())
    return Scored(
        table["reward"].to_numpy(),
        pc.equal(table["status"], "ok").to_numpy(),
        _steps(table.select(["step_rewards", "step_ends"]), outputs),
    )


def _steps(table: pa.Table, outputs: Outputs) -> list[Steps | None]:
    if table["step_rewards"].null_count == table["step_ends"].null_count == table.num_rows:
        return [None] * table.num_rows
    rows = table.to_pylist()
    check_steps(outputs.keys, rows, outputs.length_N.tolist())
    return [None if row["step_rewards"] is None else Steps(row["step_rewards"], row["step_ends"]) for row in rows]


def read_k1(logprobs: pa.Table | None, outputs: Outputs, beta: float) -> Floats | None:
    """k1 = log pi - log pi_ref of every token (M); None where beta is 0 and nobody needs it.

    Raises:
        ValueError: beta above 0 without the table; rows or lengths that differ from the outputs; values that are not finite.
    """
    if beta == 0:
        return None
    if logprobs is None:
        raise ValueError(
            f"kl_in_reward = {beta} needs the log-probabilities of policy and reference; pass `logprobs` "
            "(made by compare_policies), or set kl_in_reward to 0"
        )
    table = _in_order(logprobs, outputs, "logprobs")
    return _tokens(table, "policy", outputs, "logprobs") - _tokens(table, "reference", outputs, "logprobs")


def read_values(values: pa.Table | None, outputs: Outputs) -> Floats:
    """V(q, o_<t) before every token (M).

    Raises:
        ValueError: no table; rows or lengths that differ from the outputs; values that are not finite.
    """
    if values is None:
        raise ValueError("advantage kind gae needs a critic's values; pass `values` (made by estimate_values)")
    return _tokens(_in_order(values, outputs, "values"), "value", outputs, "values")


def _tokens(table: pa.Table, column: str, outputs: Outputs, name: str) -> Floats:
    """A column of one number per output token, all outputs one after another in the order of `outputs`."""
    import numpy as np
    import pyarrow.compute as pc

    lists = table[column].combine_chunks()
    count_N = pc.list_value_length(lists).to_numpy()
    wrong = np.flatnonzero(count_N != outputs.length_N)
    if len(wrong):
        row = wrong[0]
        raise ValueError(
            f"{name} of {outputs.keys[row]}: expected one {column} for each of {outputs.length_N[row]} tokens, found "
            f"{count_N[row]}"
        )
    values_M: Floats = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(values_M))
    if len(bad):
        row = outputs.output_of_token[bad[0]]
        token = bad[0] - outputs.length_N[:row].sum()
        raise ValueError(
            f"{name} of {outputs.keys[row]}: {column} at token {token} is {values_M[bad[0]]}; expected a finite number"
        )
    return values_M


def _in_order(table: pa.Table, outputs: Outputs, name: str) -> pa.Table:
    """The rows of `table` in the order of `outputs`."""
    if same_keys(table, outputs.table):
        return table
    found = _keys(table)
    check_same_rows(outputs.keys, found, name)
    places = {key: place for place, key in enumerate(found)}
    return table.take([places[key] for key in outputs.keys])


def _keys(table: pa.Table) -> list[Key]:
    return list(zip(table["question_id"].to_pylist(), table["sample"].to_pylist(), strict=True))
