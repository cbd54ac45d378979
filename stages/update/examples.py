"""From tables to training examples: outputs joined with their advantages by key, equal ones merged, then dealt out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from stages.tables import Advantages, ReferenceLogprobs, Rollouts

__all__ = ["Example", "drop_idle", "join", "merge_equal", "pair_up"]

Key = tuple[str, int]

_RECORDS: Final = "rollout log-probabilities"


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
    by_key = _by_key(advantages.rows())
    read = with_logprobs or with_records
    columns = ["question_id", "sample", "prompt_ids", "output_ids", *(["logprobs"] if read else [])]
    rows = _by_key(outputs.read().select(columns).to_pylist())
    _check_same_rows(rows, by_key)
    frozen = None if reference is None else {key: row["reference"] for key, row in _by_key(reference.rows()).items()}
    joined = []
    for key, row in rows.items():
        if by_key[key]["advantage"] is None:
            continue
        example = _example(key, row, by_key[key], with_logprobs)
        if with_records and row["logprobs"] is not None:
            recorded = example.rollout_logp or _per_token(key, _RECORDS, row["logprobs"], row["output_ids"])
            example = dataclasses.replace(example, recorded=(recorded,))
        if frozen is not None:
            ref_logp = _per_token(key, "reference log-probabilities", frozen.get(key), row["output_ids"])
            example = dataclasses.replace(example, ref_logp=ref_logp)
        joined.append(example)
    return joined


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


def _by_key(rows: Sequence[Mapping[str, Any]]) -> dict[Key, Mapping[str, Any]]:
    return {(row["question_id"], row["sample"]): row for row in rows}


def _check_same_rows(rows: Mapping[Key, Any], by_key: Mapping[Key, Any]) -> None:
    bare = [key for key in rows if key not in by_key]
    if bare:
        raise ValueError(f"output {bare[0]} has no advantages; were they estimated from other rollouts?")
    strange = [key for key in by_key if key not in rows]
    if strange:
        raise ValueError(f"advantages of {strange[0]} belong to no output; were they estimated from other rollouts?")


def _example(key: Key, row: Mapping[str, Any], found: Mapping[str, Any], with_logprobs: bool) -> Example:
    advantage = _per_token(key, "advantages", found["advantage"], row["output_ids"])
    logprobs = _per_token(key, _RECORDS, row["logprobs"], row["output_ids"]) if with_logprobs else None
    ids = tuple(row["prompt_ids"]), tuple(row["output_ids"])
    return Example(key[0], *ids, advantage, 1.0, logprobs, found["pair"])


def _per_token(key: Key, name: str, values: Sequence[float] | None, output_ids: Sequence[int]) -> tuple[float, ...]:
    if values is None:
        raise ValueError(f"output {key} has no {name}; nothing recorded them when it was made")
    if len(values) != len(output_ids):
        raise ValueError(f"output {key}: expected {len(output_ids)} {name}, found {len(values)}")
    for token, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"output {key}: {name} must be finite, found {value} at token {token}")
    return tuple(values)
