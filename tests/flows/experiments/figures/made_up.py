"""Experiments whose results are made up: runs as folders, with the numbers that a test wants."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.experiments.results import ArmResult, ExperimentResult, RunResult, Sharing
from flows.runs.ledger import EvaluationCalls
from flows.runs.paths import Places
from flows.runs.summary import Summary
from pipeline.experiment import Experiment
from pipeline.store import Store, use_store
from stages.reward import AccuracyConfig, RewardConfig, count_votes
from stages.tables import Rewards
from tests.flows.logs import write_log

Metrics = Mapping[str, float]


@dataclass
class MadeUp:
    """One run: held-out set -> step -> its metrics, and what else a test is about."""

    arm: str
    seed: int
    sets: Mapping[str, Mapping[int, Metrics]]
    extra: Mapping[int, Metrics] = field(default_factory=dict)
    """Metrics besides those of the evaluations, by step."""
    policies: Sequence[str] = ()
    """After each step."""
    samples: Mapping[int, str] = field(default_factory=dict)
    """Step -> digest of the votes of the samples on the first set."""

    def curve(self) -> dict[int, dict[str, float]]:
        points: dict[int, dict[str, float]] = {step: dict(metrics) for step, metrics in self.extra.items()}
        for name, steps in self.sets.items():
            for step, metrics in steps.items():
                points.setdefault(step, {}).update({f"eval/{name}/{key}": value for key, value in metrics.items()})
        return points


def accuracy(value: float, reach: float | None = None) -> dict[str, float]:
    """The metrics of an evaluation, with the interval `value -+ reach` where there is one."""
    ends = {} if reach is None else {"accuracy_ci_low": value - reach, "accuracy_ci_high": value + reach}
    return {"accuracy": value} | ends


def curves(arms: Mapping[str, Sequence[Sequence[float]]], every: int = 2) -> list[MadeUp]:
    """Runs from arm -> seed -> accuracy at each evaluation."""
    return [
        MadeUp(arm, seed, {"in_domain": {every * n: accuracy(value, 0.05) for n, value in enumerate(values)}})
        for arm, seeds in arms.items()
        for seed, values in enumerate(seeds)
    ]


def experiment(root: Path, runs: Sequence[MadeUp], *, name: str = "made-up") -> tuple[ExperimentResult, Places]:
    """The runs as those of an experiment, written as `cohort ablate` leaves them."""
    places = Places(root)
    arms = list(dict.fromkeys(run.arm for run in runs))
    result = ExperimentResult(
        experiment=Experiment(
            name=name,
            asks="Which?",
            base="arithmetic_smoke",
            arms={arm: {} for arm in arms},
            baseline=arms[0],
            seeds=tuple(dict.fromkeys(run.seed for run in runs)),
        ),
        tracked_in=name,
        command="cohort ablate",
        arms=tuple(ArmResult(name=arm, also=(), differences={}) for arm in arms),
        runs=tuple(_run(places, run) for run in runs),
        sharing=Sharing(runs=len(runs), asked=0, distinct=0, seconds_apart=0.0, seconds_together=0.0),
    )
    return result, places


def _run(places: Places, run: MadeUp) -> RunResult:
    name = f"{run.arm}-s{run.seed}"
    steps = max(step for points in run.sets.values() for step in points)
    before = {held_out: dict(points[min(points)]) for held_out, points in run.sets.items()}
    after = {held_out: dict(points[max(points)]) for held_out, points in run.sets.items()}
    policy = run.policies[-1] if run.policies else name
    folder = places.runs / name
    folder.mkdir(parents=True)
    nothing: dict[str, Any] = {"best": {}, "cost": {}, "time": {}, "seconds": 0.0, "server_seconds": 0.0, "paths": {}}
    summary = Summary(name=name, steps=steps, before=before, after=after, curve=run.curve(), policy=policy, **nothing)
    (folder / "summary.json").write_text(json.dumps(summary.as_json()))
    first = next(iter(run.sets))
    write_log(
        folder,
        steps={step: {"update_policy": digest} for step, digest in enumerate(run.policies, 1)},
        evaluations=[
            EvaluationCalls(step, first, "sampled", {"count_votes": made}) for step, made in run.samples.items()
        ],
    )
    return RunResult(
        arm=run.arm, seed=run.seed, name=name, folder=name, status="finished", error="", steps=steps, policy=policy,
        before=before, final=after, best={}, cost={},
    )  # fmt: skip


def scored(answers: Mapping[str, Sequence[str | None]]) -> Rewards:
    """A table of rewards: question -> the answer of each sample, `ok` for a right one, None for none."""
    rows = [
        {
            "question_id": question,
            "sample": sample,
            "reward": float(answer == "ok"),
            "status": "ok" if answer == "ok" else "unparseable" if answer is None else "wrong",
            "extracted": answer,
            "components": [],
            "step_rewards": None,
            "step_ends": None,
            "scorer": None,
        }
        for question, given in answers.items()
        for sample, answer in enumerate(given)
    ]
    return Rewards.write(rows)


def voted(places: Places, answers: Mapping[str, Sequence[str | None]]) -> str:
    """The digest of the votes of such rewards."""
    config = RewardConfig(components=(AccuracyConfig(verifier="exact"),))
    with use_store(Store(places.store)):
        return count_votes(scored(answers), config).digest
