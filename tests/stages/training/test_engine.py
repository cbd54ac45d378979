"""Recomputed activations: the same gradients, bit for bit, from less that is kept."""

from __future__ import annotations

import pytest
import torch

from stages.training.batching import collate
from stages.training.engine import checkpoint_activations
from stages.training.forward import completion_logprobs
from tests.stages.training.tiny import random_rows, tiny_model

BATCH = collate(random_rows(5), range(5))


def kept_and_gradient(model: torch.nn.Module) -> tuple[int, torch.Tensor]:
    """Bytes kept for backward inside the model's layers and elsewhere, parameters left out, and the gradient."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = completion_logprobs(model, BATCH).logp_BO.sum()
    size = sum(kept.values())
    loss.backward()
    return size, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_bit_for_bit_those_of_kept_activations(reentrant: bool) -> None:
    plain, frugal = tiny_model(), tiny_model()
    checkpoint_activations(frugal, reentrant=reentrant)
    (much, expected), (little, found) = kept_and_gradient(plain), kept_and_gradient(frugal)
    assert found.equal(expected)
    assert little < 0.3 * much


@pytest.mark.claim("checkpointing that brings dropout")
def test_dropout_stays_off() -> None:
    plain, frugal = tiny_model(), tiny_model(attention_dropout=0.5)
    checkpoint_activations(frugal)
    assert kept_and_gradient(frugal)[1].equal(kept_and_gradient(plain)[1])


def test_without_gradient_nothing_is_computed_twice() -> None:
    model, calls = tiny_model(), []
    checkpoint_activations(model)
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        completion_logprobs(model, BATCH)
    assert len(calls) == 1
    completion_logprobs(model, BATCH).logp_BO.sum().backward()
    assert len(calls) == 3


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear"):
        checkpoint_activations(torch.nn.Linear(2, 2))
