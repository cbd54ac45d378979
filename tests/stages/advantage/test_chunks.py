"""Advantages a chunk at a time: a question is never cut, and no value depends on the chunks."""

from __future__ import annotations

import random

import pytest

from pipeline.store import Store
from stages.advantage import (
    AdvantageConfig,
    CorrectConfig,
    GAEConfig,
    GroupConfig,
    OneConfig,
    PairsConfig,
    estimate_advantages,
)
from stages.advantage.inputs import Exploration, read_exploration
from stages.advantage.stage import advantages_of
from stages.tables import Advantages
from tests.stages.advantage.tables import Row, group, logprobs_of, outputs_of, rewards_of, row, values_of

KINDS: list[AdvantageConfig] = [
    OneConfig(),
    CorrectConfig(),
    GroupConfig(),
    GroupConfig(supervision="process"),
    GroupConfig(baseline="leave_one_out", scale="none", kl_in_reward=0.1),
    GroupConfig(degenerate="mask", truncated="mask"),
    GAEConfig(),
    PairsConfig(),
]


def drawn(questions: int, G: int) -> list[Row]:
    """Outputs of 1 to 8 tokens with one to three steps; one reward in ten is missing, one output in five cut."""
    draw = random.Random(7)
    rows = []
    for question in range(questions):
        for sample in range(G):
            tokens, reward = draw.randrange(1, 9), None if draw.random() < 0.1 else float(draw.random() < 0.5)
            steps = [(draw.random(), end) for end in sorted(draw.sample(range(tokens), min(tokens, 3)))]
            rows.append(row(f"q{question}", sample, reward, tokens, cut=draw.random() < 0.2, steps=steps))
    return rows


def exploration(rows: list[Row]) -> Exploration:
    draw = random.Random(8)
    values, logprobs = ([[draw.random() for _ in range(each["tokens"])] for each in rows] for _ in range(2))
    return read_exploration(outputs_of(rows), rewards_of(rows), values_of(rows, *values), logprobs_of(rows, *logprobs))


@pytest.mark.parametrize("config", KINDS, ids=repr)
def test_values_are_the_same_bit_for_bit_however_small_the_chunks(store: Store, config: AdvantageConfig) -> None:
    tables = exploration(drawn(questions=12, G=4))
    whole = Advantages.write(advantages_of([tables], config))
    for tokens in (1, 150, 400):
        chunks = list(tables.chunks(tokens))
        assert 1 < len(chunks) <= 12
        assert Advantages.write(advantages_of(chunks, config)).digest == whole.digest


def test_chunks_hold_whole_questions_in_their_order(store: Store) -> None:
    chunks = list(exploration(drawn(questions=5, G=3)).chunks(130))  # a question counts 16 a row, and its tokens
    found = [chunk.outputs["question_id"].to_pylist() for chunk in chunks]
    assert [name for part in found for name in part] == [f"q{question}" for question in range(5) for _ in range(3)]
    assert all(len(part) % 3 == 0 for part in found)
    assert len(chunks) > 1


@pytest.mark.parametrize(
    "rows",
    [
        [*group("a", 1.0, 0.0), *group("b", 1.0, 0.0, 0.0)],
        [group("a", 1.0, 0.0)[0], *group("b", 1.0, 0.0), group("a", 1.0, 0.0)[1]],
    ],
    ids=["groups of unequal size", "a group in two places"],
)
def test_what_cannot_be_cut_into_groups_comes_at_once(store: Store, rows: list[Row]) -> None:
    tables = read_exploration(outputs_of(rows), None, None, None)
    assert len(list(tables.chunks(1))) == 1


def test_rewards_in_another_order_are_joined_by_key(store: Store) -> None:
    rows = [*group("a", 1.0, 0.0), *group("b", 0.0, 1.0)]
    tables = read_exploration(outputs_of(rows), rewards_of(rows[::-1]), None, None)
    assert len(list(tables.chunks(1))) == 1
    signs = [row["advantage"][0] > 0 for part in advantages_of([tables], GroupConfig()) for row in part.to_pylist()]
    assert signs == [True, False, False, True]


def test_pairs_are_numbered_on_across_chunks(store: Store) -> None:
    rows = [*group("a", 1.0, 0.0), *group("b", 0.0, 1.0)]
    tables = read_exploration(outputs_of(rows), rewards_of(rows), None, None)
    parts = list(advantages_of(tables.chunks(1), PairsConfig()))
    assert [part["pair"].to_pylist() for part in parts] == [[0, 0], [1, 1]]


def test_an_unfinished_group_is_found_wherever_it_is(store: Store) -> None:
    rows = [*group("a", 1.0, 0.0), *group("b", 0.0, 1.0)[:1]]
    with pytest.raises(ValueError, match="question 'b' has one output"):
        estimate_advantages(rewards_of(rows), outputs_of(rows), GroupConfig())
