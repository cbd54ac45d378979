"""The tables of an exploration, joined by (question_id, sample) and checked, as arrays.

Shapes: N outputs in the order of `Rollouts`, M tokens of all outputs one after another, Q questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.advantage.checks import Key, check_rewards, check_same_rows, check_steps
from stages.tables import Logprobs, Rewards, Rollouts, Values

if TYPE_CHECKING:
    import numpy as np
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

    keys: Sequence[Key]
    names: Sequence[str]
    """question_id of each group."""
    group_N: NDArray[np.int64]
    """Index into `names` of each output."""
    length_N: NDArray[np.int64]
    """Tokens."""
    cut_N: NDArray[np.bool_]
    """Whether it was cut at the length limit."""

    @property
    def output_of_token(self) -> NDArray[np.int64]:
        """For each token the output it belongs to."""
        import numpy as np

        return np.repeat(np.arange(len(self.keys)), self.length_N)

    def per_output(self, values_M: Floats) -> list[Floats]:
        """Values of all tokens, one array per output."""
        import numpy as np

        return np.split(values_M, np.cumsum(self.length_N)[:-1])


def read_outputs(outputs: Rollouts) -> Outputs:
    """Keys, groups and lengths.

    Raises:
        ValueError: no outputs, or a row twice.
    """
    import numpy as np
    import pyarrow.compute as pc

    table = outputs.read().select(["question_id", "sample", "output_ids", "finish_reason"])
    keys = list(zip(table["question_id"].to_pylist(), table["sample"].to_pylist(), strict=True))
    if not keys:
        raise ValueError("there are no outputs to estimate advantages of")
    if len(set(keys)) < len(keys):
        raise ValueError("outputs hold a (question_id, sample) more than once")
    slots: dict[str, int] = {}
    group = np.array([slots.setdefault(question_id, len(slots)) for question_id, _ in keys], dtype=np.int64)
    length = pc.list_value_length(table["output_ids"]).to_numpy().astype(np.int64)
    cut = np.array([reason == "length" for reason in table["finish_reason"].to_pylist()], dtype=bool)
    return Outputs(keys, list(slots), group, length, cut)


def read_rewards(rewards: Rewards, outputs: Outputs) -> Scored:
    """The rewards in the order of `outputs`.

    Raises:
        ValueError: rows that are missing, surplus or repeated; a NaN or infinite reward; steps that do not fit their output; a
            question whose outputs were scored by two reward models.
    """
    import numpy as np

    columns = ["reward", "status", "step_rewards", "step_ends", "scorer"]
    rows = _in_order(rewards.read().select(["question_id", "sample", *columns]).to_pylist(), outputs, "rewards")
    check_rewards(outputs.keys, rows)
    check_steps(outputs.keys, rows, outputs.length_N.tolist())
    return Scored(
        np.array([row["reward"] for row in rows], dtype=np.float64),
        np.array([row["status"] == "ok" for row in rows], dtype=bool),
        [None if row["step_rewards"] is None else Steps(row["step_rewards"], row["step_ends"]) for row in rows],
    )


def read_k1(logprobs: Logprobs | None, outputs: Outputs, beta: float) -> Floats | None:
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
    table = logprobs.read()
    return _tokens(table, "policy", outputs, "logprobs") - _tokens(table, "reference", outputs, "logprobs")


def read_values(values: Values | None, outputs: Outputs) -> Floats:
    """V(q, o_<t) before every token (M).

    Raises:
        ValueError: no table; rows or lengths that differ from the outputs; values that are not finite.
    """
    if values is None:
        raise ValueError("advantage kind gae needs a critic's values; pass `values` (made by estimate_values)")
    return _tokens(values.read(), "value", outputs, "values")


def _tokens(table: Any, column: str, outputs: Outputs, name: str) -> Floats:
    """A column of one number per output token, all outputs one after another in the order of `outputs`."""
    import numpy as np

    rows = _in_order(table.select(["question_id", "sample", column]).to_pylist(), outputs, name)
    found: list[Floats] = [np.array(row[column], dtype=np.float64) for row in rows]
    for key, numbers, length in zip(outputs.keys, found, outputs.length_N, strict=True):
        if len(numbers) != length:
            raise ValueError(
                f"{name} of {key}: expected one {column} for each of {length} tokens, found {len(numbers)}"
            )
        bad = np.flatnonzero(~np.isfinite(numbers))
        if len(bad):
            raise ValueError(
                f"{name} of {key}: {column} at token {bad[0]} is {numbers[bad[0]]}; expected a finite number"
            )
    return np.concatenate(found)


def _in_order(rows: list[dict[str, Any]], outputs: Outputs, name: str) -> list[dict[str, Any]]:
    keys = [(row["question_id"], row["sample"]) for row in rows]
    check_same_rows(outputs.keys, keys, name)
    by_key = dict(zip(keys, rows, strict=True))
    return [by_key[key] for key in outputs.keys]
