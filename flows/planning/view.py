"""Write a plan for people, as tables and sentences, and for programs, as one JSON object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.planning.plan import Change, Plan, Settings, changes_of, remedy_for, space_saved
from flows.planning.request import Subject
from flows.planning.work import StagePlan
from flows.wording import duration, number, size

FORMAT: Final = 1
"""Of the JSON: raised when a key is taken away or changes its meaning."""
_GIB: Final = 2.0**30
_NAMED: Final = 5
"""Changes that are listed."""
_PARTS: Final = ("weights", "gradients", "optimizer", "reference", "activations", "logits", "keys and values")
"""Columns of the table of memory; what else there is comes under `rest`."""


def print_plan(plan: Plan, subject: Subject, out: Console) -> None:
    """Print memory, time and disk by stage, the verdict with what to change, what is there already, and every assumption."""
    given, machine = plan.given, plan.given.machine
    devices = f"{machine.gpus} x {machine.nodes} devices" if machine.gpus * machine.nodes > 1 else "one device"
    out.print(
        f"[bold]{given.config.name}[/]  {number(given.shape.parameters)} parameters ({escape(given.shape.name)}), "
        f"{devices} of {_gib(machine.memory)}, {machine.profile.name}",
        soft_wrap=True,
    )
    out.print(_memory(plan))
    for line in _verdict(plan):
        out.print(line, soft_wrap=True)
    out.print()
    out.print(_cost(plan))
    for line in _totals(plan, subject):
        out.print(line, soft_wrap=True)
    out.print("\n[bold]assumed[/]")
    for text in _assumptions(plan, subject):
        out.print(f"  - {escape(text)}", soft_wrap=True)


def as_json(plan: Plan, subject: Subject) -> str:
    """Return the plan as JSON: bytes, seconds, FLOPs."""
    taken, final = remedy_for(plan)
    given, progress, machine = plan.given, subject.progress, plan.given.machine
    step_seconds, step_disk = plan.of_a_step()
    about: dict[str, Any] = {
        "format": FORMAT,
        "name": given.config.name,
        "parameters": given.shape.parameters,
        "model": given.shape.name,
        "device": {
            "name": machine.profile.name,
            "memory": machine.memory,
            "gpus": machine.gpus,
            "nodes": machine.nodes,
        },
        "peak": plan.peak,
        "overhead": plan.overhead,
        "fits": plan.missing <= 0,
        "missing": max(0.0, plan.missing),
        "fullest": plan.worst.name,
        "changes": [
            {"text": change.text, "settings": dict(change.settings), "saves": change.saves, "fits": change.fits}
            for change in (changes_of(plan) if plan.missing > 0 else [])
        ],
        "remedy": {"settings": _together(taken), "peak": final.peak, "fits": final.missing <= 0},
        "seconds": plan.seconds,
        "step_seconds": step_seconds,
        "disk": plan.disk,
        "kept": plan.kept,
        "free": subject.free,
        "step_disk": step_disk,
        "stages": [_stage(stage, plan.counts[stage.when]) for stage in plan.stages],
        "calls": {"found": progress.found, "total": progress.total, "steps": progress.steps, "note": progress.note},
        "assumptions": _assumptions(plan, subject),
    }
    return json.dumps(about, indent=2, ensure_ascii=False)


def _stage(stage: StagePlan, calls: float) -> dict[str, Any]:
    return {
        "name": stage.name,
        "when": stage.when,
        "calls": calls,
        "memory": stage.memory,
        "held": stage.held,
        "peak": stage.peak,
        "tokens": stage.work.tokens,
        "flops": stage.work.flops,
        "seconds": stage.seconds,
        "disk": stage.disk,
    }


def _table(title: str, columns: Sequence[str]) -> Table:
    """Make a table of numbers, a row per stage."""
    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "stage" else "right")
    return table


def _memory(plan: Plan) -> Table:
    """Return the memory of the fullest device, by stage and part."""
    shown = [part for part in _PARTS if any(stage.memory.get(part) for stage in plan.stages)]
    unit, name = (_GIB, "GiB") if plan.worst.peak > _GIB else (2.0**20, "MiB")
    table = _table(f"memory of the fullest device, {name}", ["stage", *shown, "rest", "kept by others", "peak"])
    for stage in (stage for stage in plan.stages if stage.memory):
        rest = sum(size_ for part, size_ in stage.memory.items() if part not in shown)
        parts = [*(stage.memory.get(part, 0.0) for part in shown), rest, stage.held]
        cells = [f"{part / unit:,.1f}" if part else "" for part in parts]
        mark = "bold" if stage is plan.worst else ""
        table.add_row(stage.name, *cells, f"{stage.peak / unit:,.1f}", style=mark)
    return table


def _verdict(plan: Plan) -> list[str]:
    """Say whether it fits, and if not, list changes one by one and together."""
    total = (
        f"{_gib(plan.peak)} with {_gib(plan.overhead)} for what no formula counts, of {_gib(plan.given.machine.memory)}"
    )
    if plan.missing <= 0:
        return [f"[green]fits[/]: {total}"]
    lines = [f"[bold red]does not fit[/] by {_gib(plan.missing)}, in {plan.worst.name}: {total}"]
    for change in changes_of(plan)[:_NAMED]:
        ends = _ends(change.plan, "[green]fits[/]")
        text = f"saves {_gib(change.saves)}, {ends}: {change.text}"
        lines.append(f"  -> {text}\n       {escape(_options(change.settings))}")
    taken, final = remedy_for(plan)
    if len(taken) > 1:
        settings = escape(_options(_together(taken)))
        lines.append(f"  together ({_ends(final, 'fits')}, {duration(final.seconds)} in all): {settings}")
    return lines


def _ends(plan: Plan, fits: str) -> str:
    return fits if plan.missing <= 0 else f"still {_gib(plan.missing)} too much"


def _cost(plan: Plan) -> Table:
    columns = ("stage", "tokens a call", "TFLOP a call", "time a call", "calls", "time in all", "disk in all")
    table = _table("time and disk", columns)
    for stage in plan.stages:
        calls = plan.counts[stage.when]
        table.add_row(
            stage.name,
            f"{stage.work.tokens:,.0f}",
            f"{stage.work.flops / 1e12:,.4g}",
            duration(stage.seconds),
            f"{calls:,.0f}",
            duration(plan.total(stage)),
            size(stage.disk * calls),
        )
    return table


def _totals(plan: Plan, subject: Subject) -> list[str]:
    """Write time and disk of the run, and how much of it is there."""
    progress, steps = subject.progress, plan.counts["step"]
    seconds, written = plan.of_a_step()
    whole = f"the run: [bold]{duration(plan.seconds)}[/], {size(plan.disk)} written"
    lines = [f"a step: {duration(seconds)}, {size(written)}; {whole}", *_disk(plan, subject)]
    if progress.note:
        lines.append(f"the store was not asked to the end: {escape(progress.note)}")
    ends = (
        "nothing is left to compute" if progress.ended else f"continues at step {progress.steps + 1:,} of {steps:,.0f}"
    )
    return [*lines, f"{progress.found:,} of {progress.total:,} stage calls are there; {ends}"]


def _disk(plan: Plan, subject: Subject) -> list[str]:
    if subject.free is None or plan.kept <= subject.free:
        free = "" if subject.free is None else f" of {size(subject.free)} that are free"
        return [f"disk: {size(plan.kept)} stay{free}"]
    short = f"{size(plan.kept - subject.free)} more than the {size(subject.free)} that are free"
    lines = [f"[bold red]disk: {size(plan.kept)} would stay[/], {short}"]
    return lines + [f"  -> {size(kept)} with {escape(_options(settings))}" for settings, kept in space_saved(plan)]


def _assumptions(plan: Plan, subject: Subject) -> list[str]:
    """List what the figures rest on; those of memory last."""
    what = "CUDA's context and 5 % that the allocator cannot hand out" if plan.given.gpu else "libraries"
    return [
        *subject.assumptions,
        *_of_checkpoints(plan),
        *_of_host_memory(plan),
        f"{_gib(plan.overhead)} of memory on top of what is counted: {what}",
        "prompts of a batch are of one length; all stages' residents stay in memory, as they do (pipeline/residency.py)",
    ]


def _of_checkpoints(plan: Plan) -> list[str]:
    """Say how often the step's training leaves a checkpoint, where that is not every step."""
    share = min(stage.written for stage in plan.stages)
    how = ", while other stages run and at no cost to them" if plan.given.config.checkpoint.background else ""
    text = f"{share * plan.counts['step']:,.0f} of {plan.counts['step']:,.0f} steps leave a checkpoint"
    setting = f"checkpoint.every={plan.given.config.checkpoint.every}"
    if plan.given.config.checkpoint.every == "auto":
        here = "as far as" if plan.given.free is not None else "if"
        setting += f", {here} a tenth of the free disk holds them"
    return [f"{text} ({setting}), which is written{how}"] if share < 1 else []


def _of_host_memory(plan: Plan) -> list[str]:
    """Say what the ranks of a host keep outside of their GPUs: the reference, where it is scored in a pass of its own."""
    weights = [stage.memory["weights"] for stage in plan.stages if stage.name == "reference"]
    if not weights or not plan.given.gpu:
        return []
    here = min(plan.ranks, plan.given.machine.gpus)
    return [f"between its passes the reference is in pinned memory of the host, {here} x {_gib(weights[0])}"]


def _together(taken: Sequence[Change]) -> dict[str, Any]:
    return {key: value for change in taken for key, value in change.settings.items()}


def _options(settings: Settings) -> str:
    """Write settings as the command line takes them."""
    return " ".join(f"--set {key}={_written(value)}" for key, value in settings.items())


def _written(value: Any) -> str:
    if isinstance(value, dict):
        inside = ", ".join(f"{key}: {_written(part)}" for key, part in value.items())
        return f"'{{{inside}}}'"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _gib(count: float) -> str:
    return f"{count / _GIB:,.1f} GiB"
