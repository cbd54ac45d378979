"""The numbers that figures draw and captions compare: estimates with bounds, by arm, held-out set and step.

Bounds: from three seeds on the lowest and the highest seed; with fewer the 95 % intervals over questions that evaluations
record, from the lowest bound to the highest. Where there are neither, there are no bounds and nothing is concluded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Final, Literal

from flows.experiments.results import ExperimentResult, RunResult
from flows.runs.ledger import Ledger
from flows.runs.paths import Places

_SEEDS: Final = 3
"""From so many on, bounds are those of the seeds. Ours: the range of two says next to nothing."""

Bounds = Literal["seeds", "questions", "none"]
"""What bounds were made over."""
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Estimate:
    """A quantity over seeds."""

    values: tuple[float, ...]
    """One for each seed."""
    low: float
    high: float
    over: Bounds

    @property
    def mean(self) -> float:
        """Over seeds; never outside them by a rounding error."""
        return min(max(fmean(self.values), min(self.values)), max(self.values))


def estimate(values: Sequence[float], intervals: Sequence[tuple[float, float]] = ()) -> Estimate:
    """Return the estimate from one value per seed and, where there are any, as many intervals over questions."""
    if len(values) < _SEEDS and len(intervals) == len(values):
        lows, highs = zip(*intervals, strict=True)
        return Estimate(tuple(values), min(lows), max(highs), "questions")
    return Estimate(tuple(values), min(values), max(values), "seeds" if len(values) >= _SEEDS else "none")


@dataclass(frozen=True)
class Trained:
    """A run that finished."""

    run: RunResult
    curve: Mapping[int, Metrics]
    """Step -> metrics under their MLflow names."""
    ledger: Ledger | None

    @property
    def policies(self) -> frozenset[str]:
        """The policies it went through."""
        steps = self.ledger.steps.values() if self.ledger else ()
        return frozenset(step["update_policy"] for step in steps if "update_policy" in step)


@dataclass(frozen=True)
class Study:
    """What an experiment has to show."""

    result: ExperimentResult
    arms: Mapping[str, Sequence[Trained]]
    """The runs that finished, by arm in the order of the arms; arms without any are left out."""

    @cached_property
    def sets(self) -> list[str]:
        """The held-out sets that every finished run was evaluated on."""
        runs = [trained.run for trained in self._runs]
        return [name for name in (runs[0].final if runs else ()) if all(name in run.final for run in runs)]

    def measure(self, held_out: str) -> str:
        """Return the metric: accuracy of samples where every run has it, else greedy."""
        return "accuracy" if all("accuracy" in one.run.final[held_out] for one in self._runs) else "greedy_accuracy"

    @property
    def seeds(self) -> str:
        """How many seeds the arms have: `3 seeds`, `1 seed`, `2 to 3 seeds`."""
        counts = sorted({len(runs) for runs in self.arms.values()})
        return f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seed{'s' if counts[-1] > 1 else ''}"

    @property
    def baseline(self) -> str | None:
        """The arm that others are compared with, if it has finished runs."""
        wanted = self.result.experiment.baseline
        names = (arm.name for arm in self.result.arms if wanted in (arm.name, *arm.also))
        return next((name for name in names if name in self.arms), None)

    def steps(self, arm: str, held_out: str) -> list[int]:
        """Return the steps after which every finished run of the arm was evaluated."""
        key = f"eval/{held_out}/{self.measure(held_out)}"
        evaluated = [{step for step, metrics in one.curve.items() if key in metrics} for one in self.arms[arm]]
        return sorted(set.intersection(*evaluated))

    def at(self, arm: str, held_out: str, step: int) -> Estimate:
        """Return the accuracy of an arm after a step."""
        return measured([one.curve[step] for one in self.arms[arm]], f"eval/{held_out}/{self.measure(held_out)}")

    def final(self, arm: str, held_out: str) -> Estimate:
        """Return the accuracy of the final policies of an arm."""
        return measured([one.run.final[held_out] for one in self.arms[arm]], self.measure(held_out))

    def before(self, held_out: str) -> Estimate | None:
        """Return the accuracy before RL, where the arms with the same seed begin with the same figure; else None."""
        key = self.measure(held_out)
        by_seed = {one.run.seed: one.run.before.get(held_out, {}) for one in self._runs}
        same = all(one.run.before.get(held_out, {}).get(key) == by_seed[one.run.seed].get(key) for one in self._runs)
        return measured(list(by_seed.values()), key) if same and all(key in one for one in by_seed.values()) else None

    def continued(self, arm: str) -> str | None:
        """Return the longest other arm whose final policies this arm went through, seed by seed: it continues that arm."""
        mine = {one.run.seed: one.policies for one in self.arms[arm]}
        length = {name: max(one.run.steps for one in runs) for name, runs in self.arms.items()}
        found = [
            name
            for name, runs in self.arms.items()
            if length[name] < length[arm]
            and {one.run.seed for one in runs} == mine.keys()
            and all(one.run.policy in mine[one.run.seed] for one in runs)
        ]
        return max(found, key=lambda name: length[name], default=None)

    @property
    def _runs(self) -> list[Trained]:
        return [one for runs in self.arms.values() for one in runs]


def read_study(result: ExperimentResult, places: Places) -> Study:
    """Read the finished runs of an experiment, with the curves in their folders."""
    arms: dict[str, list[Trained]] = {arm.name: [] for arm in result.arms}
    for run in result.runs:
        summary = run.summary(places) if run.status == "finished" else None
        if summary and run.arm in arms:
            arms[run.arm].append(Trained(run, summary.curve, run.ledger(places)))
    return Study(result, {name: runs for name, runs in arms.items() if runs})


def measured(metrics: Sequence[Metrics], key: str) -> Estimate:
    """Return the estimate from what the evaluations of several seeds recorded under `key`, with bounds where they have some."""
    ends = (f"{key}_ci_low", f"{key}_ci_high")
    known = [one for one in metrics if all(end in one for end in ends)]
    return estimate([one[key] for one in metrics], [(one[ends[0]], one[ends[1]]) for one in known])
