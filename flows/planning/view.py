"""A plan for people, tables and sentences, and for programs, one JSON object."""

from __future__ import annotations

import json
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.planning.advice import Change, changes_of, remedy_for, space_saved
from flows.planning.plan import Plan
from flows.planning.request import Subject
from flows.wording import duration, number, size

__all__ = ["FORMAT", "as_json", "print_plan"]

FORMAT: Final = 1
"""Of the JSON: raised when a key is taken away or changes its meaning."""
_GIB: Final = 2.0**30
_NAMED: Final = 5
"""Changes that are listed."""
_PARTS: Final = ("weights", "gradients", "optimizer", "reference", "activations", "logits", "keys and values")
"""Columns of the table of memory; what else there is comes under `rest`."""


def print_plan(plan: Plan, subject: Subject, out: Console) -> None:
    """Memory, time and disk by stage, the verdict with what to change, what is there already, and every assumption once."""
    given = plan.given
    shape = given.shape
    devices = f"{given.gpus} x {given.nodes} devices" if given.gpus * given.nodes > 1 else "one device"
    out.print(
        f"[bold]{given.config.name}[/]  {number(shape.parameters)} parameters ({escape(shape.name)}), {devices} of "
        f"{_gib(given.memory)}, {given.profile.name}",
        soft_wrap=True,
    )
    out.print(_memory(plan))
    _print_verdict(plan, out)
    out.print()
    out.print(_cost(plan))
    _print_totals(plan, subject, out)
    out.print("\n[bold]assumed[/]")
    for text in (*subject.assumptions, *_of_memory(plan)):
        out.print(f"  - {escape(text)}", soft_wrap=True)


def as_json(plan: Plan, subject: Subject) -> str:
    """The plan as JSON: bytes, seconds, FLOPs."""
    taken, final = remedy_for(plan) if plan.missing > 0 else ([], plan)
    given, progress = plan.given, subject.progress
    about: dict[str, Any] = {
        "format": FORMAT,
        "name": given.config.name,
        "parameters": given.shape.parameters,
        "model": given.shape.name,
        "device": {"name": given.profile.name, "memory": given.memory, "gpus": given.gpus, "nodes": given.nodes},
        "peak": plan.peak,
        "overhead": plan.overhead,
        "fits": plan.missing <= 0,
        "missing": max(0.0, plan.missing),
        "fullest": plan.worst.name,
        "changes": [_change(change) for change in (changes_of(plan) if plan.missing > 0 else [])],
        "remedy": {"settings": _together(taken), "peak": final.peak, "fits": final.missing <= 0},
        "seconds": plan.seconds,
        "step_seconds": plan.step_seconds,
        "disk": plan.disk,
        "kept": plan.kept,
        "free": subject.free,
        "step_disk": plan.step_disk,
        "stages": [
            {
                "name": stage.name,
                "when": stage.when,
                "calls": plan.counts[stage.when],
                "memory": dict(stage.memory),
                "held": stage.held,
                "peak": stage.peak,
                "tokens": stage.work.tokens,
                "flops": stage.work.flops,
                "seconds": stage.seconds,
                "disk": stage.disk,
            }
            for stage in plan.stages
        ],
        "calls": {"found": progress.found, "total": progress.total, "steps": progress.steps, "note": progress.note},
        "assumptions": [*subject.assumptions, *_of_memory(plan)],
    }
    return json.dumps(about, indent=2, ensure_ascii=False)


def _memory(plan: Plan) -> Table:
    """GiB of the fullest device, by stage and part."""
    shown = [part for part in _PARTS if any(stage.memory.get(part) for stage in plan.stages)]
    unit, name = (_GIB, "GiB") if plan.worst.peak > _GIB else (2.0**20, "MiB")
    table = Table(box=None, padding=(0, 2, 0, 0), title=f"memory of the fullest device, {name}", title_justify="left")
    for column in ("stage", *shown, "rest", "kept by others", "peak"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in plan.stages:
        if not stage.memory:
            continue
        rest = sum(size_ for part, size_ in stage.memory.items() if part not in shown)
        parts = [*(stage.memory.get(part, 0.0) for part in shown), rest, stage.held]
        cells = [f"{part / unit:,.1f}" if part else "" for part in parts]
        mark = "bold" if stage is plan.worst else ""
        table.add_row(stage.name, *cells, f"{stage.peak / unit:,.1f}", style=mark)
    return table


def _print_verdict(plan: Plan, out: Console) -> None:
    total = f"{_gib(plan.peak)} with {_gib(plan.overhead)} for what no formula counts, of {_gib(plan.given.memory)}"
    if plan.missing <= 0:
        out.print(f"[green]fits[/]: {total}", soft_wrap=True)
        return
    out.print(f"[bold red]does not fit[/] by {_gib(plan.missing)}, in {plan.worst.name}: {total}", soft_wrap=True)
    for change in changes_of(plan)[:_NAMED]:
        ends = "[green]fits[/]" if change.fits else f"still {_gib(change.plan.missing)} too much"
        text = f"saves {_gib(change.saves)}, {ends}: {change.text}"
        out.print(f"  -> {text}\n       {escape(change.option)}", soft_wrap=True)
    taken, final = remedy_for(plan)
    if len(taken) > 1:
        ends = "fits" if final.missing <= 0 else f"still {_gib(final.missing)} too much"
        settings = " ".join(f"--set {key}={value}" for key, value in _together(taken).items())
        out.print(f"  together ({ends}, {duration(final.seconds)} in all): {escape(settings)}", soft_wrap=True)


def _cost(plan: Plan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title="time and disk", title_justify="left")
    for column in ("stage", "tokens a call", "TFLOP a call", "time a call", "calls", "time in all", "disk in all"):
        table.add_column(column, justify="left" if column == "stage" else "right")
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


def _print_totals(plan: Plan, subject: Subject, out: Console) -> None:
    progress, steps = subject.progress, plan.counts["step"]
    out.print(
        f"a step: {duration(plan.step_seconds)}, {size(plan.step_disk)}; the run: [bold]{duration(plan.seconds)}[/], "
        f"{size(plan.disk)} written",
        soft_wrap=True,
    )
    _print_disk(plan, subject, out)
    if progress.note:
        out.print(f"the store was not asked to the end: {escape(progress.note)}", soft_wrap=True)
    ends = (
        "nothing is left to compute" if progress.ended else f"continues at step {progress.steps + 1:,} of {steps:,.0f}"
    )
    out.print(f"{progress.found:,} of {progress.total:,} stage calls are there; {ends}", soft_wrap=True)


def _print_disk(plan: Plan, subject: Subject, out: Console) -> None:
    if subject.free is None or plan.kept <= subject.free:
        free = "" if subject.free is None else f" of {size(subject.free)} that are free"
        out.print(f"disk: {size(plan.kept)} stay{free}", soft_wrap=True)
        return
    short = size(plan.kept - subject.free)
    out.print(
        f"[bold red]disk: {size(plan.kept)} would stay[/], {short} more than the {size(subject.free)} that are free",
        soft_wrap=True,
    )
    for option, kept in space_saved(plan):
        out.print(f"  -> {size(kept)} with {escape(option)}", soft_wrap=True)


def _of_memory(plan: Plan) -> list[str]:
    """What every figure of memory rests on."""
    what = "CUDA's context and 5 % that the allocator cannot hand out" if plan.given.gpu else "libraries"
    return [
        f"{_gib(plan.overhead)} of memory beside what is counted: {what}",
        "prompts of a batch are of one length; all stages' residents stay in memory, as they do (pipeline/residency.py)",
    ]


def _change(change: Change) -> dict[str, Any]:
    return {"text": change.text, "settings": dict(change.settings), "saves": change.saves, "fits": change.fits}


def _together(taken: list[Change]) -> dict[str, Any]:
    return {key: value for change in taken for key, value in change.settings.items()}


def _gib(count: float) -> str:
    return f"{count / _GIB:,.1f} GiB"
