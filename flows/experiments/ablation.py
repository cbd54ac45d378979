"""An experiment around its runs: on the screen, compared with what was there before, its results in files and in MLflow.

Arms are ordinary runs (`cohort runs`, MLflow, resumable). What they share is computed once, since equal stage calls have one
key in one store: the first that asks computes, under a lock, and all others, in this process or another, get its result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.config import IterativeRLConfig
from flows.experiments.arms import PlannedExperiment
from flows.experiments.figures import Figure, draw_figures
from flows.experiments.report import report_file, write_report
from flows.experiments.results import ExperimentResult, Sharing, experiment_folder, is_finished, write_experiment
from flows.experiments.tables import Outcome, comparison_markdown
from flows.runs.paths import Places
from flows.runs.record import read_record, run_folder, write_text
from flows.tracking.delivery import tracked_study
from flows.tracking.fold import MlflowFold
from flows.wording import duration, number
from pipeline.config import flatten
from pipeline.lineage import explain
from pipeline.progress import failsafe
from pipeline.store import StoreError, use_store
from pipeline.tracking.records import Record, alias, figure, note, table

# ------------------------------------------------------------------------------------------------ before the runs


def print_arms(planned: PlannedExperiment, places: Places, out: Console) -> None:
    """Print the question, the arms, and what differs from the baseline."""
    experiment = planned.experiment
    out.print(f"[bold]{experiment.name}[/]  {escape(experiment.asks)}")
    chosen = {arm.name for arm in planned.chosen}
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("arm", "plan", f"differs from {experiment.baseline} in"):
        table.add_column(heading, overflow="fold")
    for arm in planned.arms[: len(planned.names)]:  # those with the first seed
        differs = "\n".join(_change(key, *change) for key, change in planned.differences(arm).items())
        table.add_row(arm.label + ("" if arm.name in chosen else "  (not now)"), arm.plan, differs or "-")
    out.print(table)
    for arm in (arm for arm in planned.arms[: len(planned.names)] if arm.also):
        out.print(f"[yellow]equal configurations, run once:[/] {escape(arm.label)}")
    done = sum(is_finished(places, arm) for arm in planned.chosen)
    seeds = ", ".join(map(str, experiment.seeds))
    out.print(
        f"{len(planned.chosen)} runs, seeds {seeds}; {done} finished before; in {escape(str(places.root))}",
        soft_wrap=True,
    )


def _change(key: str, was: object, now: object) -> str:
    """Write one setting, as it was and is; of lists of parts their kinds, where those differ."""
    short = [
        f"[{', '.join(part['kind'] for part in value)}]"
        if isinstance(value, list) and value and all(isinstance(part, dict) and "kind" in part for part in value)
        else number(value)
        for value in (was, now)
    ]
    shown = short if short[0] != short[1] else [number(was), number(now)]
    return f"{key}: {escape(shown[0])} -> {escape(shown[1])}"


def print_changes(changed: Mapping[str, tuple[Any, Any]], out: Console) -> None:
    """Print what differs from the settings with which these runs were last made, where anything does."""
    if changed:
        text = "; ".join(_change(key, *change) for key, change in changed.items())
        out.print(f"[yellow]other settings than when these runs were last made:[/] {text}", soft_wrap=True)


def earlier_settings(planned: PlannedExperiment, places: Places) -> dict[str, tuple[Any, Any]]:
    """Return what differs from the last runs of the same arms and seeds that had other configurations: what it was, what it is.

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
    """Compare plain values: an older version may have had other fields."""
    with contextlib.suppress(OSError, yaml.YAMLError, AttributeError):
        was = flatten(yaml.safe_load(file.read_text(encoding="utf-8")))
        now = flatten(yaml.safe_load(config.to_yaml()))
        return {key: (was.get(key), now.get(key)) for key in {**now, **was} if was.get(key) != now.get(key)}
    return {}


@contextlib.contextmanager
def track_experiment(planned: PlannedExperiment, places: Places) -> Iterator[Callable[[Record], None]]:
    """Track the whole experiment as a run of its own in MLflow; yields what logs a record.

    Raises:
        StoreError: the experiment's folder cannot be written; found before anything runs.
    """
    folder = experiment_folder(places, planned.experiment.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "experiment.yaml", planned.experiment.to_yaml())
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be written ({error.strerror or error}): free space, correct permissions or choose another place "
            "with --root"
        ) from None
    name, tags = planned.experiment.name, {"cohort.kind": "experiment"}
    study = planned.arms[0].choice.config.experiment
    with tracked_study(places.root, experiment=study, name=name, key=name, config={}, tags=tags) as log:
        yield log


# ------------------------------------------------------------------------------------------------ results


def outcomes_of(planned: PlannedExperiment, result: ExperimentResult) -> list[Outcome]:
    """Return the runs that finished, with their arms, for the tables."""
    pairs = map(Outcome, planned.arms, result.runs)
    return [outcome for outcome in pairs if outcome.run.status == "finished"]


def conclude(
    planned: PlannedExperiment, result: ExperimentResult, places: Places, log: Callable[[Record], None]
) -> None:
    """Leave results, tables and figures in the experiment's folder and in MLflow, and the report in the folder.

    Raises:
        StoreError: the folder cannot be written; what was written before is kept.
    """
    write_experiment(places, result)
    log(table("runs", list(result.rows())))
    failsafe("the alias of the best models")(_point_at_best)(result, places, log)
    outcomes, experiment = outcomes_of(planned, result), result.experiment
    if not outcomes:
        write_report(result, places, [])
        return
    text = comparison_markdown(outcomes, result.command, name=experiment.name, asks=experiment.asks)
    write_text(tables_file(places, experiment.name), text)
    notes = [text]
    try:
        notes += _draw(result, places, log)
    finally:
        log(note("\n\n".join(notes)))


def _point_at_best(result: ExperimentResult, places: Places, log: Callable[[Record], None]) -> None:
    """Let `best-<experiment>` name the final policy of the best run of the best arm, and the reward model it trained last."""
    best = result.best_run()
    if best is None:
        return
    fold = MlflowFold(places.runs / best.folder)
    with use_store(places.open_store()):
        fold.read()
    # A run logs its final policy last.
    last = {record["model"]: record for record in fold.records if record["kind"] == "model"}
    for model in last.values():
        began = fold.record.attempts[0].start.time
        name = f"best-{result.experiment.name}"
        log(alias(name, model, run=best.folder, run_name=best.name, began=began))


def _draw(result: ExperimentResult, places: Places, log: Callable[[Record], None]) -> list[str]:
    """Leave the figures, and the report that has them; returns their captions."""
    figures: list[Figure] = []
    with failsafe("the figures of the experiment", passing=StoreError):
        figures = draw_figures(result, places, experiment_folder(places, result.experiment.name) / "figures")
    write_report(result, places, figures)
    for file in (file for drawn in figures for file in (drawn.png, drawn.svg)):
        log(figure(file))
    return [f"**{drawn.title}** (figures/{drawn.png.name}). {drawn.caption}" for drawn in figures]


def tables_file(places: Places, name: str) -> Path:
    """Return where the tables of an experiment lie, as markdown."""
    return experiment_folder(places, name) / "tables.md"


# ------------------------------------------------------------------------------------------------ after the runs


def print_outcome(
    planned: PlannedExperiment, places: Places, sharing: Sharing, out: Console, *, since: float, because: bool
) -> None:
    """Print counts of stage calls, what sharing saved, and where everything lies.

    Args:
        since: when the command began, seconds since the epoch.
        because: also say why stages were computed.
    """
    for line in [*_calls(planned, places, since), *_sharing(sharing)]:
        out.print(line, soft_wrap=True)
    if because:
        out.print("computed because of the other settings, by stage:")
        for reason in reasons(places, since):
            out.print(f"  {reason}", markup=False, soft_wrap=True)
    name = planned.experiment.name
    files = {
        "results": experiment_folder(places, name) / "experiment.json",
        "tables": tables_file(places, name),
        "report": report_file(places, name),
    }
    for what, file in files.items():
        out.print(f"{what:<8} [cyan]{escape(str(file))}[/]", soft_wrap=True)


def _calls(planned: PlannedExperiment, places: Places, since: float) -> Iterator[str]:
    """Count what this command asked for, computed and reused."""
    attempts = [
        attempt
        for arm in planned.chosen
        if (record := read_record(run_folder(places, arm.choice.config)))
        for attempt in record.attempts
        if attempt.start.time >= since
    ]
    executed, reused = sum(one.executed for one in attempts), sum(one.cached for one in attempts)
    yield f"stage calls: {executed + reused:,} asked for, {executed:,} computed, {reused:,} reused"


def _sharing(sharing: Sharing) -> Iterator[str]:
    """Say what the runs of the experiment have in common, whenever they ran."""
    if sharing.runs > 1:
        saved = duration(sharing.seconds_apart - sharing.seconds_together)
        yield (
            f"the {sharing.runs} runs apart: {sharing.asked:,} stages in {duration(sharing.seconds_apart)}; together: "
            f"{sharing.distinct:,} in {duration(sharing.seconds_together)} ({sharing.ratio:.2f} of it); {saved} saved"
        )


def reasons(places: Places, since: float) -> Iterator[str]:
    """Explain the first call of every stage that was computed since then: what differs from the earlier call most like it."""
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
