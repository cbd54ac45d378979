"""Log-probabilities of output tokens by definition, and the output head: in chunks, and what a model does to its logits."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch

from pipeline.config import ConfigError
from stages.kernels.head import LogitTransform
from stages.training.batching import collate, micro_batches
from stages.training.forward import CompletionLogprobs, completion_logprobs, keep_float32_logits, logit_transform
from tests.stages.training.tiny import VOCABULARY, random_rows, tiny_model

BATCH = collate(random_rows(7), range(7))


@pytest.mark.claim("off by one")
@pytest.mark.parametrize(("double", "exact"), [(False, 1e-5), (True, 1e-12)])
def test_they_equal_the_log_softmax_of_all_logits_shifted_by_one(double: bool, exact: float) -> None:
    model, (row,) = tiny_model(), random_rows(1)
    model = model.double() if double else model
    ids = torch.tensor([[*row.prompt_ids, *row.output_ids]])
    expected = torch.log_softmax(model(input_ids=ids).logits[0].double() / 0.7, -1)
    first = len(row.prompt_ids)
    by_hand = [expected[first - 1 + o, token].item() for o, token in enumerate(row.output_ids)]
    scored = completion_logprobs(model, collate([row], [0]), 0.7, with_entropy=double)
    assert scored.logp_BO[0].tolist() == pytest.approx(by_hand, abs=exact)
    assert scored.logp_BO.dtype == (torch.float64 if double else torch.float32)
    assert (None if scored.entropy_BO is None else scored.entropy_BO.dtype) == (torch.float64 if double else None)


@pytest.mark.claim("positions that count left padding", "packed rows that see each other")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_row_alone_scores_as_it_does_in_a_padded_batch(attention: str) -> None:
    """In float32 to 1e-5 nats, whatever computes attention: a leak would be of the order of the log-probabilities."""
    rows, model = random_rows(7), tiny_model()
    model.set_attn_implementation(attention)
    together = completion_logprobs(model, collate(rows, range(7)), with_entropy=True)
    for index, row in enumerate(rows):
        single = completion_logprobs(model, collate(rows, [index]), with_entropy=True)
        length = len(row.output_ids)
        torch.testing.assert_close(together.logp_BO[index, :length], single.logp_BO[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(together.entropy_BO[index, :length], single.entropy_BO[0], atol=1e-5, rtol=0)
        assert together.logp_BO[index, length:].eq(0).all()


@pytest.mark.claim("packed rows that see each other")
@pytest.mark.parametrize("max_tokens", [1, 25, 60, 10_000])
def test_neither_order_nor_padding_nor_neighbours_change_a_row_s_logprobs(max_tokens: int) -> None:
    double, rows = tiny_model().double(), random_rows(9)
    single = [completion_logprobs(double, collate(rows, [index])).logp_BO[0] for index in range(len(rows))]
    shuffled = random.Random(1).sample(range(len(rows)), len(rows))
    for order in (range(len(rows)), shuffled):
        for batch in micro_batches([rows[index] for index in order], max_tokens):
            scored = completion_logprobs(double, batch)
            for place, row in enumerate(batch.rows):
                expected = single[order[row]]
                # The model's own softmax and norms are in float32 even here.
                torch.testing.assert_close(scored.logp_BO[place, : len(expected)], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("max_logits", [None, VOCABULARY])
def test_the_head_is_as_it_was_after_an_error(max_logits: int | None) -> None:
    model = tiny_model()
    completion_logprobs(model, BATCH, max_logits=max_logits)
    failure = model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        completion_logprobs(model, BATCH, max_logits=max_logits)
    failure.remove()
    assert model(input_ids=BATCH.input_ids_BT).logits.shape == (*BATCH.input_ids_BT.shape, VOCABULARY)


MODELS: dict[str, tuple[str, dict[str, Any], LogitTransform]] = {
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}, LogitTransform()),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}, LogitTransform()),
    "llama": ("llama", {"tie_word_embeddings": False}, LogitTransform()),
    "gemma": ("gemma", {}, LogitTransform()),
    "gemma2 tied": ("gemma2", {"final_logit_softcapping": 3.0}, LogitTransform(cap=3.0)),
    "gemma2 untied": (
        "gemma2",
        {"final_logit_softcapping": 3.0, "tie_word_embeddings": False},
        LogitTransform(cap=3.0),
    ),
    "granite": ("granite", {"logits_scaling": 8.0}, LogitTransform(scale=0.125)),
    "cohere": ("cohere", {"logit_scale": 0.0625}, LogitTransform(scale=0.0625)),
    "phi with a bias": ("phi", {}, LogitTransform()),
}


def model_of(architecture: str, **settings: Any) -> Any:
    """In float64, with logits of several units, so that a soft cap bends them."""
    special = {"head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": None}
    model = tiny_model(
        architecture, **{name: value for name, value in (special | settings).items() if value is not None}
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.double().parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def scored(model: Any, max_logits: int | None, temperature: float = 0.7) -> tuple[CompletionLogprobs, torch.Tensor]:
    """Scores, and the gradient of a loss that is not linear in them."""
    model.zero_grad()
    scores = completion_logprobs(model, BATCH, temperature, with_entropy=True, max_logits=max_logits)
    (scores.logp_BO.exp() * scores.logp_BO).sum().backward()
    return scores, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_equal(model: Any, max_logits: int, temperature: float, exact: float) -> None:
    chunked, gradient = scored(model, max_logits, temperature)
    whole, expected = scored(model, None, temperature)
    for found, full in ((chunked.logp_BO, whole.logp_BO), (chunked.entropy_BO, whole.entropy_BO), (gradient, expected)):
        assert (found - full).norm() <= exact * full.norm()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_of_any_size_equal_full_logits_for_every_architecture(name: str, temperature: float) -> None:
    architecture, settings, transform = MODELS[name]
    model = model_of(architecture, **settings)
    assert logit_transform(model) == transform
    for rows in (1, 5):
        assert_equal(model, rows * VOCABULARY, temperature, 1e-12)
    assert_equal(model.float(), 5 * VOCABULARY, temperature, 1e-6)


@pytest.mark.claim("logits scaled or capped after the head")
def test_what_a_model_does_after_its_head_is_found_out() -> None:
    for architecture, settings, expected in MODELS.values():
        assert logit_transform(model_of(architecture, **settings).float()) == expected


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_logits", [None, 5 * VOCABULARY])
def test_float32_heads_leave_logits_exact_in_bf16(name: str, max_logits: int | None) -> None:
    """Whatever the model does after its head, with a bias and with the embedding as head: by its hidden states, in float64."""
    architecture, settings, transform = MODELS[name]
    model = model_of(architecture, **settings).float()
    keep_float32_logits(model)
    assert logit_transform(model) == transform
    head, seen = model.get_output_embeddings(), []
    head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logp_BO = completion_logprobs(model, BATCH, 0.7, max_logits=max_logits).logp_BO
    hidden_NH = seen[-1].flatten(0, 1)[BATCH.source_index_N].bfloat16().double()
    bias = 0.0 if head.bias is None else head.bias.double()
    x_NV = transform.apply_(hidden_NH @ head.weight.bfloat16().double().T + bias)
    expected_N = (x_NV / 0.7).log_softmax(-1)[torch.arange(len(hidden_NH)), BATCH.targets_N]
    assert (logp_BO[BATCH.output_mask_BO] - expected_N).abs().max() < 2e-5
    scored(model, max_logits)  # and backward runs


def test_a_head_that_is_more_than_a_product_is_refused() -> None:
    class Scaled(torch.nn.Linear):
        """May compute anything."""

    model = tiny_model()
    model.lm_head.__class__ = Scaled
    with pytest.raises(ConfigError, match="head_precision"):
        keep_float32_logits(model)


def test_few_logits_are_computed_at_once_bit_for_bit_as_ever() -> None:
    model = tiny_model()
    (few, gradient), (full, expected) = scored(model, 10_000_000), scored(model, None)
    assert few.logp_BO.equal(full.logp_BO)
    assert gradient.equal(expected)


def with_adapter() -> Any:
    """LoRA on the output head, and away from zero."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(tie_word_embeddings=False), LoraConfig(r=2, target_modules=["lm_head"])).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.5)
    return model


class Squared(torch.nn.Module):
    """Squares logits: neither a factor nor a cap."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.square()


def with_squares() -> Any:
    """A model that squares its logits behind its head."""
    model, squared = tiny_model().double(), Squared()

    def bend(_: Any, __: Any, output: Any) -> Any:
        output.logits = squared(output.logits)
        return output

    model.register_forward_hook(bend)
    return model


def with_parametrised_head() -> Any:
    """A head whose weight is computed from another at each access."""
    model = tiny_model(tie_word_embeddings=False).double()
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    return model


@pytest.mark.parametrize("make", [with_adapter, with_squares, with_parametrised_head])
def test_a_head_that_chunks_cannot_follow_is_computed_in_full(make: Any) -> None:
    model = make()
    with pytest.warns(UserWarning, match="all logits"):
        found, gradient = scored(model, VOCABULARY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, _ = scored(model, VOCABULARY)
    full, expected = scored(model, None)
    assert found.logp_BO.equal(full.logp_BO)
    assert again.logp_BO.equal(full.logp_BO)
    assert gradient.equal(expected)
    if make is with_squares:
        assert not full.logp_BO.allclose(scored(tiny_model().double(), None)[0].logp_BO)


def test_a_model_that_changes_what_follows_its_head_is_refused() -> None:
    model = model_of("gemma2", final_logit_softcapping=3.0)
    scored(model, VOCABULARY)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(RuntimeError, match=r"training\.max_logits"):
        scored(model, VOCABULARY)
    scored(model, None)
