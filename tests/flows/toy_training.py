"""Algorithm 1 with stages of the real names and arguments that take no time: what is kept and freed does not depend on tensors.

Every stage reads what it is given, so that a payload freed too early fails as it would in a real run; an update needs weights
and optimizer state of its policy, a rollout the weights.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from flows.runs.ledger import Ledger
from flows.runs.retention import KeepConfig, Retention
from pipeline.artifact import Table
from pipeline.events import EvaluationDone, Event, StageDone, StepDone, ahead_of_its_part, count_calls, emit, recording
from pipeline.stage import stage
from pipeline.store import Store, use_store
from stages.models import OPTIMIZER, TRAINER, WEIGHTS, Checkpoint

ALL = KeepConfig(checkpoints=None, optimizer=None)
WEIGHT_BYTES, STATE_BYTES = 400, 800


class Rows(Table):
    schema = pa.schema([pa.field("text", pa.string(), nullable=False)])


def content(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def rows(*parts: object) -> Rows:
    return Rows.write([{"text": content(*parts) * 3}])


def checkpoint(*parts: object, trained: bool) -> Checkpoint:
    def fill(folder: Path) -> None:
        (folder / WEIGHTS).write_text((content(*parts) * 10)[:WEIGHT_BYTES])
        if trained:
            (folder / TRAINER).write_text('{"updates": 1}')
            (folder / OPTIMIZER).write_text((content("state", *parts) * 20)[:STATE_BYTES])

    return Checkpoint.derived(Checkpoint.write_derived(fill)) if trained else Checkpoint.write(fill)


def weights(policy: Checkpoint) -> str:
    return (policy.path / WEIGHTS).read_text()


@stage(version="1")
def create_policy(seed: int) -> Checkpoint:
    return checkpoint("initial", seed, trained=False)


@stage(version="1")
def rollout(policy: Checkpoint, *, seed: int) -> Rows:
    return rows(weights(policy), seed)


@stage(version="1")
def score(outputs: Rows) -> Rows:
    return rows("rewards", outputs.rows())


@stage(version="1")
def estimate_advantages(rewards: Rows, outputs: Rows) -> Rows:
    return rows("advantages", rewards.rows(), outputs.rows())


@stage(version="1")
def update_policy(policy: Checkpoint, reference: Checkpoint, outputs: Rows, advantages: Rows) -> Checkpoint:
    state = ""
    if (policy.path / TRAINER).exists():
        from stages.models import load_trainer_state

        assert load_trainer_state(policy)["updates"]
        state = optimizer_of(policy)
    return checkpoint(weights(policy), weights(reference), state, outputs.rows(), advantages.rows(), trained=True)


@stage(version="1")
def evaluate(outputs: Rows, rewards: Rows) -> Rows:
    return rows("evaluation", outputs.rows(), rewards.rows())


def optimizer_of(policy: Checkpoint) -> str:
    file = policy.path / OPTIMIZER
    if not file.exists():
        from stages.models import load_optimizer_state

        load_optimizer_state(policy)  # says that it was pruned
    return file.read_text()


@dataclass
class Toy:
    """What a run of the toy did."""

    policy: str = ""
    policies: list[str] = field(default_factory=list)
    """After each step."""
    executed: Counter[str] = field(default_factory=Counter)
    ledger: Ledger = field(default_factory=Ledger)
    retention: Retention | None = None

    def take(self, event: Event) -> None:
        if isinstance(event, StageDone) and not event.cached:
            self.executed[event.stage] += 1


def train(
    store: Store,
    keep: KeepConfig = ALL,
    *,
    iterations: int = 1,
    steps: int = 6,
    every: int = 0,
    seed: int = 0,
    offline: bool = False,
    overlap: bool = False,
    spared: Collection[str] = (),
    lease: str = "toy",
) -> Toy:
    """Train, keeping what `keep` says; evaluate before the first step, every `every` steps and after the last.

    Args:
        overlap: learn from outputs of the policy before the last update.
    """
    run = Toy()
    run.retention = Retention(store, keep, iteration_steps=steps, spared=lambda: spared)
    with (
        store.pins.open(lease),
        use_store(store),
        recording(run.take, run.ledger.take, run.retention.take),
    ):
        policy = initial = create_policy(seed)
        judge(policy, 0)
        for iteration in range(iterations):
            reference, ahead = policy, None
            for step in range(iteration * steps, (iteration + 1) * steps):
                if ahead is None:
                    outputs = rollout(initial if offline else policy, seed=step)
                else:
                    outputs, calls = ahead
                    count_calls(calls)
                advantages = estimate_advantages(score(outputs), outputs)
                if overlap and (step + 1) % steps:
                    with ahead_of_its_part() as keys:
                        ahead = rollout(policy, seed=step + 1), keys
                policy = update_policy(policy, reference, outputs, advantages)
                run.policies.append(policy.digest)
                emit(StepDone(step + 1, iteration, {}))
                if step + 1 == iterations * steps or (every and (step + 1) % every == 0):
                    judge(policy, step + 1)
    run.policy = policy.digest
    return run


def judge(policy: Checkpoint, step: int) -> None:
    outputs = rollout(policy, seed=10**6)
    evaluate(outputs, score(outputs))
    emit(EvaluationDone(step, "held_out", "greedy", {}))


def kept(store: Store, digest: str) -> str:
    """What is left of an artifact: `all`, `weights` (its optimizer state is gone), or `nothing`."""
    names = {file["name"] for file in store.manifest(digest)["files"]}
    there = {name for name in names if (store.folder(digest) / name).exists()}
    if there == names:
        return "all"
    return "weights" if there == names - {OPTIMIZER} else "nothing" if not there else f"only {sorted(there)}"
