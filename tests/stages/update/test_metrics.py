"""What the metrics say of hand-made micro-batches: ranges over output tokens only, means over what was computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stages.kernels.objective import Surrogate
from stages.training.batching import Row, micro_batches
from stages.training.engine import StepReport
from stages.update.loss import MicroBatch, Terms
from stages.update.metrics import UpdateMetrics

LENGTHS = (3, 1)
"""Tokens of the two outputs: the second has two places of padding."""


def noted(
    ratio: Tensor,
    weight: Tensor,
    *,
    kl: Tensor | None = None,
    clipped: Tensor | None = None,
    correction: tuple[Tensor, Tensor] | None = None,
    counts: bool = True,
) -> UpdateMetrics:
    """Metrics of one micro-batch of two outputs and one step; all tensors [2, 3]. `correction`: kept and before its cap."""
    weight_kept, weight_raw = correction or (None, None)
    (batch,) = micro_batches([Row((1, 2), (3,) * length) for length in LENGTHS], 100)
    zeros = torch.zeros(2, 3)
    surrogate = Surrogate(zeros, ratio, zeros.bool() if clipped is None else clipped)
    kept = UpdateMetrics()
    part = MicroBatch(batch, zeros, weight.double(), counts=counts)
    kept.add(part, Terms(zeros, zeros, surrogate, kl, weight_kept, weight_raw), 2 * ratio, loss=0.5)
    kept.stepped(StepReport(3.0, 0.1, skipped=False))
    return kept


def metrics(kept: UpdateMetrics, beta: float = 0.0) -> dict[str, float]:
    found = kept.metrics(beta=beta, seconds=2.0, computed=2)
    return {name.removeprefix("policy/"): value for name, value in found.items()}


WEIGHT = torch.tensor([[1 / 6, 1 / 6, 1 / 6], [1 / 2, 0, 0]])
"""The paper's weights of two outputs of 3 and 1 tokens; 0 on padding."""


@pytest.mark.parametrize(
    ("padding", "low", "high"), [(1.0, 2.0, 5.0), (9.0, 2.0, 5.0), (0.1, 2.0, 5.0), (float("nan"), 2.0, 5.0)]
)
def test_the_range_of_ratios_is_over_output_tokens_alone(padding: float, low: float, high: float) -> None:
    ratio = torch.tensor([[2.0, 3.0, 4.0], [5.0, padding, padding]])
    found = metrics(noted(ratio, torch.where(WEIGHT > 0, WEIGHT, 0.0)))
    assert (found["ratio_min"], found["ratio_max"]) == (low, high)


def test_ratios_below_one_are_not_taken_for_one() -> None:
    found = metrics(noted(torch.tensor([[0.5, 0.25, 0.75], [0.5, 1.0, 1.0]]), WEIGHT))
    assert (found["ratio_min"], found["ratio_max"]) == (0.25, 0.75)


def test_means_are_of_what_was_computed_where_idle_rows_were_left_out() -> None:
    """The mini-batch has four outputs, two of them idle and not computed: the weights of the others add up to 1/2."""
    ratio = torch.tensor([[2.0, 3.0, 4.0], [5.0, 1.0, 1.0]])
    clipped = torch.tensor([[True, False, False], [True, False, False]])
    found = metrics(noted(ratio, WEIGHT / 2, kl=ratio / 10, clipped=clipped), beta=0.5)
    # Mean over outputs of the mean over tokens: (3 + 5) / 2; entropy twice that, KL a tenth; clipped (1/3 + 1) / 2.
    assert found["ratio_mean"] == pytest.approx(4.0)
    assert found["entropy"] == pytest.approx(8.0)
    assert found["kl"] == pytest.approx(0.4)
    assert found["clip_fraction"] == pytest.approx(2 / 3)
    # The loss is that of the whole mini-batch, with beta times its own share of the divergence.
    assert found["loss"] == 0.5
    assert found["policy_loss"] == pytest.approx(0.5 - 0.5 * 0.2)


def test_the_share_of_cut_corrections_weighs_tokens_as_the_loss_does() -> None:
    raw = torch.tensor([[1.0, 4.0, 2.0], [8.0, 9.0, 9.0]])
    found = metrics(noted(torch.ones(2, 3), WEIGHT, correction=(raw.clamp(max=2.0), raw)))
    assert found["correction_clipped"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["correction_mean"] == pytest.approx(((1 + 2 + 2) / 3 + 2) / 2)
    assert found["correction_raw_mean"] == pytest.approx(((1 + 4 + 2) / 3 + 8) / 2)


def test_two_steps_are_averaged_and_their_ranges_joined() -> None:
    first = noted(torch.full((2, 3), 2.0), WEIGHT)
    second = noted(torch.full((2, 3), 0.5), WEIGHT)
    first.ratio_max, first.ratio_min = max(first.ratio_max, second.ratio_max), min(first.ratio_min, second.ratio_min)
    first.sums = {name: first.sums[name] + second.sums[name] for name in first.sums}
    first.stepped(StepReport(5.0, 0.2, skipped=True))
    found = metrics(first)
    assert (found["ratio_mean"], found["ratio_max"], found["ratio_min"]) == (pytest.approx(1.25), 2.0, 0.5)
    assert (found["grad_norm"], found["learning_rate"], found["skipped_steps"]) == (4.0, 0.2, 1)


def test_a_micro_batch_of_another_rank_adds_no_range_and_no_tokens() -> None:
    found = metrics(noted(torch.full((2, 3), 7.0), 0 * WEIGHT, counts=False))
    assert "ratio_max" not in found
    assert found["tokens_per_s"] == 0.0


def test_tokens_and_padding_count_prompts_too() -> None:
    found = metrics(noted(torch.ones(2, 3), WEIGHT))
    assert found["tokens_per_s"] == (5 + 3) / 2.0
    assert found["padding_share"] == pytest.approx(2 / 10)


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_counts_as_none_in_the_mean(norm: float) -> None:
    kept = noted(torch.ones(2, 3), WEIGHT)
    kept.stepped(StepReport(norm, 0.1, skipped=True))
    assert metrics(kept)["grad_norm"] == 1.5
