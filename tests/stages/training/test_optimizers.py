"""Muon: which parameters it takes, and that its step is the library's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stages.training.config import AdamWConfig, MuonConfig
from stages.training.optimizers import build_optimizer, matrix_names, optimizer_state, set_learning_rate
from tests.stages.training.tiny import tiny_model


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_are_those_of_the_layers_and_neither_embedding_nor_head(tied: bool) -> None:
    names = matrix_names(tiny_model(tie_word_embeddings=tied))
    parts = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-2] for name in names} == parts
    assert len(names) == 2 * len(parts)
    assert all(name.endswith(".weight") for name in names)


def test_muon_moves_matrices_as_the_library_does_and_the_rest_as_adamw() -> None:
    ours, theirs = tiny_model(), tiny_model()
    names = matrix_names(ours)
    config = MuonConfig(learning_rate=1e-2, weight_decay=0.1, rest=AdamWConfig(learning_rate=1e-3))
    optimizer = build_optimizer(ours, config)
    split: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter in theirs.named_parameters():
        split[name in names].append(parameter)
    muon = torch.optim.Muon(split[True], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(split[False], lr=1e-3, weight_decay=0.0)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        optimizer.step()
        muon.step()
        adamw.step()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        moved = (mine - before[name]).norm()
        # The library orthogonalises in bfloat16, we in float32: about 1 %.
        assert (mine - other).norm() < (0.03 if name in names else 1e-5) * moved, name


def test_state_is_named_by_parameter_and_slot() -> None:
    model = tiny_model()
    optimizer = build_optimizer(model, MuonConfig())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer_state(model, optimizer)
    assert "model.layers.1.mlp.up_proj.weight/momentum_buffer" in state
    assert state["model.norm.weight/step"].item() == 1
    assert {key.rsplit("/", 1)[1] for key in state} == {"momentum_buffer", "step", "exp_avg", "exp_avg_sq"}


def test_every_group_keeps_its_own_rate_under_one_factor() -> None:
    optimizer = build_optimizer(tiny_model(), MuonConfig(learning_rate=3e-3, rest=AdamWConfig(learning_rate=1e-3)))
    assert set_learning_rate(optimizer, 0.5) == pytest.approx(1.5e-3)
    assert set_learning_rate(optimizer, 0.1) == pytest.approx(3e-4)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("decayed", "spared"), [("matrices", {"norm", "bias"}), ("all", set())], ids=["matrices", "all"]
)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weight_decay_spares_norms_and_biases_unless_asked(kind: str, decayed: Any, spared: set[str]) -> None:
    """Without a gradient AdamW moves nothing but by its decay: w (1 - learning rate * decay)."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
            parameter.grad = torch.zeros_like(parameter)
    adamw = AdamWConfig(learning_rate=0.5, weight_decay=0.2, decayed=decayed)
    optimizer = build_optimizer(model, adamw if kind == "adamw" else MuonConfig(rest=adamw))
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    set_learning_rate(optimizer, 1.0)
    optimizer.step()
    muon = matrix_names(model) if kind == "muon" else set()
    for name, tensor in model.named_parameters():
        kept = name in muon or any(part in name for part in spared)
        assert tensor.detach().allclose(before[name] * (1.0 if kept else 0.9)), name
    assert any("norm" in name for name in before)
    assert any(name.endswith("bias") for name in before)


def test_an_adapter_decays_and_has_one_group() -> None:
    factors = torch.nn.ParameterList([torch.ones(4, 2), torch.ones(2, 4)])
    optimizer = build_optimizer(factors, AdamWConfig(weight_decay=0.1))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]


def test_what_decays_cannot_be_chosen_where_nothing_does() -> None:
    with pytest.raises(ValueError, match="decayed: without weight_decay nothing decays"):
        AdamWConfig(decayed="all")
