"""Print a run: settings that differ from its recipe, evaluations, artifacts by step; or one step with its groups."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from flows.config.recipes import RECIPES
from flows.inspection.artifact_view import show_groups, show_metrics
from flows.inspection.difference_view import column, pairs_table, shortened_pair, titled
from flows.inspection.groups import groups_of
from flows.inspection.history import Curve, History, PlacedCall, evaluations, measures, placed_calls
from flows.inspection.run_diff import config_changes
from flows.runs.summary import mismatch_line, worst_mismatch
from flows.wording import duration, moment, percent, quoted
from pipeline.events import RunStarted
from pipeline.lineage import inputs
from pipeline.store import MissingArtifactError, Store

_STEPS: Final = 50
"""Steps in the table by default."""
_BAR: Final = 20
"""Characters of a bar for an accuracy of 1."""
_TABLES: Final = ("outputs", "rewards", "advantages", "policy")
"""What a step comes to."""
_WIDE: Final = 80
"""Characters from which on there is room for digests of twelve letters."""


def show_run(store: Store, run: History, console: Console, *, limit: int | None) -> None:
    """Print how a run went, what its settings change, its evaluations, and `limit` of its steps, evenly spread."""
    _show_head(run, console)
    _show_settings(run, console)
    for name, curve in evaluations(run.points).items():
        console.print(_curve(name, curve))
    if worst := worst_mismatch(run.points):
        console.print(mismatch_line(worst), soft_wrap=True)
    if run.ledger.steps:
        console.print(_steps(store, run, console.width, limit or _STEPS))
        console.print(
            f"\n`cohort show {quoted(run.record.folder.name)} --step K` shows the groups of a step",
            style="dim",
            soft_wrap=True,
        )


def show_step(
    store: Store, run: History, step: int, console: Console, *, limit: int | None, question: str | None
) -> None:
    """Print one step: its artifacts, metrics and groups; raise MissingArtifactError where the run has no such step."""
    if step not in run.ledger.steps:
        last = max(run.ledger.steps, default=0)
        known = f"its steps are 1 to {last}" if last else f"it has none yet ({run.note})"
        raise MissingArtifactError(f"{run.record.folder.name} has no step {step}; {known}")
    own = [call for call in placed_calls(run.ledger) if call.step == step and not call.where]
    table = Table(
        title=f"{quoted(run.record.folder.name)}, step {step}", title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    for heading in ("stage", "made", "took"):
        column(table, heading, right=heading == "took")
    metrics: dict[str, float] = {}
    for call in own:
        record = _record(store, call)
        table.add_row(quoted(call.stage), f"[cyan]{quoted(call.digest[:12])}[/]", duration(record.get("seconds", 0.0)))
        metrics |= record.get("metrics", {})
    console.print(table)
    show_metrics(metrics, console)
    advantages = run.ledger.steps[step].get("estimate_advantages")
    if advantages and (groups := groups_of(store, advantages)):
        show_groups(groups, console, limit=limit, question=question)


def _show_head(run: History, console: Console) -> None:
    record, last = run.record, run.record.attempts[-1]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("run", f"[bold]{quoted(record.folder.name)}[/]")
    took = duration(sum(attempt.seconds for attempt in record.attempts))
    attempts = f", {len(record.attempts)} attempts" if len(record.attempts) > 1 else ""
    table.add_row("status", f"{last.outcome()}, {record.steps} of {record.total_steps} steps, took {took}{attempts}")
    table.add_row("started", moment(record.attempts[0].start.time))
    table.add_row("command", Text(last.start.command))
    if last.error:
        table.add_row("error", Text(last.error))
    if record.policy:
        table.add_row("policy", f"[cyan]{record.policy}[/]")
    if run.note:
        table.add_row("note", Text(run.note))
    console.print(table)


def _show_settings(run: History, console: Console) -> None:
    """Print what was asked for, and what differs from the recipe that it was asked of."""
    latest = [attempt.start for attempt in run.record.attempts[::-1]]
    asked = next((attempt for attempt in latest if attempt.recipe in RECIPES), None)  # later ones may name config.yaml
    made = asked or next((attempt for attempt in latest if attempt.overrides), None)
    if made and made.overrides:
        console.print(_overrides(made))
    values = run.config.model_dump(mode="json")
    names = [asked.recipe] if asked else list(RECIPES)
    found = {name: config_changes(RECIPES[name]().model_dump(mode="json"), values) for name in names}
    nearest = min(found, key=lambda name: len(found[name]))
    recipe = f"the recipe {nearest}" if asked else f"the nearest recipe, {nearest},"
    rows = [(key, *shortened_pair(*pair, room=60)) for key, pair in found[nearest].items() if key != "name"]
    if rows:
        console.print(pairs_table(f"differs from {recipe} in", rows, names=(nearest, "here")))
    else:
        console.print(f"\n{recipe.rstrip(',')} as it is")


def _overrides(attempt: RunStarted) -> Group:
    """Return the overrides in their order, with who asked for each."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("override", "value", "from"):
        column(table, heading, fold=heading == "from")
    for override in attempt.overrides:
        # As JSON: what a record of others holds moves no cursor and paints nothing.
        key, value, source = (json.dumps(override.get(name)) for name in ("setting", "value", "source"))
        cells = [Text(key.strip('"')), Text(value), Text(source.strip('"'))]
        cells[1].truncate(60, overflow="ellipsis")
        if override.get("undone"):
            cells[2].append(" (undone by a later one)")
        table.add_row(*cells, style="dim" if override.get("undone") else None)
    recipe = json.dumps(attempt.recipe).strip('"')
    return titled(f"made from {recipe} by, in this order", table)


def _curve(name: str, curve: Curve) -> Group:
    """Return a line per evaluation; the bar is the accuracy of samples, or greedy where there are none."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    labels = measures({metric: value for metrics in curve.values() for metric, value in metrics.items()})
    column(table, "step", right=True)
    for label in labels:
        column(table, label, right=True)
    column(table, "")
    for step, metrics in curve.items():
        accuracy = metrics.get("accuracy", metrics.get("greedy_accuracy", 0.0))
        table.add_row(str(step), *(percent(metrics.get(key)) for key in labels.values()), "█" * round(_BAR * accuracy))
    return titled(name, table)


def _steps(store: Store, run: History, width: int, limit: int) -> Group:
    steps = _spread(sorted(run.ledger.steps), limit)
    some = "" if len(steps) == len(run.ledger.steps) else f", {len(steps)} of {len(run.ledger.steps)} (--limit)"
    table = Table(box=None, padding=(0, 2, 0, 0))
    column(table, "step", right=True)
    for heading in (*_TABLES, "reward"):
        column(table, heading, right=heading == "reward")
    letters = 12 if width >= _WIDE else 8
    calls = [call for call in placed_calls(run.ledger) if not call.where and call.step in set(steps)]
    for step in steps:
        own = {call: _record(store, call) for call in calls if call.step == step}
        made = _made(own)
        scored = [record for call, record in own.items() if call.digest == made.get("rewards")]
        reward = scored[0].get("metrics", {}).get("reward/mean") if scored else None
        table.add_row(str(step), *(made.get(name, "-")[:letters] for name in _TABLES), percent(reward))
    return titled(f"artifacts by step{some}", table)


def _made(own: Mapping[PlacedCall, Mapping[str, Any]]) -> dict[str, str]:
    """Return the step's tables and policy by heading; rewards are those that advantages were estimated from."""
    made: dict[str, str] = {}
    for call, record in own.items():
        if call.stage in ("update_policy", "estimate_advantages"):
            made |= {name: digest for name, digest in inputs(record.get("arguments", {})) if name in _TABLES[:3]}
        if call.stage == "update_policy":
            made["policy"] = call.digest
    return made


def _spread(steps: list[int], limit: int) -> list[int]:
    """Return at most `limit` steps at equal distances, the last one among them."""
    if len(steps) <= limit:
        return steps
    stride = -(-len(steps) // limit)
    return steps[::-1][::stride][::-1]


def _record(store: Store, call: PlacedCall) -> dict[str, Any]:
    try:
        return store.action(call.key)
    except MissingArtifactError:  # forgotten since
        return {}
