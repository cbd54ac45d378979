"""From tables to training examples: outputs joined with their advantages by key, equal ones merged, then dealt out."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from stages.join import KEY, Ragged, align, per_token
from stages.tables import Advantages, ReferenceLogprobs, Rollouts

__all__ = ["Example", "drop_idle", "join", "merge_equal", "pair_up"]

_RECORDS: Final = "rollout log-probabilities"
_REFERENCE: Final = "reference log-probabilities"


@dataclass(frozen=True)
class Example:
    """An output o_i with its advantages, standing for `weight` equal ones."""

    question_id: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    advantage: tuple[float, ...]
    """A-hat_{i,t}, one value per output id."""
    weight: float
    """How many equal outputs of the group this one stands for."""
    rollout_logp: tuple[float, ...] | None = None
    """The rollout engine's log-probabilities, one per output id, where the loss reads them."""
    pair: int | None = None
    """The preference it belongs to, where there are any."""
    ref_logp: tuple[float, ...] | None = field(default=None, compare=False)
    """log pi_ref, one per output id, where it was computed before; equal for equal outputs."""
    recorded: tuple[tuple[float, ...], ...] = field(default=(), compare=False)
    """The rollout engine's log-probabilities of each output that this one stands for, where they are only measured: unlike
    those that the loss reads, they keep no two outputs apart."""


def join(
    outputs: Rollouts,
    advantages: Advantages,
    *,
    with_logprobs: bool = False,
    with_records: bool = False,
    reference: ReferenceLogprobs | None = None,
) -> list[Example]:
    """One example per output that has advantages; rows masked out (null advantage) take no part.

    Args:
        with_logprobs: the loss reads the rollout engine's log-probabilities: every row must have them.
        with_records: they are measured, in the rows that have them.
        reference: log pi_ref of these outputs.

    Raises:
        ValueError: names the row: an output without advantages or advantages without an output, another number of them than
            tokens, or one that is not finite (log-probabilities too, where they are read).
    """
    read = with_logprobs or with_records
    table = outputs.read([*KEY, "prompt_ids", "output_ids", *(["logprobs"] if read else [])])
    found = align(table, advantages.read([*KEY, "advantage", "pair"]), "advantages")
    kept = found["advantage"].is_valid()
    table, found = table.filter(kept), found.filter(kept)
    output = Ragged.of(table["output_ids"])
    columns: dict[str, Iterable[Any]] = {
        "question_id": table["question_id"].to_pylist(),
        "prompt_ids": _tuples(Ragged.of(table["prompt_ids"])),
        "output_ids": _tuples(output),
        "advantage": _tuples(per_token(found, "advantage", output.lengths, "advantages")),
        "weight": itertools.repeat(1.0, len(output)),
        "pair": found["pair"].to_pylist(),
    }
    if read:
        logprobs = per_token(table, "logprobs", output.lengths, _RECORDS, masked=not with_logprobs)
        rows = _tuples(logprobs)
        if with_logprobs:
            columns["rollout_logp"] = rows
        if with_records:
            columns["recorded"] = [() if null else (row,) for row, null in zip(rows, logprobs.null, strict=True)]
    if reference is not None:
        frozen = align(table, reference.read(), _REFERENCE, extra=True)
        columns["ref_logp"] = _tuples(per_token(frozen, "reference", output.lengths, _REFERENCE))
    return [Example(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


def _tuples(column: Ragged) -> list[tuple[Any, ...]]:
    """The values of each row, so that equal rows can be found."""
    return [tuple(values.tolist()) for values in column]


def merge_equal(examples: Sequence[Example]) -> list[Example]:
    """Equal outputs (with equal advantages) of one question as one example of their summed weight, in first-seen order."""
    equal: dict[Example, list[Example]] = {}
    for example in examples:
        equal.setdefault(example, []).append(example)
    return [
        dataclasses.replace(
            example,
            weight=math.fsum(member.weight for member in members),
            recorded=tuple(logprobs for member in members for logprobs in member.recorded),
        )
        for example, members in equal.items()
    ]


def pair_up(examples: Sequence[Example]) -> list[Example]:
    """Examples as preferred, other, preferred, other, ...: the two of a pair side by side.

    Raises:
        ValueError: an example without a pair, or a pair that is not one preferred (advantage +1) and one other output (-1).
    """
    pairs: dict[int, list[Example]] = {}
    for example in examples:
        if example.pair is None:
            raise ValueError(
                f"an output of question {example.question_id!r} belongs to no pair; this objective learns from preferences: "
                "set advantage.kind=pairs"
            )
        pairs.setdefault(example.pair, []).append(example)
    ordered = []
    for number, members in pairs.items():
        members.sort(key=lambda example: -example.advantage[0])
        if [set(member.advantage) for member in members] != [{1.0}, {-1.0}]:
            raise ValueError(
                f"pair {number}: expected one output with advantage 1 and one with -1, found {len(members)}"
            )
        ordered += members
    return ordered


def drop_idle(examples: Sequence[Example]) -> list[Example]:
    """Examples with an advantage other than 0: without a KL term the others have no gradient, so they cost nothing."""
    return [example for example in examples if any(example.advantage)]
