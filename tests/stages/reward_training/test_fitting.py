"""Shares of an update: micro-batches and ranks together weigh every output and every pair once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, cast

import pytest

from stages.reward_training import BradleyTerryConfig, PointwiseConfig, RewardObjectiveConfig
from stages.reward_training.examples import Example, units_of
from stages.reward_training.fitting import _parts


@dataclass
class Rank:
    """What the shares need to know of an engine."""

    rank: int
    world_size: int
    device: str = "cpu"
    model: Any = None


def examples() -> list[Example]:
    """Three questions of 5 outputs; of lengths 3 to 7, two of them equal in each question."""
    made = []
    for question in range(3):
        for sample, length in enumerate((3, 7, 5, 3, 4)):
            ids = tuple(range(10, 10 + length))
            made.append(Example(f"q{question}", (5, 6), ids, (length - 1,), (float(sample in (0, 1, 3)),)))
    return made


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 20, 1000])
@pytest.mark.parametrize(
    "objective",
    [PointwiseConfig(), BradleyTerryConfig(), BradleyTerryConfig(pairs="matched"), BradleyTerryConfig(average="pairs")],
)
def test_the_weights_of_all_parts_of_all_ranks_sum_to_one(
    objective: RewardObjectiveConfig, tokens: int, world_size: int
) -> None:
    units = units_of(examples(), objective)
    shares = [list(_parts(units, cast(Any, Rank(rank, world_size)), tokens, objective)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1  # ranks take part in equally many backward passes
    pairs = [float(part.weight_P.sum()) for share in shares for part in share]
    outputs = [float(part.weight_N.sum()) for share in shares for part in share]
    assert sum(pairs if objective.kind == "bradley_terry" else outputs) == pytest.approx(1.0)


def test_equal_outputs_are_one_example_of_their_number() -> None:
    assert [unit.examples[0].weight for unit in units_of(examples(), PointwiseConfig())] == [2, 1, 1, 1] * 3
    unit = units_of(examples(), BradleyTerryConfig())[0]
    # Right: lengths 3 (twice) and 7; wrong: 5 and 4.
    assert [(pair.preferred, pair.other, pair.weight) for pair in unit.pairs] == [
        (0, 2, 2),
        (0, 3, 2),
        (1, 2, 1),
        (1, 3, 1),
    ]


@pytest.mark.claim("Bradley-Terry that weighs questions by pairs")
@pytest.mark.parametrize(
    ("average", "expected"),
    # Three of five outputs right (6 pairs), and one of five (4 pairs).
    [("questions", [1 / 12] * 6 + [1 / 8] * 4), ("pairs", [1 / 10] * 10)],
)
@pytest.mark.parametrize("tokens", [1, 1000])
def test_a_pair_is_weighed_within_its_question_unless_said_otherwise(
    average: Any, expected: list[float], tokens: int
) -> None:
    made = [
        Example(f"q{right}", (5, 6), (10 + sample,), (0,), (float(sample < right),))
        for right in (3, 1)
        for sample in range(5)
    ]
    objective = BradleyTerryConfig(average=average)
    parts = _parts(units_of(made, objective), cast(Any, Rank(0, 1)), tokens, objective)
    assert sorted(float(weight) for part in parts for weight in part.weight_P) == pytest.approx(sorted(expected))


def test_matched_pairs_use_each_output_once() -> None:
    units = units_of(examples(), BradleyTerryConfig(pairs="matched"))
    lengths = [[len(example.output_ids) for example in unit.examples] for unit in units]
    assert lengths == [[3, 5], [7, 4]] * 3


@pytest.mark.parametrize("objective", [PointwiseConfig(), BradleyTerryConfig(), BradleyTerryConfig(pairs="matched")])
def test_micro_batches_hold_whole_units_within_the_budget(objective: RewardObjectiveConfig) -> None:
    units = units_of(examples(), objective)
    largest = max(len(unit.examples) for unit in units)
    batches = [part.batch for part in _parts(units, cast(Any, Rank(0, 1)), 40, objective)]
    assert sorted(row for batch in batches for row in batch.rows) == list(range(sum(len(u.examples) for u in units)))
    assert all(batch.input_ids_BT.numel() <= 40 or len(batch.rows) == largest for batch in batches)
    starts = [0]
    for unit in units:
        starts.append(starts[-1] + len(unit.examples))
    for batch in batches:
        for start, end in itertools.pairwise(starts):
            held = [row for row in batch.rows if start <= row < end]
            assert len(held) in (0, end - start)
