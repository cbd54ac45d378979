from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.config.resolve import choose
from flows.planning.plan import Plan, plan_of
from flows.planning.request import Request, subject_of
from flows.runs.paths import Places

Planned = Callable[..., Plan]


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    """The plan of a recipe on an empty root."""

    def plan(recipe: str, *settings: str, **request: Any) -> Plan:
        config = choose(recipe, settings=settings).config
        return plan_of(subject_of(config, Places(tmp_path), Request(**request)).given)

    return plan


def one(plan: Plan, name: str) -> Any:
    return next(stage for stage in plan.stages if stage.name == name)
