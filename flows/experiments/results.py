"""What an experiment came to, as `runs/<experiment>/experiment.json`: the seam between running arms and drawing them.

`ExperimentResult` documents the fields. Curves, costs and artifacts are in the folders of the runs: `RunResult.summary` has the
metrics by step, `RunResult.ledger` the digests of every step and evaluation, which `pipeline.store` opens.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from flows.experiments.arms import Arm, PlannedExperiment
from flows.runs.ledger import Ledger, read_ledger
from flows.runs.paths import Places
from flows.runs.record import RunRecord, read_record, run_folder, write_json
from flows.runs.summary import Summary
from pipeline.config import Config
from pipeline.experiment import Experiment
from pipeline.store import StoreError, canonical_json, sha256_of

_FILE: Final = "experiment.json"


class ArmResult(Config):
    """An arm."""

    name: str
    "Its name; runs have it as `arm`."
    also: tuple[str, ...]
    "Further names: arms that came to the same configuration."
    differences: dict[str, tuple[Any, Any]]
    "Dotted key -> value in the baseline arm, value here. None: not there in the baseline; `...`: a section there."

    @property
    def label(self) -> str:
        """All its names."""
        return " = ".join([self.name, *self.also])


class RunResult(Config):
    """One arm with one seed."""

    arm: str
    "Name of the arm."
    seed: int
    "Its seed."
    name: str
    "Name of the run, in `cohort runs` and in MLflow."
    folder: str
    "Name of its folder under runs/, which is its key in MLflow (`cohort.run_key`), too."
    status: Literal["finished", "failed", "interrupted", "killed", "running", "not run"]
    "What became of it. Figures are there of runs that finished."
    error: str
    "Why it failed."
    steps: int
    "Steps done."
    policy: str
    "Digest of the final policy."
    before: dict[str, dict[str, float]]
    "Held-out set -> metrics of the policy before RL: `greedy_accuracy`, `accuracy`, `pass_at_8`, `maj_at_8`, `..._ci_low`, ..."
    final: dict[str, dict[str, float]]
    "The same of the final policy."
    best: dict[str, tuple[int, float]]
    "Held-out set -> step and accuracy of the best evaluation (of samples where there are any, else greedy)."
    cost: dict[str, float]
    "What training took: see `flows.runs.summary.training_cost`."

    def summary(self, places: Places) -> Summary | None:
        """Read everything of the run; `curve` has its metrics by step."""
        return read_summary(places.runs / self.folder)

    def ledger(self, places: Places) -> Ledger | None:
        """Read the artifacts of its steps and evaluations."""
        return read_ledger(places.runs / self.folder)


class Sharing(Config):
    """What computing equal stage calls once saves, from what they took when they were computed."""

    runs: int
    "Runs that are counted: those that finished."
    asked: int
    "Different stage calls of each run, added up."
    distinct: int
    "Different stage calls of all runs."
    seconds_apart: float
    "What `asked` takes: every run with an empty store of its own."
    seconds_together: float
    "What `distinct` takes: one store for all."

    @property
    def ratio(self) -> float:
        """Together over apart; 1 where nothing is shared."""
        return self.seconds_together / self.seconds_apart if self.seconds_apart else 1.0


class ExperimentResult(Config):
    """An experiment, all its arms and seeds, and what is there of each by now."""

    experiment: Experiment
    "The experiment as it was run: with the seeds and the arms of the command."
    tracked_in: str
    "Name of the MLflow experiment; the key of the summary's run there is the experiment's name."
    command: str
    "The last command that ran it."
    arms: tuple[ArmResult, ...]
    "In their order; equal ones are one."
    runs: tuple[RunResult, ...]
    "Every arm with every seed, seed by seed; also those that did not run yet."
    sharing: Sharing
    "What the runs have in common."

    @property
    def held_out_sets(self) -> list[str]:
        """The held-out sets that any run was evaluated on."""
        return list(dict.fromkeys(name for run in self.runs for name in run.final))

    def finished(self, arm: str) -> list[RunResult]:
        """Return the runs of an arm that finished."""
        return [run for run in self.runs if (run.arm, run.status) == (arm, "finished")]

    def finals(self, arm: str, held_out: str, metric: str) -> list[float]:
        """Return a metric of the final policies of an arm on a held-out set, one for each seed that finished and has it."""
        found = [run.final.get(held_out, {}).get(metric) for run in self.runs if run.arm == arm]
        return [value for value in found if value is not None]

    def best_run(self) -> RunResult | None:
        """Return the run with the highest accuracy of the arm with the highest mean over its seeds.

        On the first held-out set, of samples where there are any, else greedy; of equal ones the first. None before every run
        of an arm finished.

        The highest mean says nothing of whether the arms are separated: the captions of the figures do.
        """
        ended = [run for run in self.runs if run.status == "finished"]
        held_out = next(iter(ended[0].final), None) if ended else None
        if held_out is None:
            return None
        metric = "accuracy" if "accuracy" in ended[0].final[held_out] else "greedy_accuracy"
        accuracies = {arm.name: self.finals(arm.name, held_out, metric) for arm in self.arms}
        seeds = Counter(run.arm for run in self.runs)
        whole = {name: found for name, found in accuracies.items() if found and len(found) == seeds[name]}
        if not whole:
            return None
        arm = max(whole, key=lambda name: statistics.fmean(whole[name]))
        return max((run for run in ended if run.arm == arm), key=lambda run: run.final[held_out][metric])

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield a row for each run: names, status, and accuracies by held-out set before, at best and at the end."""
        for run in self.runs:
            row: dict[str, Any] = {"arm": run.arm, "seed": run.seed, "run": run.name, "status": run.status}
            for name, final in run.final.items():
                key = "accuracy" if "accuracy" in final else "greedy_accuracy"
                row |= {f"{name} before": run.before.get(name, {}).get(key), f"{name} final": final.get(key)}
                row[f"{name} best"] = run.best[name][1] if name in run.best else None
            yield row


def experiment_folder(places: Places, name: str) -> Path:
    """Return where an experiment's results lie: experiment.json, tables.md, the logs of runs in processes of their own."""
    return places.runs / name


def write_experiment(places: Places, result: ExperimentResult) -> Path:
    """Write the results; earlier ones of runs that are no part of these are kept under another name.

    Raises:
        StoreError: the folder cannot be written.
    """
    folder = experiment_folder(places, result.experiment.name)
    file = folder / _FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = read_experiment(folder)
        if earlier and not {run.folder for run in earlier.runs} <= {run.folder for run in result.runs}:
            digest = sha256_of(canonical_json([run.folder for run in earlier.runs]))
            file.rename(folder / f"experiment-{digest[:8]}.json")
        write_json(file, result.model_dump(mode="json"))
    except OSError as error:
        raise StoreError(
            f"{file} cannot be written ({error.strerror or error}); the runs themselves are kept"
        ) from None
    return file


def read_experiment(folder: Path) -> ExperimentResult | None:
    """Read the results in an experiment's folder; None where there are none, or none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return ExperimentResult.parse(json.loads((folder / _FILE).read_text(encoding="utf-8")), source=str(folder))
    return None


def read_summary(folder: Path) -> Summary | None:
    """Read the summary in a run's folder; None where there is none."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        values = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        values["best"] = {name: (step, accuracy) for name, (step, accuracy) in values["best"].items()}
        values["curve"] = {int(step): metrics for step, metrics in values["curve"].items()}
        return Summary(**values)
    return None


def _sharing_of(ledgers: Sequence[Ledger]) -> Sharing:
    """Count what the runs with these ledgers have in common."""
    distinct = {key: call.seconds for ledger in ledgers for key, call in ledger.calls.items()}
    return Sharing(
        runs=len(ledgers),
        asked=sum(len(ledger.calls) for ledger in ledgers),
        distinct=len(distinct),
        seconds_apart=sum(call.seconds for ledger in ledgers for call in ledger.calls.values()),
        seconds_together=sum(distinct.values()),
    )


# ------------------------------------------------------------------------------------------------ from the runs' folders


def is_finished(places: Places, arm: Arm) -> bool:
    """Return whether the run ended well, now or earlier."""
    record = read_record(run_folder(places, arm.choice.config))
    return record is not None and record.finished


def collect(planned: PlannedExperiment, places: Places, command: str) -> ExperimentResult:
    """Read what is there by now of every run of the experiment, in the order of the planned arms."""
    runs = tuple(_run_result(places, arm) for arm in planned.arms)
    ledgers = [run.ledger(places) for run in runs if run.status == "finished"]
    first = {arm.name: arm for arm in reversed(planned.arms)}
    return ExperimentResult(
        experiment=planned.experiment,
        tracked_in=planned.arms[0].choice.config.experiment,
        command=command,
        arms=tuple(
            ArmResult(name=name, also=first[name].also, differences=dict(planned.differences(first[name])))
            for name in planned.names
        ),
        runs=runs,
        sharing=_sharing_of([ledger for ledger in ledgers if ledger]),
    )


def _run_result(places: Places, arm: Arm) -> RunResult:
    folder = run_folder(places, arm.choice.config)
    record = read_record(folder)
    status = _status(record)
    done = read_summary(folder) if status == "finished" else None
    return RunResult(
        arm=arm.name,
        seed=arm.seed,
        name=arm.choice.config.name,
        folder=folder.name,
        status=status if done or status != "finished" else "failed",
        error=record.attempts[-1].error if record else "",
        steps=record.steps if record else 0,
        policy=done.policy if done else "",
        before=done.before if done else {},
        final=done.after if done else {},
        best=done.best if done else {},
        cost=done.cost if done else {},
    )


def _status(record: RunRecord | None) -> Any:
    """Return that of the run's last attempt; a run that once finished stays finished, since its results are all there."""
    if record is None:
        return "not run"
    return "finished" if record.finished else record.attempts[-1].outcome()
