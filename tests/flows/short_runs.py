"""Whole runs for the tests: a step or two of the smallest recipe, by any method, and what they did.

Chains of two numbers and enough supervised steps, so that some answers are right and the rewards are the real ones.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flows.config import IterativeRLConfig
from flows.config.methods import method_settings
from flows.config.recipes import arithmetic_smoke
from flows.iterative_rl import iterative_rl
from flows.runs.curve import Points
from pipeline.events import Event, StageDone, recording
from pipeline.store import Store, use_store

SHORT = {"shortest": 2, "longest": 2}
LEARNING: dict[str, Any] = {
    "data.demonstrations.chains": {"count": 2000, **SHORT},
    "data.train": {"count": 48, **SHORT},
    "sft.max_steps": 300,
    "reward.components": [{"kind": "accuracy", "verifier": "exact"}],
    "iterations": 1,
    "questions_per_step": 6,
    "rollout.max_output_tokens": 16,
}
"""Changes of the smallest recipe under which a policy learns."""
BASE = arithmetic_smoke().override(
    LEARNING | {"evaluation": {"every": 0, "samples": 0, "greedy": False, "estimates": {"ks": [1]}}}
)


def options(settings: Iterable[str]) -> list[str]:
    """Return settings as options of a command."""
    return [part for setting in settings for part in ("--set", setting)]


def smoke(root: Path, *settings: str) -> list[str]:
    """Return the command that trains the smallest recipe under `root`, without Prefect."""
    return ["run", "arithmetic_smoke", *options(settings), "--engine", "inline", "--root", str(root)]


@dataclass
class Run:
    """What a run did: every stage call in order, which of them were computed, and the metrics by step."""

    store: Store
    digest: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    """Name and key."""
    executed: Counter[str] = field(default_factory=Counter)
    points: dict[int, dict[str, float]] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        if isinstance(event, StageDone):
            self.calls.append((event.stage, event.key))
            self.executed[event.stage] += not event.cached

    def of(self, stage: str) -> list[dict[str, Any]]:
        """The records of a stage's calls, in order."""
        records = [self.store.find(key) for name, key in self.calls if name == stage]
        return [record for record in records if record is not None]

    def given(self, stage: str, parameter: str) -> list[str]:
        """The digests that a stage's calls were given."""
        return [record["arguments"][parameter]["artifact"] for record in self.of(stage)]

    def made(self, stage: str) -> list[str]:
        """The digests that a stage's calls returned."""
        return [record["result"] for record in self.of(stage)]

    @property
    def content(self) -> str:
        """The content of the final policy, whose name says only what it was derived from."""
        return str(self.store.manifest(self.digest)["digest"])

    @property
    def supervised(self) -> str:
        """The policy that RL starts from."""
        return self.made("supervised_finetuning")[0]


def whole_method(method: str, base: IterativeRLConfig) -> dict[str, Any]:
    """The method's settings, with a teacher where it needs one and the base names none."""
    missing = method == "distillation" and base.teacher is None
    return method_settings(method, base) | ({"teacher": {"path": "teacher"}} if missing else {})


def train(store: Store, method: str, *, run: Run | None = None, **changes: Any) -> Run:
    """Train as a method does; `run` is filled in place, also where the training fails."""
    config = BASE.override(whole_method(method, BASE) | {"steps": 2} | changes)
    run = run or Run(store)
    points = Points()
    points.by_step = run.points
    with use_store(store), recording(run.take, points.take):
        run.digest = iterative_rl(config).digest
    return run


def executed_by(config: IterativeRLConfig) -> tuple[str, list[str]]:
    """Run in the current store: the content of the final policy, and the names of the stages that were executed."""
    executed: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, StageDone) and not event.cached:
            executed.append(event.stage)

    with recording(note):
        content = iterative_rl(config).content
    return content, executed


def copied(store: Store, folders: pytest.TempPathFactory) -> Store:
    """Another store that holds the same."""
    root = folders.mktemp("store")
    shutil.copytree(store.root, root, dirs_exist_ok=True)
    return Store(root)
