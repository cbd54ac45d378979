"""Batches without replacement: epochs are permutations, borders repeat nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store import Store
from stages.data import ArithmeticConfig, DataError, arithmetic_questions, sample_batch
from stages.training.batching import sample_positions


@pytest.mark.claim("line 5")
@settings(max_examples=150)
@given(st.integers(1, 40), st.data())
def test_every_epoch_is_a_permutation_and_no_batch_repeats_a_row(count: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, count))
    epochs = 4
    drawn: list[int] = []
    for step in range(-(-epochs * count // size)):
        batch = sample_positions(count, size=size, step=step, seed=3)
        assert len(set(batch)) == size
        drawn += batch
    for epoch in range(epochs):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))


@pytest.mark.claim("a resumed run that repeats questions")
def test_a_step_s_batch_does_not_depend_on_the_steps_before_it() -> None:
    first = sample_positions(10, size=4, step=7, seed=0)
    for step in range(7):
        sample_positions(10, size=4, step=step, seed=0)
    assert sample_positions(10, size=4, step=7, seed=0) == first


def test_seeds_and_epochs_shuffle_differently() -> None:
    orders = {tuple(sample_positions(30, size=30, step=step, seed=seed)) for step in range(3) for seed in range(3)}
    assert len(orders) == 9


def test_the_order_is_the_same_on_every_machine() -> None:
    assert sample_positions(8, size=8, step=0, seed=0) == [2, 4, 5, 0, 3, 1, 7, 6]


def test_a_batch_is_the_questions_rows_unchanged(store: Store) -> None:
    questions = arithmetic_questions(ArithmeticConfig(count=20), "train")
    rows = questions.rows()
    batch = sample_batch(questions, size=5, step=2, seed=1).rows()
    assert batch == [rows[place] for place in sample_positions(20, size=5, step=2, seed=1)]


@pytest.mark.parametrize("size", [0, 21])
def test_a_size_the_set_cannot_give_is_refused_with_both_numbers(store: Store, size: int) -> None:
    questions = arithmetic_questions(ArithmeticConfig(count=20), "train")
    with pytest.raises(DataError, match=rf"expected size in 1..20 .* found {size}"):
        sample_batch(questions, size=size, step=0, seed=0)
