"""Weights of tokens: the three aggregations for outputs of 2 and 6 tokens, by hand."""

from __future__ import annotations

import pytest
import torch

from stages.kernels.aggregation import constant_weights, sequence_mean_weights, token_mean_weights

MASK = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
ONES = torch.ones(2)


@pytest.mark.claim("which mean")
@pytest.mark.parametrize(
    ("weights", "short", "long"),
    [
        (sequence_mean_weights(MASK, ONES, outputs=2), 1 / 4, 1 / 12),
        (token_mean_weights(MASK, ONES, tokens=8), 1 / 8, 1 / 8),
        (constant_weights(MASK, ONES, outputs=2, length=8), 1 / 16, 1 / 16),
    ],
    ids=["sequence mean", "token mean", "constant"],
)
def test_tokens_weigh_one_over_length_and_group_as_in_the_paper(
    weights: torch.Tensor, short: float, long: float
) -> None:
    assert weights[0].tolist() == pytest.approx([short, short, 0, 0, 0, 0])
    assert weights[1].tolist() == pytest.approx([long] * 6)
    assert sequence_mean_weights(torch.zeros(1, 3), torch.ones(1), outputs=2).tolist() == [[0.0, 0.0, 0.0]]


def test_a_merged_row_weighs_as_much_as_its_rows() -> None:
    apart = sequence_mean_weights(torch.ones(3, 4), torch.ones(3), outputs=5)
    merged = sequence_mean_weights(torch.ones(1, 4), torch.tensor([3.0]), outputs=5)
    assert merged.sum().item() == pytest.approx(apart.sum().item())


def test_weights_of_two_micro_batches_add_up_to_those_of_the_whole() -> None:
    whole = token_mean_weights(MASK, ONES, tokens=8)
    parts = [token_mean_weights(MASK[i : i + 1], ONES[i : i + 1], tokens=8) for i in range(2)]
    assert torch.equal(torch.cat(parts), whole)
