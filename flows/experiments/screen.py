"""An experiment on the screen: what is asked and run, what differs from earlier, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.experiments.ablation import reasons, tables_file
from flows.experiments.arms import PlannedExperiment
from flows.experiments.report import report_file
from flows.experiments.results import Sharing, experiment_folder
from flows.experiments.running import is_finished
from flows.places import Places
from flows.records import read_record, run_folder
from flows.wording import duration, number

__all__ = ["print_arms", "print_changes", "print_outcome"]


def print_arms(planned: PlannedExperiment, places: Places, out: Console) -> None:
    """The question, the arms, and what differs from the baseline and from earlier runs."""
    experiment = planned.experiment
    out.print(f"[bold]{experiment.name}[/]  {escape(experiment.asks)}")
    chosen = {arm.name for arm in planned.chosen}
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("arm", "plan", f"differs from {experiment.baseline} in"):
        table.add_column(heading, overflow="fold")
    for arm in planned.arms[: len(planned.names)]:  # those with the first seed
        config = arm.choice.config
        size = f"{config.iterations} x {config.steps} steps, {config.questions_per_step} x {config.rollout.G} outputs"
        differs = "\n".join(_change(key, *change) for key, change in planned.differences(arm).items())
        table.add_row(arm.label + ("" if arm.name in chosen else "  (not now)"), size, differs or "-")
    out.print(table)
    merged = [arm.label for arm in planned.arms[: len(planned.names)] if arm.also]
    for label in merged:
        out.print(f"[yellow]equal configurations, run once:[/] {escape(label)}")
    done = sum(is_finished(places, arm) for arm in planned.chosen)
    seeds = ", ".join(map(str, experiment.seeds))
    out.print(
        f"{len(planned.chosen)} runs, seeds {seeds}; {done} finished before; in {escape(str(places.root))}",
        soft_wrap=True,
    )


def _change(key: str, was: object, now: object) -> str:
    """One setting, as it was and is; of lists of parts their kinds, where those tell the difference."""
    short = [
        f"[{', '.join(part['kind'] for part in value)}]"
        if isinstance(value, list) and value and all(isinstance(part, dict) and "kind" in part for part in value)
        else number(value)
        for value in (was, now)
    ]
    shown = short if short[0] != short[1] else [number(was), number(now)]
    return f"{key}: {escape(shown[0])} -> {escape(shown[1])}"


def print_changes(changed: Mapping[str, tuple[Any, Any]], out: Console) -> None:
    """What differs from the settings with which these runs were last made, where anything does."""
    if changed:
        text = "; ".join(_change(key, *change) for key, change in changed.items())
        out.print(f"[yellow]other settings than when these runs were last made:[/] {text}", soft_wrap=True)


def print_outcome(
    planned: PlannedExperiment, places: Places, sharing: Sharing, out: Console, *, since: float, because: bool
) -> None:
    """Counts of stage calls, what sharing saved, and where everything lies.

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
        "tables": tables_file(places, planned),
        "report": report_file(places, name),
    }
    for what, file in files.items():
        out.print(f"{what:<8} [cyan]{escape(str(file))}[/]", soft_wrap=True)


def _calls(planned: PlannedExperiment, places: Places, since: float) -> Iterator[str]:
    """What this command asked for, computed and reused."""
    attempts = [
        attempt
        for arm in planned.chosen
        if (record := read_record(run_folder(places, arm.choice.config)))
        for attempt in record.attempts
        if attempt.started >= since
    ]
    executed, reused = sum(one.executed for one in attempts), sum(one.cached for one in attempts)
    yield f"stage calls: {executed + reused:,} asked for, {executed:,} computed, {reused:,} reused"


def _sharing(sharing: Sharing) -> Iterator[str]:
    """What the runs of the experiment have in common, whenever they ran."""
    if sharing.runs > 1:
        saved = duration(sharing.seconds_apart - sharing.seconds_together)
        yield (
            f"the {sharing.runs} runs apart: {sharing.asked:,} stages in {duration(sharing.seconds_apart)}; together: "
            f"{sharing.distinct:,} in {duration(sharing.seconds_together)} ({sharing.ratio:.2f} of it); {saved} saved"
        )
