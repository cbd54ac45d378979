"""Print what differs between two artifacts: what made them, metrics, rows joined by key, configurations and weights."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.inspection.difference_view import column, essential, pairs_table, shortened_pair
from flows.wording import number, size
from pipeline import lineage
from pipeline.config import flatten
from pipeline.diff import (
    TableDifference,
    TensorDifference,
    compare_tables,
    compare_weights,
    read_rows,
    schema_changes,
    stored_tensors,
)
from pipeline.store import MissingArtifactError, PrunedArtifactError, Store
from stages.models import plain_folder

Record = dict[str, Any]
Calls = tuple[Record | None, Record | None]

_KEYS: Final = ("gauge", "question_id", "sample", "step")
"""Columns that name a row, in whichever table they stand."""
_DESCRIPTION: Final = 100_000
"""Bytes; larger JSON files (vocabularies) are only said to differ."""


def print_artifact_difference(
    store: Store,
    before: str,
    after: str,
    console: Console,
    *,
    limit: int,
    calls: tuple[Record, Record] | None = None,
) -> None:
    """Print what differs: type, origin, metrics, then rows, or configuration and weights.

    Args:
        limit: rows or tensors to show.
        calls: the stage calls that are meant, which differ in nothing that was computed; by default those that first made
            the artifacts, and why they differ is looked for in the whole store.
    """
    old, new = (_manifest(store, name) for name in (before, after))
    same = before == after or (old["digest"] == new["digest"] and not old.get("unwritten"))
    makers = {} if calls else lineage.producers(store.actions())
    made = calls or (makers.get(before), makers.get(after))
    console.print(
        f"{old['type']} [cyan]{before[:12]}[/] -> {new['type']} [cyan]{after[:12]}[/]"
        + ("  the same content" if same else "")
    )
    _print_origin(makers, made, console)
    _print_metrics(made, console)
    if same:
        return
    if old["type"] != new["type"]:
        console.print("of two types: their contents are not compared")
        return
    try:
        folders = store.path(before), store.path(after)
    except PrunedArtifactError as error:
        console.print(f"contents are not compared: {error}", markup=False, soft_wrap=True)
        return
    left, right = read_rows(store, before), read_rows(store, after)
    if left is not None and right is not None:
        if columns := [(name, *types) for name, types in schema_changes(left.schema, right.schema).items()]:
            console.print(pairs_table("columns", columns))
        key = [name for name in _KEYS if name in left.schema.names and name in right.schema.names]
        _print_rows(compare_tables(left, right, key=key), console, limit)
    _print_files(old, new, folders, console)
    if any(stored_tensors(folder) for folder in folders):
        with plain_folder(folders[0]) as earlier, plain_folder(folders[1]) as later:
            _print_weights(earlier, later, console, limit)


def _manifest(store: Store, name: str) -> dict[str, Any]:
    """Return a manifest with the digest of all files: descriptions of what was not written are equal, its weights are not."""
    with contextlib.suppress(MissingArtifactError):
        found = store.manifest(name)
        if not found.get("unwritten"):
            return found
    with contextlib.suppress(PrunedArtifactError):
        store.path(name)
    return store.manifest(name)


def _print_origin(makers: Mapping[str, Any], made: Calls, console: Console) -> None:
    before, after = made
    if before is None or after is None or before["stage"] != after["stage"]:
        names = [f"{call['stage']} (version {call['version']})" if call else "no stage" for call in made]
        console.print("made by " + (names[0] if names[0] == names[1] else f"{names[0]} -> {names[1]}"))
        return
    found = lineage.compare_calls(makers, before, after)
    if before["key"] == after["key"]:
        console.print(f"made by {after['stage']} (version {after['version']}), one call")
    elif not found.changes:
        console.print(f"made by {after['stage']}, called alike: the cached call was computed again")
    else:
        own = [(change.part, change.before, change.after) for change in essential(found.changes)]
        console.print(pairs_table(f"made by {after['stage']} from", own))
        causes = essential(cause for cause in found.causes if cause not in found.changes)
        if upstream := [(f"{cause.stage}: {cause.part}", cause.before, cause.after) for cause in causes]:
            console.print(pairs_table("because upstream", upstream))


def _print_metrics(made: Calls, console: Console) -> None:
    metrics = [dict(call.get("metrics", {})) if call else {} for call in made]
    rows = []
    for name in sorted({*metrics[0], *metrics[1]}):
        old, new = (side.get(name) for side in metrics)
        if old != new:
            change = "" if old is None or new is None else f"{'+' if new > old else '-'}{number(abs(new - old))}"
            rows.append((name, *("-" if value is None else number(value) for value in (old, new)), change))
    if rows:
        console.print(pairs_table("metrics", rows, change=True))


def _print_rows(found: TableDifference, console: Console, limit: int) -> None:
    by = f"by {', '.join(found.key)}" if found.key else "by their number"
    console.print(
        f"\nrows {by}: {number(found.shared)} in both, of which {number(found.changed)} differ; "
        f"{number(len(found.only_before))} only before, {number(len(found.only_after))} only after"
    )
    for part in found.columns:
        largest = "" if part.largest is None else f", by {number(part.largest)} at most"
        console.print(f"  {part.name}: {number(part.rows)} rows{largest}")
    for name, keys in (("before", found.only_before), ("after", found.only_after)):
        if keys:
            some = ", ".join(" ".join(map(str, key)) for key in keys[:limit])
            console.print(f"  only {name}: {some}{', ...' if len(keys) > limit else ''}", soft_wrap=True, markup=False)
    if found.changed:
        console.print(_rows_table(found, console.width, limit))
        if found.changed > limit:
            console.print(f"{number(found.changed - limit)} more rows differ (--limit)", style="dim")


def _rows_table(found: TableDifference, width: int, limit: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in found.key or ("row",):
        column(table, name)
    room = max(16, (width - 12 * len(found.key or ("row",)) - 22) // 2)
    for heading in ("column", "before", "after"):
        column(table, heading, fold=heading != "column")
    for row in found.first(limit):
        # A key that was repeated has its count behind it.
        names = [str(part) for part in row.key[: len(found.key) or 1]]
        for name, pair in row.values.items():
            old, new = shortened_pair(*pair, room=room)
            table.add_row(*(Text(part[:16]) for part in names), Text(name), Text(old), Text(new))
            names = [""] * len(names)
    return table


def _print_files(old: Record, new: Record, folders: tuple[Path, Path], console: Console) -> None:
    """Print files other than tables and weights that differ: JSON ones by their keys."""
    left, right = ({file["name"]: file for file in manifest["files"]} for manifest in (old, new))
    rows: list[tuple[str, str, str]] = []
    for name in dict.fromkeys([*left, *right]):
        if name == "table.arrow" or left.get(name, {}).get("sha256") == right.get(name, {}).get("sha256"):
            continue
        if name in left and name in right and _is_description(left[name]) and _is_description(right[name]):
            rows += _json_changes(name, *(folder / name for folder in folders))
        else:
            rows.append((name, *(size(side[name]["size"]) if name in side else "-" for side in (left, right))))
    if rows:
        console.print(pairs_table("files", rows))


def _is_description(file: Mapping[str, Any]) -> bool:
    return str(file["name"]).endswith(".json") and int(file["size"]) < _DESCRIPTION


def _json_changes(name: str, before: Path, after: Path) -> Iterator[tuple[str, str, str]]:
    old, new = (flatten({"": json.loads(path.read_text(encoding="utf-8"))}) for path in (before, after))
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            values = shortened_pair(old.get(key), new.get(key), room=60)
            yield (f"{name}: {key.removeprefix('.')}", *values)


def _print_weights(before: Path, after: Path, console: Console, limit: int) -> None:
    old, new = stored_tensors(before), stored_tensors(after)
    shapes = [
        (name, *(f"{side[name].kind} {list(side[name].shape)}" if name in side else "-" for side in (old, new)))
        for name in dict.fromkeys([*old, *new])
        if name not in old or name not in new or (old[name].shape, old[name].kind) != (new[name].shape, new[name].kind)
    ]
    if shapes:
        console.print(pairs_table("tensors of other shape or type", shapes[:limit]))
    found = list(compare_weights(old, new))
    different = sorted((part for part in found if part.changed), key=lambda part: -part.largest)
    norm = sum(part.squares for part in found) ** 0.5
    console.print(
        f"\nweights: {len(different)} of {len(found)} tensors differ; all differences together have the norm {number(norm)}"
    )
    if different:
        console.print(_tensors_table(islice(different, limit)))
        if len(different) > limit:
            console.print(f"{len(different) - limit} more tensors differ, by less (--limit)", style="dim")


def _tensors_table(found: Iterable[TensorDifference]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    column(table, "tensor", fold=True)
    for heading in ("shape", "largest difference", "values that differ"):
        column(table, heading, right=heading != "shape")
    for part in found:
        total = number(max(1, math.prod(part.shape)))
        table.add_row(part.name, str(list(part.shape)), number(part.largest), f"{number(part.changed)} of {total}")
    return table
