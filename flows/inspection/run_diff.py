"""Print what differs between two runs: configuration, inputs, outcome, stage calls, and where they part."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.inspection.difference_view import column, essential, pairs_table, shortened_pair, titled
from flows.inspection.history import BETWEEN_STEPS, History, PlacedCall, best, evaluations, measures, placed_calls
from flows.wording import number, percent, quoted
from pipeline import lineage
from pipeline.config import flatten
from pipeline.store import MissingArtifactError, Store

Place = tuple[str, int, str, int]
"""Stage, step, where in the step, and which call of the stage there, counted from 1."""


def print_run_difference(store: Store, before: History, after: History, console: Console, *, limit: int) -> None:
    """Print what differs between two runs, at most `limit` changes per stage."""
    names = (before.record.folder.name, after.record.folder.name)
    console.print(
        f"run [cyan]{quoted(names[0])}[/] (before) -> run [cyan]{quoted(names[1])}[/] (after)", soft_wrap=True
    )
    for name, run in zip(names, (before, after), strict=True):
        if run.note:
            console.print(f"{name}: {run.note}", style="dim", markup=False)
    changes = config_changes(before.config.model_dump(mode="json"), after.config.model_dump(mode="json"))
    rows = [(key, *shortened_pair(*pair, room=60)) for key, pair in changes.items() if key != "name"]
    console.print(pairs_table("configuration", rows) if rows else "\nconfiguration: the same")
    _print_outcome(before, after, console)
    calls = placed_calls(before.ledger), placed_calls(after.ledger)
    records = _records(store, calls)
    _print_inputs(calls, records, console)
    _print_parting(before, after, records, console)
    _print_stages(calls, records, console, limit)


def config_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values differ, without those that only one of two kinds of a section has."""
    old, new = flatten(before), flatten(after)
    keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key) or (key in old) != (key in new)]
    other_kind = tuple(key.removesuffix("kind") for key in keys if key.endswith(".kind"))
    return {
        key: (old.get(key), new.get(key))
        for key in keys
        if ((key in old and key in new) or not key.startswith(other_kind))
        and not any(other.startswith(f"{key}.") for other in keys)  # null in place of a section whose fields follow
    }


def _print_outcome(before: History, after: History, console: Console) -> None:
    curves = evaluations(before.points), evaluations(after.points)
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys([*curves[0], *curves[1]]):
        old, new = (curve.get(name, {}) for curve in curves)
        last = [side[max(side)] if side else {} for side in (old, new)]
        for label, metric in (measures(last[0]) | measures(last[1])).items():
            values = [side.get(metric) for side in last]
            rows.append((f"{name} {label}", *map(percent, values), _difference(*values)))
        tops = [best(side) for side in (old, new)]
        texts = [f"{percent(top[1])} at {top[0]}" if top else "-" for top in tops]
        rows.append((f"{name} best", *texts, _difference(*(top[1] if top else None for top in tops))))
    if rows:
        steps = [max((max(curve) for curve in side.values()), default=0) for side in curves]
        console.print(pairs_table(f"accuracy after step {steps[0]} and step {steps[1]}", rows, change=True))


def _difference(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{after - before:+.3f}"


def _records(store: Store, calls: tuple[list[PlacedCall], list[PlacedCall]]) -> dict[str, dict[str, Any]]:
    """Return the records of all calls by key; those that were forgotten meanwhile are left out."""
    records = {}
    for key in dict.fromkeys(call.key for side in calls for call in side):
        with contextlib.suppress(MissingArtifactError):
            records[key] = store.action(key)
    return records


def _print_inputs(
    calls: tuple[list[PlacedCall], list[PlacedCall]], records: Mapping[str, dict[str, Any]], console: Console
) -> None:
    old, new = (_given(side, records) for side in calls)
    shared = [name for name in old if name in new]
    rows = [(name, old[name][:12], new[name][:12]) for name in shared if old[name] != new[name]]
    same = [name for name in shared if old[name] == new[name]]
    if rows:
        console.print(pairs_table("given to the first step, and to evaluations", rows))
    if same:
        console.print(f"\nthe same for both: {', '.join(same)}", markup=False)


def _given(calls: list[PlacedCall], records: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Return what step 1 was given that it did not make, by parameter; and the held-out sets by name."""
    first = [call for call in calls if call.step == 1 and not call.where]
    made = {call.digest for call in first}
    given: dict[str, str] = {}
    for call in first:
        for name, digest in lineage.inputs(records.get(call.key, {}).get("arguments", {})):
            if digest not in made:
                is_set = name == "questions" and call.stage in ("sample_batch", "draw_from_band")
                given.setdefault("training questions" if is_set else name, digest)
    for call in calls:
        if call.stage == "rollout" and call.where not in ("", BETWEEN_STEPS) and call.key in records:
            name = call.where.partition("/")[0]
            asked = dict(lineage.inputs(records[call.key]["arguments"]))
            given.setdefault(f"held-out set {name}", asked.get("questions", "-"))
    return given


def _print_parting(before: History, after: History, records: Mapping[str, dict[str, Any]], console: Console) -> None:
    """Print the first step whose artifacts differ in content; names of policies differ with the settings that made them."""
    contents = {record["result"]: record["content"] for record in records.values() if record.get("content")}
    old, new = (
        {
            step: {stage: contents.get(name, name) for stage, name in made.items()}
            for step, made in history.ledger.steps.items()
        }
        for history in (before, after)
    )
    shared = sorted(old.keys() & new.keys())
    parted = next((step for step in shared if old[step] != new[step]), None)
    if parted is not None:
        stages = [stage for stage in old[parted] | new[parted] if old[parted].get(stage) != new[parted].get(stage)]
        alike = f"equal artifacts through step {parted - 1}; " if parted > 1 else ""
        console.print(f"\n{alike}[bold]they part at step {parted}[/], first in {quoted(stages[0])}")
    elif shared:
        more = max(len(old), len(new)) - len(shared)
        rest = f"; {'the first' if len(old) > len(new) else 'the second'} goes on for {more} steps" if more else ""
        console.print(f"\nequal artifacts in all of {len(shared)} steps{rest}")


def _print_stages(
    calls: tuple[list[PlacedCall], list[PlacedCall]],
    records: Mapping[str, dict[str, Any]],
    console: Console,
    limit: int,
) -> None:
    old, new = (dict(_places(side)) for side in calls)
    makers = lineage.producers(sorted(records.values(), key=lambda record: float(record["created"])))
    table = Table(box=None, padding=(0, 2, 0, 0))
    column(table, "stage")
    for heading in ("before", "after", "shared"):
        column(table, heading, right=True)
    column(table, "why they were computed apart", fold=True)
    for stage in dict.fromkeys(place[0] for place in [*old, *new]):
        keys = [{call.key for place, call in side.items() if place[0] == stage} for side in (old, new)]
        pairs = [(old[place], new[place]) for place in old if place[0] == stage and place in new]
        why = _why([pair for pair in pairs if pair[0].key != pair[1].key], records, makers, limit)
        table.add_row(quoted(stage), *map(number, (len(keys[0]), len(keys[1]), len(keys[0] & keys[1]))), Text(why))
    console.print(titled("stage calls", table))


def _places(calls: list[PlacedCall]) -> Iterator[tuple[Place, PlacedCall]]:
    counts = Counter[tuple[str, int, str]]()
    for call in calls:
        place = (call.stage, call.step, call.where)
        counts[place] += 1
        yield (*place, counts[place]), call


def _why(
    pairs: list[tuple[PlacedCall, PlacedCall]],
    records: Mapping[str, dict[str, Any]],
    makers: Mapping[str, dict[str, Any]],
    limit: int,
) -> str:
    """Say what differs in the first calls of a stage that are not the same: settings, or else inputs."""
    known = [(records[a.key], records[b.key], a) for a, b in pairs if a.key in records and b.key in records]
    if not known:
        return ""
    before, after, call = known[0]
    found = lineage.compare_calls(makers, before, after)
    own = essential(change for change in found.changes if change in found.causes)
    where = f"step {call.step}" + (f", {call.where}" if call.where not in ("", BETWEEN_STEPS) else "")
    if own:
        texts = [f"{change.part} {change.before} -> {change.after}" for change in own[:limit]]
        more = f"; {len(own) - limit} more" if len(own) > limit else ""
        return f"{'; '.join(texts)}{more} (from {where} on)"
    names = ", ".join(dict.fromkeys(change.part for change in found.changes))
    return f"other {names} (from {where} on)"
