"""The report for people, a table with a verdict, and for programs, one JSON object."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.doctor.examination import Report
from flows.doctor.finding import Severity
from flows.doctor.requirements import OURS
from flows.planning.machine import DeviceProfile
from flows.wording import duration, size

__all__ = ["FORMAT", "as_json", "print_profile", "print_report", "verdict_of"]

FORMAT: Final = 1
"""Of the JSON: raised when a key is taken away or changes its meaning."""
_STYLES: Final[dict[Severity, str]] = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def verdict_of(report: Report) -> str:
    """The report in one line."""
    problems, warnings = len(report.of("problem")), len(report.of("warning"))
    also = f"; {_count(warnings, 'warning')}" if warnings else ""
    if problems:
        first = report.of("problem")[0]
        return f"{_count(problems, 'problem')} to mend before a run ({first.check} first){also}"
    return f"nothing stops a run{also}"


def print_report(report: Report, out: Console) -> None:
    """The table, by part; beneath what is not as it should be, what to do about it."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    last = ""
    for part, finding in report.findings:
        if part != last:
            table.add_row(f"[bold]{part}[/]", "", "")
            last = part
        style, text = _STYLES[finding.severity], escape(finding.found)
        if finding.advice:
            text += f"\n[{style}]->[/] {escape(finding.advice)}"
        table.add_row(f"  [{style}]{finding.severity}[/]", finding.check, text)
    out.print(table)
    seconds = f"[dim]({duration(report.seconds)})[/]"
    out.print(f"\n[{_STYLES[report.verdict]}]{escape(verdict_of(report))}[/] {seconds}", soft_wrap=True)


def print_profile(profile: DeviceProfile, out: Console) -> None:
    """What `--bench` measured."""
    table = Table(box=None, padding=(0, 2, 0, 0), title=escape(profile.name), title_justify="left")
    for column in ("model width", "fp32, GFLOP/s", "bf16, GFLOP/s"):
        table.add_column(column, justify="right")
    for width, rate in profile.fp32.items():
        table.add_row(width, f"{rate / 1e9:,.1f}", f"{profile.bf16[width] / 1e9:,.1f}")
    out.print(table)
    out.print(
        f"memory {size(profile.bandwidth)}/s, only reading {size(profile.reading or profile.bandwidth)}/s, "
        f"disk {size(profile.disk)}/s synced, SHA-256 {size(profile.hashing)}/s",
        soft_wrap=True,
    )
    fixed = f"{1e6 * profile.layer_seconds:.0f} and {1e6 * profile.token_seconds:.0f} microseconds a layer"
    out.print(
        f"a small model reaches {profile.training:.2f} of that in training and {profile.decoding:.2f} in decoding, beside "
        f"{fixed}; {profile.threads} threads are {profile.parallel:.2f} times as fast as one",
        soft_wrap=True,
    )
    out.print("[dim]kept for `cohort plan`[/]")


def as_json(report: Report) -> str:
    """The report as JSON, for scripts and for issues."""
    checks = [
        {
            "part": part,
            "check": finding.check,
            "severity": finding.severity,
            "found": finding.found,
            "advice": finding.advice or None,
            "values": finding.values,
        }
        for part, finding in report.findings
    ]
    about: dict[str, Any] = {
        "format": FORMAT,
        "cohort": _version(),
        "root": str(report.subject.places.root),
        "quick": report.subject.quick,
        "seconds": round(report.seconds, 2),
        "verdict": report.verdict,
        "summary": verdict_of(report),
        "checks": checks,
    }
    return json.dumps(about, indent=2, ensure_ascii=False, default=str)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _version() -> str | None:
    try:
        return importlib.metadata.version(OURS)
    except importlib.metadata.PackageNotFoundError:
        return None
