from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.config.resolve import choose
from flows.planning.plan import Plan, plan_of
from flows.planning.request import Request, subject_of
from flows.planning.shapes import KNOWN_SHAPES, ModelShape
from flows.runs.paths import Places
from stages.training import TrainingConfig

Planned = Callable[..., Plan]
SHAPE = ModelShape("small", 2, 3, 2, 1, 1, 2, 10, tied=False)
"""Layers of 4 x 4 + 18 = 34 numbers in matrices and 4 of norms; an embedding of 20, and a head of 20."""
SEVEN_B = KNOWN_SHAPES["deepseek-math-7b"]


def config(**settings: object) -> TrainingConfig:
    return TrainingConfig.model_validate({"precision": "fp32", **settings})


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    """The plan of a recipe on an empty root."""

    def plan(recipe: str, *settings: str, **request: Any) -> Plan:
        config = choose(recipe, settings=settings).config
        return plan_of(subject_of(config, Places(tmp_path), Request(**request)).given)

    return plan


def one(plan: Plan, name: str) -> Any:
    return next(stage for stage in plan.stages if stage.name == name)
