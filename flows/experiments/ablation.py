"""What an experiment came to, held against what was there before; its results in files and in MLflow.

Arms are ordinary runs (`cohort runs`, MLflow, resumable). What they share is computed once, since equal stage calls have one
key in one store: the first that asks computes, under a lock, and all others, in this process or another, get its result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from flows.config import IterativeRLConfig
from flows.experiments.arms import PlannedExperiment
from flows.experiments.comparison import Arm, Outcome, comparison_markdown
from flows.experiments.figures import Figure, draw_figures
from flows.experiments.report import write_report
from flows.experiments.results import (
    ArmResult,
    ExperimentResult,
    RunResult,
    experiment_folder,
    read_summary,
    sharing_of,
    write_experiment,
)
from flows.experiments.running import is_finished
from flows.ledger import read_ledger
from flows.places import Places
from flows.records import read_record, run_folder
from flows.session import InterruptedRunError
from pipeline.config import flatten
from pipeline.lineage import explain
from pipeline.progress import failsafe
from pipeline.store import StoreError
from pipeline.tracking import Tracker, track, tracked_models

__all__ = [
    "collect",
    "conclude",
    "earlier_settings",
    "figures_folder",
    "outcomes_of",
    "reasons",
    "tables_file",
    "track_experiment",
]

# ------------------------------------------------------------------------------------------------ against earlier runs


def earlier_settings(planned: PlannedExperiment, places: Places) -> dict[str, tuple[Any, Any]]:
    """What differs from the last runs of the same arms and seeds that had other configurations: what it was, what it is.

    Of runs that are to run and never did with the configuration they have now.
    """
    changes: dict[str, tuple[Any, Any]] = {}
    for arm in planned.chosen:
        folder = run_folder(places, arm.choice.config)
        if folder.exists():
            continue
        others = [other for other in places.runs.glob(f"{arm.choice.config.name}-????????") if read_record(other)]
        if others:
            latest = max(others, key=lambda other: (other / "config.yaml").stat().st_mtime)
            changes |= _changes(latest / "config.yaml", arm.choice.config)
    return changes


def _changes(file: Path, config: IterativeRLConfig) -> dict[str, tuple[Any, Any]]:
    """Read as plain values: an older version may have had other fields."""
    with contextlib.suppress(OSError, yaml.YAMLError, AttributeError):
        was = flatten(yaml.safe_load(file.read_text(encoding="utf-8")))
        now = flatten(yaml.safe_load(config.to_yaml()))
        return {key: (was.get(key), now.get(key)) for key in {**now, **was} if was.get(key) != now.get(key)}
    return {}


def reasons(places: Places, since: float) -> Iterator[str]:
    """Of every stage that was computed since then, its first call: what differs from the earlier call most like it."""
    store = places.open_store()
    first: dict[str, dict[str, Any]] = {}
    for call in store.actions():
        if call["created"] >= since:
            first.setdefault(call["stage"], call)
    for stage, call in first.items():
        causes = explain(store, call).causes
        where = [f"{cause.part}: {cause.before} -> {cause.after}" for cause in causes if cause.stage == stage]
        inputs = dict.fromkeys(cause.stage for cause in causes if cause.stage != stage)
        if where or inputs:
            yield f"{stage}: {'; '.join([*where, *(f'its inputs, from {name}' for name in inputs)])}"


# ------------------------------------------------------------------------------------------------ results


def collect(planned: PlannedExperiment, places: Places, command: str) -> ExperimentResult:
    """What is there by now of every run of the experiment, from the runs' own folders."""
    runs = tuple(_run_result(places, arm) for arm in planned.arms)
    ledgers = [read_ledger(places.runs / run.folder) for run in runs if run.status == "finished"]
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
        sharing=sharing_of([ledger for ledger in ledgers if ledger]),
    )


def outcomes_of(planned: PlannedExperiment, places: Places) -> list[Outcome]:
    """The runs that finished, for the tables."""
    finished = [arm for arm in planned.arms if is_finished(places, arm)]
    summaries = ((arm, read_summary(run_folder(places, arm.choice.config))) for arm in finished)
    return [Outcome(arm, summary) for arm, summary in summaries if summary]


def conclude(planned: PlannedExperiment, places: Places, command: str, tracker: Tracker) -> ExperimentResult:
    """Leave results, tables and figures in the experiment's folder and in MLflow, and the report in the folder.

    Raises:
        StoreError: the folder cannot be written; what was written before is kept.
    """
    result = collect(planned, places, command)
    write_experiment(places, result)
    tracker.log_table("runs", list(result.rows()))
    _point_at_best(result, places, tracker)
    outcomes = outcomes_of(planned, places)
    if outcomes:
        experiment = planned.experiment
        text = comparison_markdown(outcomes, command, name=experiment.name, asks=experiment.asks)
        tables_file(places, planned).write_text(text, encoding="utf-8")
        notes = [text]
        try:
            notes += _draw(result, planned, places, tracker)
        finally:
            tracker.set_note("\n\n".join(notes))
    else:
        write_report(result, places, [])
    return result


def _point_at_best(result: ExperimentResult, places: Places, tracker: Tracker) -> None:
    """Let `best-<experiment>` name the final policy of the best run of the best arm, and the reward model it trained last."""
    best = result.best_run()
    if best is None:
        return
    models = tracked_models(places.root, result.tracked_in, best.folder)
    last = {model.name: model for model in models}  # a run tells of its final policy last
    for model in last.values():
        tracker.set_alias(f"best-{result.experiment.name}", model, run_name=best.name, run_key=best.folder)


def _draw(result: ExperimentResult, planned: PlannedExperiment, places: Places, tracker: Tracker) -> list[str]:
    """Leave the figures, and the report that has them; returns their captions."""
    figures: list[Figure] = []
    with failsafe("the figures of the experiment", passing=StoreError):
        figures = draw_figures(result, places, figures_folder(places, planned))
    write_report(result, places, figures)
    for file in (file for figure in figures for file in (figure.png, figure.svg)):
        tracker.log_figure(file)
    return [f"**{figure.title}** (figures/{figure.png.name}). {figure.caption}" for figure in figures]


def figures_folder(places: Places, planned: PlannedExperiment) -> Path:
    """The figures, as PNG and SVG."""
    return experiment_folder(places, planned.experiment.name) / "figures"


def tables_file(places: Places, planned: PlannedExperiment) -> Path:
    """The tables as markdown."""
    return experiment_folder(places, planned.experiment.name) / "tables.md"


@contextlib.contextmanager
def track_experiment(planned: PlannedExperiment, places: Places) -> Iterator[Tracker]:
    """Track the run that stands for the whole experiment in MLflow, beside those of its arms.

    Raises:
        StoreError: the experiment's folder cannot be written; found before anything runs.
    """
    folder = experiment_folder(places, planned.experiment.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "experiment.yaml").write_text(planned.experiment.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be written ({error.strerror or error}): free space, mend permissions or choose another place "
            "with --root"
        ) from None
    name, tags = planned.experiment.name, {"cohort.kind": "experiment"}
    study = planned.arms[0].choice.config.experiment
    interrupted: InterruptedRunError | None = None
    try:
        with track(places.root, experiment=study, run_name=name, run_key=name, config={}, tags=tags) as tracker:
            try:
                yield tracker
            except InterruptedRunError as stop:  # MLflow is told that it was stopped, not that it failed
                interrupted = stop
                raise KeyboardInterrupt from None
    except KeyboardInterrupt:
        raise interrupted or KeyboardInterrupt from None


def _run_result(places: Places, arm: Arm) -> RunResult:
    folder = run_folder(places, arm.choice.config)
    record, summary = read_record(folder), read_summary(folder)
    status = _status(folder)
    done = summary if status == "finished" else None
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


def _status(folder: Path) -> Any:
    """Of the run's last attempt; a run that once finished stays finished, since its results are all there."""
    record = read_record(folder)
    if record is None:
        return "not run"
    return "finished" if record.finished else record.attempts[-1].outcome()
