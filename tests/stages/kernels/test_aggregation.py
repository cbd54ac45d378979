"""Weights of tokens: the three aggregations for outputs of 2 and 6 tokens, by hand."""

from __future__ import annotations

import pytest
import torch

from stages.kernels.aggregation import constant_weights, sequence_mean_weights, token_mean_weights

MASK = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
ONES = torch.ones(2)


@pytest.mark.claim("which mean")
def test_tokens_weigh_one_over_length_and_group_as_in_the_paper() -> None:
    weights = sequence_mean_weights(MASK, ONES, outputs=2)
    assert weights[0].tolist() == pytest.approx([1 / 4, 1 / 4, 0, 0, 0, 0])
    assert weights[1].tolist() == pytest.approx([1 / 12] * 6)


@pytest.mark.claim("which mean")
def test_all_tokens_weigh_alike_in_a_token_mean() -> None:
    weights = token_mean_weights(MASK, ONES, tokens=8)
    assert weights[0].tolist() == pytest.approx([1 / 8, 1 / 8, 0, 0, 0, 0])
    assert weights[1].tolist() == pytest.approx([1 / 8] * 6)


@pytest.mark.claim("which mean")
def test_one_constant_divides_short_and_long_outputs() -> None:
    weights = constant_weights(MASK, ONES, outputs=2, length=8)
    assert weights[0].tolist() == pytest.approx([1 / 16, 1 / 16, 0, 0, 0, 0])
    assert weights[1].tolist() == pytest.approx([1 / 16] * 6)


def test_a_merged_row_weighs_as_much_as_the_rows_it_stands_for() -> None:
    apart = sequence_mean_weights(torch.ones(3, 4), torch.ones(3), outputs=5)
    merged = sequence_mean_weights(torch.ones(1, 4), torch.tensor([3.0]), outputs=5)
    assert merged.sum().item() == pytest.approx(apart.sum().item())


def test_weights_of_two_micro_batches_add_up_to_those_of_the_whole() -> None:
    whole = token_mean_weights(MASK, ONES, tokens=8)
    parts = [token_mean_weights(MASK[i : i + 1], ONES[i : i + 1], tokens=8) for i in range(2)]
    assert torch.equal(torch.cat(parts), whole)


def test_an_empty_row_weighs_nothing() -> None:
    assert sequence_mean_weights(torch.zeros(1, 3), torch.ones(1), outputs=2).tolist() == [[0.0, 0.0, 0.0]]
