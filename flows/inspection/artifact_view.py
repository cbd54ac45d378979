"""Print artifacts: what made them, then what is in them as far as people can read it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.inspection.groups import Group, groups_of
from flows.inspection.history import ways_back
from flows.runs.paths import Places
from flows.wording import duration, moment, number, quoted, size
from pipeline.config import ConfigError, flatten
from pipeline.diff import read_rows, stored_tensors
from pipeline.store import PrunedArtifactError, Store

_CELL: Final = 60
"""Characters of a value in a table of rows."""
_WIDE: Final = 110
"""Characters from which on there is room for three columns of metrics."""


def show_artifact(
    places: Places, store: Store, digest: str, console: Console, *, limit: int | None, question: str | None, full: bool
) -> None:
    """Print an artifact: its origin and metrics, then groups of outputs, rows, or a checkpoint's description.

    Trained state that is gone is made again; of what was not written the description is there.
    """
    with contextlib.suppress(PrunedArtifactError):
        store.path(digest, partial=True)
    manifest, calls = store.manifest(digest), list(store.actions())
    table = any(file["name"] == "table.arrow" for file in manifest["files"])
    groups = groups_of(store, digest, calls) if table else None
    if question is not None and groups is None:
        raise ConfigError(f"--question: {digest[:12]} has no groups of outputs; it is a {manifest['type']}")
    _show_origin([call for call in calls if call["result"] == digest], manifest, digest, console, full=full)
    if manifest.get("unwritten"):
        back = ways_back(places, store, [digest])
        console.print(
            f"[yellow]{back[digest]}[/]; [bold]cohort export {digest[:12]} FOLDER[/] makes it", soft_wrap=True
        )
    if ((folder := store.path(digest, partial=True)) / "config.json").exists():
        _show_checkpoint(folder, console)
    if groups is not None:
        show_groups(groups, console, limit=limit, question=question)
    elif table:
        _show_rows(store, digest, console, limit or 10)


def show_groups(groups: Iterable[Group], console: Console, *, limit: int | None, question: str | None) -> None:
    """Print questions with their outputs, three by default, or that of one id; raise ValueError where no group has it."""
    wanted = (group for group in groups if question in (None, group.question_id))
    found = list(islice(wanted, limit or 3))
    if question is not None and not found:
        raise ValueError(f"--question {question}: no group of this table has that question_id")
    for group in found:
        _show_group(group, console)
        if question is not None:
            _show_dialogues(group, console)


def show_metrics(metrics: Mapping[str, float], console: Console) -> None:
    """Print metrics in two or three columns of name and value, as many as there is room for."""
    if not metrics:
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), title="metrics", title_justify="left")
    entries = [cell for name, value in sorted(metrics.items()) for cell in (f"[dim]{quoted(name)}[/]", number(value))]
    cells = 6 if console.width >= _WIDE else 4
    for start in range(0, len(entries), cells):
        table.add_row(*entries[start : start + cells])
    console.print(table)


def _show_origin(
    calls: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any], digest: str, console: Console, *, full: bool
) -> None:
    made: Mapping[str, Any] = calls[-1] if calls else manifest.get("provenance") or {}
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(quoted(manifest.get("type", "artifact")), f"[bold]{digest}[/]")
    if manifest["digest"] != digest and not manifest.get("unwritten"):
        table.add_row("content", f"{manifest['digest']} (trained state is named by the call that made it)")
    if made:
        seconds = f", took {duration(made['seconds'])}" if "seconds" in made else ""
        brought = f", brought by {made['imported']}" if made.get("imported") else ""
        what = f"{made.get('stage', 'an unnamed stage')} (version {made.get('version', '-')})"
        table.add_row("made by", f"{quoted(what)}, {moment(made.get('created', 0.0))}{seconds}{quoted(brought)}")
        for name, value in made.get("arguments", {}).items():
            table.add_row(f"  {quoted(name)}", _argument(value, full=full))
    total = sum(file["size"] for file in manifest["files"])
    rows = f", {number(manifest['rows'])} rows" if "rows" in manifest else ""
    table.add_row("files", quoted(", ".join(f"{file['name']} {size(file['size'])}" for file in manifest["files"])))
    table.add_row("size", f"{size(total)}{rows}")
    console.print(table)
    show_metrics(made.get("metrics") or {}, console)


def _argument(value: Any, *, full: bool) -> str:
    match value:
        case {"artifact": str(digest)}:
            return f"artifact [cyan]{digest[:12]}[/]"
        case {"config": dict(config)}:
            flat = flatten(config)
            if full:
                return quoted("\n".join(f"{key}: {part}" for key, part in flat.items()))
            return f"configuration of {len(flat)} fields [dim](--full shows them)[/]"
        case _:
            return quoted(str(value))


def _show_group(group: Group, console: Console) -> None:
    console.print()
    console.print(Text.assemble((group.question_id, "dim"), "  ", (group.question.strip(), "bold")))
    console.print(Text.assemble(("answer ", "dim"), group.answer))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("count", "reward", "advantage", "status", "read as", "tokens"):
        table.add_column(heading, justify="right" if heading in ("count", "reward", "advantage", "tokens") else "left")
    table.add_column("output", overflow="fold")
    for count, output in sorted(group.merged(), key=lambda part: (-(part[1].reward or 0.0), -part[0])):
        colour = {"ok": "green", "wrong": "red", "": "dim"}.get(output.status, "yellow")
        table.add_row(
            f"{count} x",
            "-" if output.reward is None else f"{output.reward:.2f}",
            "-" if output.advantage is None else f"{output.advantage:+.3f}",
            Text(output.status, style=colour),
            Text(output.extracted or "-"),
            f"{output.tokens}{'+' if output.finish_reason == 'length' else ''}",
            Text(output.text.strip().replace("\n", " / ")),
        )
    console.print(table)


def _show_dialogues(group: Group, console: Console) -> None:
    """Print the turns of each output that an environment answered, with its calls, and its reward and advantage."""
    for count, output in group.merged():
        if not output.turns:
            continue
        reward = "-" if output.reward is None else f"{output.reward:.2f}"
        advantage = "-" if output.advantage is None else f"{output.advantage:+.3f}"
        console.print(f"\n{count} x  {quoted(output.status)}  [dim]reward[/] {reward}  [dim]advantage[/] {advantage}")
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for part in output.turns:
            table.add_row(Text("policy" if part.own else "environment", style="dim"), Text(part.text.strip("\n")))
            if part.tool:
                made = f"{part.tool} {part.given!r}: {part.status}"
                table.add_row(Text("call", style="dim"), Text(made, style="cyan"))
        console.print(table)


def _show_rows(store: Store, digest: str, console: Console, limit: int) -> None:
    content = read_rows(store, digest)
    if content is None:
        return
    table = Table(title=f"first rows of {content.num_rows:,}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for field in content.schema:
        table.add_column(f"{field.name}\n[dim]{field.type}{'?' if field.nullable else ''}[/]", overflow="fold")
    for row in content.slice(0, limit).to_pylist():
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    console.print(table)


def _cell(value: Any) -> str:
    text = "-" if value is None else str(value).replace("\n", " / ")
    return text if len(text) <= _CELL else f"{text[: _CELL - 3]}..."


def _show_checkpoint(folder: Path, console: Console) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("folder", str(folder))
    table.add_row(
        "architecture", quoted(", ".join(map(str, config.get("architectures") or [config.get("model_type")])))
    )
    if tensors := stored_tensors(folder):
        table.add_row("parameters", f"{sum(tensor.size for tensor in tensors.values()):,}")
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"):
        if name in config:
            table.add_row(name.replace("_", " "), quoted(number(config[name])))
    trainer = folder / "trainer_state.json"
    if trainer.exists():
        for name, value in flatten(json.loads(trainer.read_text(encoding="utf-8"))).items():
            table.add_row(f"trainer: {quoted(name)}", quoted(number(value)))
    console.print(table)
