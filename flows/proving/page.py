"""The result as tables: on the terminal, and as one HTML page to send."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from flows.runs.record import write_text
from flows.wording import duration, size

_DASH: Final = "-"
_HEADINGS: Final = ("engine", "tokens/s", "update", "MFU", "peak memory", "mismatch", "sampling, plan", "update, plan")


def rows_of(result: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of text for each engine; an engine that failed has its first words."""
    return [_row(arm) for arm in result["engines"]]


def _row(arm: Mapping[str, Any]) -> list[str]:
    if arm["error"]:
        return [arm["name"], f"failed: {arm['error'].splitlines()[-1][:80]}", *[_DASH] * (len(_HEADINGS) - 2)]
    planned = arm["planned"]
    return [
        arm["name"],
        _text(arm["sampling_tokens_per_s"], "{:,.0f}"),
        duration(arm["update_seconds"]) if arm["update_seconds"] else _DASH,
        _text(planned["update_mfu"], "{:.1%}"),
        size(arm["update_peak_mb"] * 1e6) if arm["update_peak_mb"] else _DASH,
        _text(arm["mismatch_mean"], "{:.2g}"),
        _ratio(planned["sampling_seconds"], arm["sampling_seconds"]),
        _ratio(planned["update_seconds"], arm["update_seconds"]),
    ]


def _text(value: float | None, how: str) -> str:
    return _DASH if value is None else how.format(value)


def _ratio(planned: float, measured: float | None) -> str:
    return f"{planned / measured:.2f}" if measured else _DASH


def resumption_of(result: Mapping[str, Any]) -> str:
    """Say in a sentence how the run that was killed went on."""
    found = result["resumed"]
    if found["error"]:
        return f"Kill and resume failed: {found['error'].splitlines()[-1][:200]}"
    if not found["killed"]:
        return "The run had ended before it could be killed."
    made = f"killed after {found['updates_before']} of {result['shape']['steps']} updates, resumed"
    replayed = f"{found['updates_replayed']} replayed"
    equal = "with equal bits" if found["equal"] else "with other bits (kernels without a fixed order of sums)"
    return f"A run was {made} ({replayed}), and ended {equal}."


def table_of(result: Mapping[str, Any]) -> Table:
    """Return the table for a terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in _HEADINGS:
        table.add_column(heading)
    for row in rows_of(result):
        table.add_row(*row)
    return table


def write_page(result: Mapping[str, Any], file: Path) -> None:
    """Write one HTML file without scripts; everything in it is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("page.html.j2").render(
        result=result,
        headings=_HEADINGS,
        rows=rows_of(result),
        resumption=resumption_of(result),
        failures=[(arm["name"], arm["error"]) for arm in result["engines"] if arm["error"]],
        memory=size(result["machine"]["memory"]),
        took=duration(result["seconds"]),
    )
    write_text(file, text)
