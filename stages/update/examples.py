"""From tables to training examples: outputs joined with their advantages by key, equal ones merged, then dealt out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from stages.tables import Advantages, Rollouts

__all__ = ["Example", "deal", "drop_idle", "join", "merge_equal"]


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


def join(outputs: Rollouts, advantages: Advantages) -> list[Example]:
    """One example per output that has advantages; rows masked out (null advantage) take no part.

    Raises:
        ValueError: an output without a row of advantages, with another number of them than tokens, or no output left.
    """
    by_key = {(row["question_id"], row["sample"]): row["advantage"] for row in advantages.rows()}
    examples = []
    for row in outputs.read().select(["question_id", "sample", "prompt_ids", "output_ids"]).to_pylist():
        key = (row["question_id"], row["sample"])
        if key not in by_key:
            raise ValueError(f"output {key} has no advantages; were they estimated from other rollouts?")
        advantage = by_key[key]
        if advantage is None:
            continue
        if len(advantage) != len(row["output_ids"]):
            raise ValueError(f"output {key}: expected {len(row['output_ids'])} advantages, found {len(advantage)}")
        ids = tuple(row["prompt_ids"]), tuple(row["output_ids"])
        examples.append(Example(row["question_id"], *ids, tuple(advantage), 1.0))
    if not examples:
        raise ValueError("every output is masked out; there is nothing to learn from")
    return examples


def merge_equal(examples: Sequence[Example]) -> list[Example]:
    """Equal outputs (with equal advantages) of one question as one example of their summed weight, in first-seen order."""
    weights: dict[Example, float] = {}
    for example in examples:
        weights[example] = weights.get(example, 0.0) + example.weight
    return [
        Example(merged.question_id, merged.prompt_ids, merged.output_ids, merged.advantage, weight)
        for merged, weight in weights.items()
    ]


def drop_idle(examples: Sequence[Example]) -> list[Example]:
    """Examples with an advantage other than 0: without a KL term the others have no gradient, so they cost nothing."""
    return [example for example in examples if any(example.advantage)]


def deal(examples: Sequence[Example], *, mini_batches: int, seed: int) -> list[list[Example]]:
    """Examples dealt to mini-batches by question, so that groups stay whole; one mini-batch keeps their order."""
    if mini_batches == 1:
        return [list(examples)]
    questions = list(dict.fromkeys(example.question_id for example in examples))
    random.Random(seed).shuffle(questions)
    place = {question: number % mini_batches for number, question in enumerate(questions)}
    hands: list[list[Example]] = [[] for _ in range(mini_batches)]
    for example in examples:
        hands[place[example.question_id]].append(example)
    if not all(hands):
        raise ValueError(f"mini_batches = {mini_batches} needs at least as many questions, found {len(questions)}")
    return hands
