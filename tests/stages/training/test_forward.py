"""Log-probabilities of completions do not depend on what else is in the batch."""

from __future__ import annotations

import random

import pytest
import torch

from stages.training.batching import collate, micro_batches
from stages.training.forward import completion_logprobs
from tests.stages.training.tiny import random_rows, tiny_model


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    module: torch.nn.Module = tiny_model()
    return module


def test_they_equal_the_log_softmax_of_all_logits_shifted_by_one(model: torch.nn.Module) -> None:
    (row,) = random_rows(1)
    ids = torch.tensor([[*row.prompt_ids, *row.output_ids]])
    expected = torch.log_softmax(model(input_ids=ids).logits[0].double() / 0.7, -1)
    first = len(row.prompt_ids)
    by_hand = [expected[first - 1 + o, token].item() for o, token in enumerate(row.output_ids)]
    scored = completion_logprobs(model, collate([row], [0]), 0.7)
    assert scored.logp_BO[0].tolist() == pytest.approx(by_hand, abs=1e-5)
    assert scored.entropy_BO is None


def test_a_float64_model_is_scored_in_float64_end_to_end() -> None:
    double, (row,) = tiny_model().double(), random_rows(1)
    ids = torch.tensor([[*row.prompt_ids, *row.output_ids]])
    expected = torch.log_softmax(double(input_ids=ids).logits[0], -1)
    first = len(row.prompt_ids)
    by_hand = [expected[first - 1 + o, token].item() for o, token in enumerate(row.output_ids)]
    scored = completion_logprobs(double, collate([row], [0]), with_entropy=True)
    assert scored.logp_BO.dtype == torch.float64
    assert scored.entropy_BO is not None
    assert scored.entropy_BO.dtype == torch.float64
    assert scored.logp_BO[0].tolist() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_row_alone_scores_as_it_does_in_a_padded_batch(attention: str) -> None:
    """In float32 to 1e-5 nats, whatever computes attention: a leak would be of the order of the log-probabilities."""
    rows, model = random_rows(7), tiny_model()
    model.set_attn_implementation(attention)
    together = completion_logprobs(model, collate(rows, range(7)), with_entropy=True)
    assert together.entropy_BO is not None
    for index, row in enumerate(rows):
        alone = completion_logprobs(model, collate(rows, [index]), with_entropy=True)
        length = len(row.output_ids)
        assert alone.entropy_BO is not None
        torch.testing.assert_close(together.logp_BO[index, :length], alone.logp_BO[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together.entropy_BO[index, :length], alone.entropy_BO[0], atol=1e-5, rtol=0)
        assert together.logp_BO[index, length:].eq(0).all()


@pytest.mark.parametrize("max_tokens", [1, 25, 60, 10_000])
def test_neither_order_nor_padding_nor_neighbours_change_a_row_s_logprobs(max_tokens: int) -> None:
    double, rows = tiny_model().double(), random_rows(9)
    alone = [completion_logprobs(double, collate(rows, [index])).logp_BO[0] for index in range(len(rows))]
    shuffled = random.Random(1).sample(range(len(rows)), len(rows))
    for order in (range(len(rows)), shuffled):
        for batch in micro_batches([rows[index] for index in order], max_tokens):
            scored = completion_logprobs(double, batch)
            for place, row in enumerate(batch.rows):
                expected = alone[order[row]]
                # The model's own softmax and norms are in float32 even here.
                torch.testing.assert_close(scored.logp_BO[place, : len(expected)], expected, rtol=0, atol=1e-7)


def test_the_gradient_does_not_depend_on_the_cut_into_micro_batches() -> None:
    rows = random_rows(9)

    def gradients(max_tokens: int) -> torch.Tensor:
        model = tiny_model()
        targets = sum(len(row.output_ids) for row in rows)
        for batch in micro_batches(rows, max_tokens):
            (-completion_logprobs(model, batch).logp_BO.sum() / targets).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    whole = gradients(10_000)
    for max_tokens in (1, 20, 45):
        assert (gradients(max_tokens) - whole).norm() < 1e-6 * whole.norm()


def test_the_head_is_as_it_was_after_an_error(model: torch.nn.Module) -> None:
    batch = collate(random_rows(1), [0])
    failure = model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        completion_logprobs(model, batch)
    failure.remove()
    assert model(input_ids=batch.input_ids_BT).logits.shape[:2] == batch.input_ids_BT.shape
