"""What becomes of moments and counters between stage calls, and when skipped steps stop a training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeline.store import Store
from stages.models import OPTIMIZER, WEIGHTS, Checkpoint, load_optimizer_state, load_trainer_state
from stages.training import AdamWConfig, MuonConfig, TrainingConfig
from stages.training.engine import GradientError, check_skipped
from stages.training.loop import publish, resident_engine
from stages.training.torch_engine import TorchEngine
from tests.stages.training.tiny import accumulate, random_rows, tiny_checkpoint, update
from tests.stages.update.exact import Rank, in_lockstep

ROWS = random_rows(6)


def config(**changes: Any) -> TrainingConfig:
    adamw = AdamWConfig(learning_rate=1e-2)
    return TrainingConfig(**({"optimizer": adamw, "precision": "fp32", "warmup_steps": 4} | changes))


def slots(checkpoint: Checkpoint) -> set[str]:
    """The kinds of moments that a checkpoint has."""
    return {key.rsplit("/", 1)[1] for key in load_optimizer_state(checkpoint)}


def test_state_of_another_optimizer_is_refused_unless_reset(store: Store) -> None:
    engine = TorchEngine(tiny_checkpoint(), config())
    update(engine, ROWS)
    trained = publish(engine)
    with pytest.raises(ValueError, match=r"state of adamw, the config asks for muon; set .*optimizer_state=reset_once"):
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


def test_none_forgets_moments_keeps_counters_and_writes_no_state(store: Store) -> None:
    made = after(tiny_checkpoint(), config(optimizer_state="none"), 3)
    assert [load_trainer_state(checkpoint) for checkpoint in made] == [
        {"skipped": 0, "updates": updates} for updates in (1, 2, 3)
    ]
    assert not any((checkpoint.path / OPTIMIZER).exists() for checkpoint in made)
    # Warm-up goes on: the fourth of four updates has the whole rate.
    assert update(TorchEngine(made[-1], config(optimizer_state="none")), ROWS).learning_rate == pytest.approx(0.01)


def test_none_in_a_resident_engine_is_none_in_a_fresh_one(store: Store) -> None:
    start, how = tiny_checkpoint(), config(optimizer_state="none")
    resident_ones = [start]
    for _ in range(3):
        engine = resident_engine(resident_ones[-1], how)
        update(engine, ROWS)
        resident_ones.append(publish(engine))
    assert resident_ones[1:] == after(start, how, 3)


def test_carry_takes_up_a_checkpoint_without_moments(store: Store) -> None:
    none = after(tiny_checkpoint(), config(optimizer_state="none"), 2)[-1]
    carried = after(none, config(), 1)[-1]
    assert (moments(carried), load_trainer_state(carried)["updates"]) == (1, 3)


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


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("weights", r"weights are not finite \(model.embed_tokens.weight\); go on from an earlier checkpoint"),
        ("loss", "the loss of 1 micro-batches is not finite"),
        ("gradient", r"the loss is finite and the gradient of .*weight is not; lower the learning rate"),
    ],
)
def test_repeated_gradients_that_are_not_finite_stop_and_say_why(store: Store, how: str, cause: str) -> None:
    engine = TorchEngine(tiny_checkpoint(), config(max_skipped_steps=2))
    for _ in range(2):
        broken(engine, how)
    with pytest.raises(GradientError, match=rf"3 steps in a row were skipped.*max_skipped_steps=2\): {cause}"):
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
    """The loss of one rank alone is not finite: the other, whose own is, must not name another cause, nor go on."""

    def stop(rank: Rank) -> str:
        loss = torch.tensor(math.nan if rank.rank == lost else 1.0)
        check_skipped(rank, 1, 1, [loss], "")  # as many as may be
        with pytest.raises(GradientError) as caught:
            check_skipped(rank, 2, 1, [loss], "")
        return str(caught.value)

    first, second = in_lockstep(2, stop)
    assert first == second
    assert "the loss of 1 micro-batches is not finite" in first
