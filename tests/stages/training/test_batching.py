"""Micro-batches: budget, order, masks from lengths."""

from __future__ import annotations

import pytest

from stages.training.batching import Row, collate, micro_batches, own_share
from tests.stages.training.tiny import random_rows


@pytest.mark.claim("masks guessed from ids")
def test_masks_and_targets_follow_from_lengths_by_hand() -> None:
    # 0 pads, and is also a token of the second row: its mask must come from lengths.
    batch = collate([Row([5, 6], [7]), Row([8], [0, 9, 0])], [0, 1])
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 0], [8, 0, 9, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert batch.output_mask_BO.tolist() == [[True, False, False], [True, True, True]]
    assert (batch.source_index_N.tolist(), batch.starts, batch.tokens) == ([1, 4, 5, 6], (2, 5), 7)
    assert batch.targets_N.tolist() == [7, 0, 9, 0]


def test_rows_of_like_length_share_a_batch_within_the_budget() -> None:
    rows = [Row([1], [2] * length) for length in (1, 7, 3, 7, 2)]  # 2, 8, 4, 8 and 3 tokens
    batches = list(micro_batches(rows, max_tokens=16))
    assert [batch.rows for batch in batches] == [(1, 3), (2, 4, 0)]
    assert [tuple(batch.input_ids_BT.shape) for batch in batches] == [(2, 8), (3, 4)]


def test_a_row_longer_than_the_budget_makes_a_batch_of_its_own() -> None:
    batches = list(micro_batches([Row([1], [2] * 9), Row([1], [2])], max_tokens=4))
    assert [batch.rows for batch in batches] == [(0,), (1,)]
    rows = [Row([1], [2] * 9)] * 3
    assert [batch.rows for batch in micro_batches(rows, max_tokens=4, units=[range(3)])] == [(0, 1, 2)]


@pytest.mark.parametrize("row", [Row([], [1]), Row([1], [])])
def test_a_row_without_prompt_or_output_is_refused_by_its_index(row: Row) -> None:
    with pytest.raises(ValueError, match="row 1 has"):
        list(micro_batches([Row([1], [2, 3, 4]), row], max_tokens=100))


def test_units_stay_whole_in_order_and_are_placed_by_their_longest_row() -> None:
    # Three pairs of 2 and 3, 9 and 2, 4 and 5 tokens.
    rows = [Row([1], [2] * (length - 1)) for length in (2, 3, 9, 2, 4, 5)]
    batches = list(micro_batches(rows, max_tokens=20, units=[(0, 1), (2, 3), (4, 5)]))
    # 20 tokens hold one pair padded to 9 (18), then both pairs padded to 5 (20).
    assert [batch.rows for batch in batches] == [(2, 3), (4, 5, 0, 1)]
    assert [tuple(batch.input_ids_BT.shape) for batch in batches] == [(2, 9), (4, 5)]


@pytest.mark.claim("the last batch dropped or counted twice")
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_all_batches_between_them_in_equally_many_passes(world_size: int) -> None:
    batches = list(micro_batches(random_rows(7), 1))
    shares = [own_share(batches, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {-(-7 // world_size)}
    computed = [batch.rows[0] for share in shares for batch, factor in share if factor == 1]
    assert sorted(computed) == list(range(7))
    assert all(factor in (0, 1) for share in shares for _, factor in share)
    assert own_share([], rank=world_size - 1, world_size=world_size) == []
