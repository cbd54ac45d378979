"""Write differences: tables of before and after, and long values cut to where they part."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from flows.wording import quoted
from pipeline.lineage import ABSENT, Change

_NAME: Final = 44
"""Characters of a name in one line."""
_LEAD: Final = 8
"""Characters shown before the place where two texts part."""


def column(table: Table, heading: str, *, right: bool = False, fold: bool = False) -> None:
    """Add a column that is never cut; with `fold` one that gives way where the screen is narrow."""
    table.add_column(quoted(heading), justify="right" if right else "left", no_wrap=not fold, overflow="fold")


def pairs_table(
    title: str,
    rows: Sequence[Sequence[str]],
    *,
    names: tuple[str, str] = ("before", "after"),
    change: bool = False,
) -> Group:
    """Return a table with rows of a name, its value in both, and with `change` the difference of numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    column(table, "")
    for name in names:
        table.add_column(quoted(name), justify="right" if change else "left", overflow="fold")
    if change:
        column(table, "change", right=True)
    for row in rows:
        table.add_row(broken(row[0], _NAME), *(Text(cell) for cell in row[1:]))
    return titled(title, table)


def broken(key: str, room: int) -> Text:
    """Return a dotted key in lines of at most `room` characters, parted behind dots."""
    lines = [""]
    for part in re.findall(r"[^.]*\.|[^.]+$", key):
        if lines[-1] and len(lines[-1]) + len(part) > room:
            lines.append("  ")
        lines[-1] += part
    return Text("\n".join(lines))


def titled(title: str, table: Table) -> Group:
    """Return a table below an empty line and its title, which may be wider than the table."""
    return Group(Text(f"\n{title}", style="bold"), table)


def essential(changes: Iterable[Change]) -> list[Change]:
    """Leave out the changes that only follow from another `kind`: fields that one of the two kinds does not have."""
    found = list(dict.fromkeys(changes))
    kinds = {(change.stage, change.part.removesuffix("kind")) for change in found if change.part.endswith("kind")}

    def follows(change: Change) -> bool:
        one_sided = ABSENT in (change.before, change.after)
        return one_sided and any(change.stage == stage and change.part.startswith(prefix) for stage, prefix in kinds)

    return [change for change in found if not follows(change)]


def shortened_pair(before: Any, after: Any, *, room: int) -> tuple[str, str]:
    """Return two values as texts of at most `room` characters each, cut so that the place where they part is in sight.

    Lists say at which place they part, counted from 0, and how long they are.
    """
    if isinstance(before, list) and isinstance(after, list) and before and after and not _is_map(before):
        return _lists(before, after)
    old, new = (_text(value) for value in (before, after))
    if max(len(old), len(new)) <= room:
        return old, new
    start = max(0, _parting(old, new) - _LEAD)
    return _cut(old, start, room), _cut(new, start, room)


def _lists(before: list[Any], after: list[Any]) -> tuple[str, str]:
    place = _parting(before, after)
    texts = []
    for values in (before, after):
        value = _text(values[place]) if place < len(values) else "ends"
        texts.append(f"{value} ({place} of {len(values)})")
    return texts[0], texts[1]


def _is_map(values: list[Any]) -> bool:
    """Return whether these are the entries of an Arrow map."""
    return all(isinstance(part, tuple) and len(part) == 2 for part in values)


def _parting(before: Sequence[Any], after: Sequence[Any]) -> int:
    """Return the first place where two sequences differ."""
    pairs = enumerate(zip(before, after, strict=False))
    return next((place for place, (old, new) in pairs if old != new), min(len(before), len(after)))


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and value and _is_map(value):
        return ", ".join(f"{name} {_text(part)}" for name, part in value)
    return str(value).replace("\n", " / ")


def _cut(text: str, start: int, room: int) -> str:
    head = "..." if start else ""
    tail = "..." if len(text) - start > room - len(head) else ""
    return f"{head}{text[start : start + room - len(head) - len(tail)]}{tail}"
