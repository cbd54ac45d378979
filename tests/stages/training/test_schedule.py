"""Learning-rate factors by hand, and configs that do not fit."""

from __future__ import annotations

import pytest

from pipeline.config import ConfigError
from stages.training import TrainingConfig
from stages.training.optimizers import learning_rate_factor


def test_warm_up_rises_to_the_full_rate_in_as_many_updates_as_it_has() -> None:
    config = TrainingConfig(warmup_steps=4)
    assert [learning_rate_factor(updates, config) for updates in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_without_warm_up_the_first_update_has_the_full_rate() -> None:
    assert learning_rate_factor(0, TrainingConfig()) == 1.0


def test_the_linear_schedule_falls_to_zero_at_its_end() -> None:
    config = TrainingConfig(warmup_steps=2, schedule="linear", total_steps=6)
    assert [learning_rate_factor(u, config) for u in range(8)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "linear"}, "total_steps"),
        ({"optimizer": {"kind": "muon"}, "engine": {"kind": "deepspeed", "zero_stage": 2}}, "zero_stage 0"),
        ({"engine": {"kind": "deepspeed", "zero_stage": 4}}, "zero_stage"),
        ({"max_gradient_norm": 1.0}, "max_grad_norm"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_what_to_change(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingConfig.parse(changes)
