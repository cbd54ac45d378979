"""DPO by hand: two pairs of unequal lengths."""

from __future__ import annotations

import math

import pytest
import torch

from stages.kernels.preference import dpo, log_ratio_of_outputs

MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.float64)
LOGP = torch.tensor([[-1.0, -1.0, 0], [-2.0, 0, 0], [-1, -2, -3], [-1, -1, 0]], dtype=torch.float64)
REF = torch.tensor([[-1.5, -2.5, 0], [-1.0, 0, 0], [-1, -2, -3], [-1, -1, 0]], dtype=torch.float64)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_log_ratios_are_means_over_the_tokens_of_an_output() -> None:
    ratio = LOGP - REF  # row 0: 0.5, 1.5; row 1: -1
    assert log_ratio_of_outputs(ratio, MASK, length_normalised=True).tolist() == [1.0, -1.0, 0.0, 0.0]
    assert log_ratio_of_outputs(ratio, MASK, length_normalised=False).tolist() == [2.0, -1.0, 0.0, 0.0]


def test_the_value_is_log_sigma_of_the_margin_at_every_token_of_both() -> None:
    found = dpo(LOGP, REF, MASK, beta=0.5, length_normalised=True)
    first = math.log(sigma(0.5 * (1.0 - -1.0)))
    assert found.value_BT[:2].flatten().tolist() == pytest.approx([first] * 6)
    assert found.value_BT[2:].flatten().tolist() == pytest.approx([math.log(0.5)] * 6)
    assert found.shown["preference_margin"][:, 0].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert found.shown["preference_accuracy"][:, 0].tolist() == [1.0, 1.0, 0.0, 0.0]


def test_the_usual_form_sums_over_tokens() -> None:
    found = dpo(LOGP, REF, MASK, beta=0.5, length_normalised=False)
    assert found.value_BT[0, 0].item() == pytest.approx(math.log(sigma(0.5 * (2.0 - -1.0))))
