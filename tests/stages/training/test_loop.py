"""Scoring rows under a fixed model: by row, each distinct one computed once."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.training.batching import Batch, Row
from stages.training.loop import score_rows

ROWS = [Row([1, 2], [5, 6, 7]), Row([1, 2], [8]), Row([1, 2], [5, 6, 7]), Row([3], [8])]


def test_values_come_back_by_row_without_padding() -> None:
    found = score_rows(ROWS, 100, lambda batch: batch.output_mask_BO * torch.arange(1.0, 4.0))
    assert found == [[1.0, 2.0, 3.0], [1.0], [1.0, 2.0, 3.0], [1.0]]


def test_equal_rows_are_computed_once_and_other_prompts_apart() -> None:
    computed: list[int] = []

    def score(batch: Batch) -> Tensor:
        computed.append(len(batch.rows))
        assert not torch.is_grad_enabled()
        return batch.output_mask_BO * batch.input_ids_BT[:, :1].float()  # the prompt's first token

    assert score_rows(ROWS, 5, score) == [[1.0, 1.0, 1.0], [1.0], [1.0, 1.0, 1.0], [3.0]]
    assert sum(computed) == 3
    assert len(computed) > 1
