"""Which parameters an optimizer updates and how far, its schedule, and what becomes of its state between stage calls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeline.config import ConfigError
from pipeline.store import Store
from stages.models import OPTIMIZER, WEIGHTS, Checkpoint, load_optimizer_state, load_trainer_state
from stages.training import AdamWConfig, MuonConfig, TrainingConfig
from stages.training.engine import GradientError, check_skipped
from stages.training.loop import publish, resident_engine
from stages.training.optimizers import (
    build_optimizer,
    learning_rate_factor,
    matrix_names,
    optimizer_state,
    set_learning_rate,
)
from stages.training.torch_engine import TorchEngine
from tests.stages.training.tiny import accumulate, random_rows, tiny_checkpoint, tiny_model, update
from tests.stages.update.exact import Rank, in_lockstep


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
    optimizer = build_optimizer(model, MuonConfig(learning_rate=3e-3, rest=AdamWConfig(learning_rate=1e-3)))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer_state(model, optimizer)
    assert "model.layers.1.mlp.up_proj.weight/momentum_buffer" in state
    assert state["model.norm.weight/step"].item() == 1
    assert {key.rsplit("/", 1)[1] for key in state} == {"momentum_buffer", "step", "exp_avg", "exp_avg_sq"}
    # Every group keeps its own rate under one factor.
    assert [set_learning_rate(optimizer, factor) for factor in (0.5, 0.1)] == pytest.approx([1.5e-3, 3e-4])
    assert optimizer.param_groups[1]["lr"] == pytest.approx(1e-4)


@pytest.mark.claim("weight decay on norms and biases")
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
    assert {name.rsplit(".", 1)[-1] for name in before} == {"weight", "bias"}
    factors = torch.nn.ParameterList([torch.ones(4, 2), torch.ones(2, 4)])  # an adapter's, all of which decay
    groups = build_optimizer(factors, AdamWConfig(weight_decay=0.1)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1]


@pytest.mark.claim("a schedule that decays by default")
@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({"warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        ({}, [1.0, 1.0]),
        ({"warmup_steps": 2, "schedule": "linear", "total_steps": 6}, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
    ],
)
def test_warm_up_rises_to_the_full_rate_in_as_many_updates_as_it_has(settings: Any, factors: list[float]) -> None:
    """And the linear schedule then falls to zero at its end."""
    assert [learning_rate_factor(updates, TrainingConfig(**settings)) for updates in range(len(factors))] == factors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "linear"}, "total_steps"),
        ({"optimizer": {"kind": "muon"}, "engine": {"kind": "deepspeed", "zero_stage": 2}}, "zero_stage 0"),
        ({"engine": {"kind": "deepspeed", "zero_stage": 4}}, "zero_stage"),
        ({"max_gradient_norm": 1.0}, "max_grad_norm"),
        ({"optimizer": {"kind": "adamw", "decayed": "all"}}, "decayed"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_what_to_change(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingConfig.parse(changes)


ROWS = random_rows(6)


def config(**changes: Any) -> TrainingConfig:
    adamw = AdamWConfig(learning_rate=1e-2)
    return TrainingConfig(**({"optimizer": adamw, "precision": "fp32", "warmup_steps": 4} | changes))


def slots(checkpoint: Checkpoint) -> set[str]:
    """The kinds of moments that a checkpoint has."""
    return {key.rsplit("/", 1)[1] for key in load_optimizer_state(checkpoint)}


@pytest.mark.claim("optimizer state lost or kept by accident")
def test_state_of_another_optimizer_is_refused_unless_reset(store: Store) -> None:
    engine = TorchEngine(tiny_checkpoint(), config())
    update(engine, ROWS)
    trained = publish(engine)
    with pytest.raises(ValueError, match=r"adamw, .* muon; .*optimizer_state=reset_once"):
        TorchEngine(trained, config(optimizer=MuonConfig()))
    muon = config(optimizer=MuonConfig(learning_rate=1e-2), optimizer_state="reset_once")
    fresh = TorchEngine(trained, muon)
    assert update(fresh, ROWS).learning_rate == pytest.approx(0.005)  # the second of four updates of warm-up
    assert slots(publish(fresh)) == {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}


def after(start: Checkpoint, how: TrainingConfig, calls: int) -> list[Checkpoint]:
    """What so many stage calls of one update each publish."""
    made = [start]
    for _ in range(calls):
        engine = TorchEngine(made[-1], how)
        update(engine, ROWS)
        made.append(publish(engine))
    return made[1:]


def moments(checkpoint: Checkpoint) -> float:
    """Updates that the moments of a checkpoint have seen."""
    seen = {float(value) for key, value in load_optimizer_state(checkpoint).items() if key.endswith("/step")}
    assert len(seen) == 1
    return seen.pop()


def test_reset_once_begins_anew_at_foreign_moments_and_then_carries(store: Store) -> None:
    carried = after(tiny_checkpoint(), config(), 2)[-1]
    assert moments(carried) == 2
    reset = after(carried, config(optimizer_state="reset_once"), 2)
    assert [moments(checkpoint) for checkpoint in reset] == [1, 2]
    assert [load_trainer_state(checkpoint)["updates"] for checkpoint in reset] == [3, 4]


def test_reset_once_is_carry_where_there_is_nothing_to_reset(store: Store) -> None:
    carried, reset = (
        after(tiny_checkpoint(), config(optimizer_state=state), 3)[-1] for state in ("carry", "reset_once")
    )
    for file in (OPTIMIZER, WEIGHTS):
        assert (carried.path / file).read_bytes() == (reset.path / file).read_bytes()


@pytest.mark.claim("optimizer state lost or kept by accident")
def test_none_forgets_moments_keeps_counters_and_writes_no_state(store: Store) -> None:
    made = after(tiny_checkpoint(), config(optimizer_state="none"), 3)
    assert [load_trainer_state(checkpoint) for checkpoint in made] == [
        {"skipped": 0, "updates": updates} for updates in (1, 2, 3)
    ]
    assert not any((checkpoint.path / OPTIMIZER).exists() for checkpoint in made)
    # Warm-up goes on: the fourth of four updates has the whole rate.
    assert update(TorchEngine(made[-1], config(optimizer_state="none")), ROWS).learning_rate == pytest.approx(0.01)
    # And `carry` takes up a checkpoint without moments.
    carried = after(made[-1], config(), 1)[-1]
    assert (moments(carried), load_trainer_state(carried)["updates"]) == (1, 4)


def test_none_in_a_resident_engine_is_none_in_a_fresh_one(store: Store) -> None:
    start, how = tiny_checkpoint(), config(optimizer_state="none")
    resident_ones = [start]
    for _ in range(3):
        engine = resident_engine(resident_ones[-1], how)
        update(engine, ROWS)
        resident_ones.append(publish(engine))
    assert resident_ones[1:] == after(start, how, 3)


def broken(engine: TorchEngine, how: str) -> None:
    """A step whose gradient is not finite, for one of the causes."""
    if how == "weights":
        with torch.no_grad():
            next(engine.model.parameters())[0] = math.nan
    accumulate(engine, ROWS)
    if how == "loss":
        engine.backward(engine.model.lm_head.weight.sum() * math.nan, last=True)
    if how == "gradient":
        engine.model.lm_head.weight.grad[0, 0] = math.inf
    engine.step()


@pytest.mark.claim("a run that skips every step")
@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("weights", r"weights .*\(model.embed_tokens.weight\)"),
        ("loss", "the loss of 1 micro-batches"),
        ("gradient", r"the gradient of .*weight"),
    ],
)
def test_repeated_gradients_that_are_not_finite_stop_and_say_why(store: Store, how: str, cause: str) -> None:
    engine = TorchEngine(tiny_checkpoint(), config(max_skipped_steps=2))
    for _ in range(2):
        broken(engine, how)
    with pytest.raises(GradientError, match=rf"^3 steps .*max_skipped_steps=2.*{cause}"):
        broken(engine, how)


def test_skipped_steps_count_across_stage_calls_and_an_update_clears_them(store: Store) -> None:
    how = config(max_skipped_steps=2)
    start = tiny_checkpoint()
    for _ in range(2):
        engine = TorchEngine(start, how)
        broken(engine, "gradient")
        start = publish(engine)
    assert load_trainer_state(start)["skipped_in_a_row"] == 2
    with pytest.raises(GradientError):
        broken(TorchEngine(start, how), "gradient")
    broken(TorchEngine(start, config(max_skipped_steps=None)), "gradient")
    engine = TorchEngine(start, how)
    update(engine, ROWS)
    for _ in range(2):
        broken(engine, "gradient")
    assert load_trainer_state(publish(engine)) == {
        "optimizer": "adamw",
        "skipped": 4,
        "skipped_in_a_row": 2,
        "updates": 1,
    }


@pytest.mark.parametrize("lost", [0, 1])
def test_all_ranks_stop_together_and_name_one_cause(lost: int) -> None:
    """The loss of one rank is not finite: the other, whose own is, must not name another cause, nor go on."""

    def stop(rank: Rank) -> str:
        loss = torch.tensor(math.nan if rank.rank == lost else 1.0)
        check_skipped(rank, 1, 1, [loss], "")  # as many as may be
        with pytest.raises(GradientError) as caught:
            check_skipped(rank, 2, 1, [loss], "")
        return str(caught.value)

    first, second = in_lockstep(2, stop)
    assert first == second
    assert "the loss of 1 micro-batches is not finite" in first
