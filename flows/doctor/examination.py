"""What `cohort doctor` examines and finds: a subject, the findings of checks, and the report of all checks."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.runs.paths import Places
from flows.wording import duration
from pipeline.config import flatten
from stages.rollout.config import VLLMBackendConfig, VLLMServerConfig

if TYPE_CHECKING:
    from flows.config import IterativeRLConfig

OURS: Final = "cohort-rl"
FORMAT: Final = 1
"""Of the JSON: raised when a key is removed or changes its meaning."""

Severity = Literal["ok", "warning", "problem"]
SEVERITIES: Final[tuple[Severity, ...]] = ("ok", "warning", "problem")
"""From harmless to what stops a run."""
_STYLES: Final[dict[Severity, str]] = {"ok": "green", "warning": "yellow", "problem": "bold red"}

_LOGIN: Final = re.compile(r"([A-Za-z][\w+.-]*://)[^/\s@'\"]*(?:@[^/\s@'\"]*)*@")
_PARAMETER: Final = re.compile(r"(?i)([\w-]*(?:token|secret|password|passwd|pwd|key|credentials?)=)[^&\s'\"]+")


@dataclass(frozen=True)
class Subject:
    """A machine as a run would find it."""

    places: Places
    environment: Mapping[str, str]
    """Environment variables, with those that Cohort itself sets by default."""
    quick: bool = False
    """Nothing heavy is imported, and no process that does is started."""
    vllm: bool = False
    """Whether vLLM is wanted; otherwise its absence is no fault."""
    vllm_python: Path | None = None
    """Interpreter of the environment that has vLLM; None: this one."""
    vllm_servers: tuple[str, ...] = ()
    """Addresses of running `vllm serve` that the configuration names."""
    ranks: int = 1
    """Ranks that the configuration trains on this host."""


def subject_of(
    places: Places,
    environment: Mapping[str, str],
    *,
    quick: bool = False,
    vllm_python: Path | None = None,
    config: IterativeRLConfig | None = None,
) -> Subject:
    """Return what to examine for a configuration, or for any (None); `vllm_python` replaces the interpreter it names."""
    backends = [config.rollout.backend, config.evaluation.backend] if config else []
    engines = [backend for backend in backends if isinstance(backend, VLLMBackendConfig)]
    settings = flatten(config.model_dump(mode="json")) if config else {}
    return Subject(
        places=places,
        environment=environment,
        quick=quick,
        vllm=bool(engines or vllm_python),
        vllm_python=vllm_python or next((engine.python for engine in engines if engine.python), None),
        vllm_servers=tuple({backend.url: None for backend in backends if isinstance(backend, VLLMServerConfig)}),
        ranks=max([_ranks_here(settings, key) for key in settings if key.endswith("training.engine.ranks")], default=1),
    )


def _ranks_here(settings: Mapping[str, Any], key: str) -> int:
    """Return the ranks of a training that are on this host, which is the first."""
    hosts = settings.get(f"{key.removesuffix('ranks')}hosts")
    return int(hosts[0]["ranks"] if hosts else settings[key])


@dataclass(frozen=True)
class Finding:
    """One result of a check."""

    check: str
    """Stable name, which scripts may rely on: `python`, `package.torch`, `locking`."""
    severity: Severity
    found: str
    """The state found, in one sentence."""
    advice: str = ""
    """What to do; a report leaves it out where the severity is "ok"."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The same for programs: plain JSON values."""


def redacted(value: Any) -> Any:
    """Return the value without secrets: logins in URLs, and parameters with the name of a secret."""
    if isinstance(value, str):
        return _PARAMETER.sub(r"\1***", _LOGIN.sub(r"\1***@", value))
    if isinstance(value, Mapping):
        return {name: redacted(part) for name, part in value.items()}
    return [redacted(part) for part in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Check:
    """A check, and when it runs."""

    part: str
    """The heading of its findings."""
    run: Callable[[Subject], Iterable[Finding]]
    deadline: float = 30.0
    """Seconds."""
    quick: bool | None = None
    """True: only with `--quick`; False: only without, for what is heavy; None: always."""

    @property
    def name(self) -> str:
        """Name under which a failure of the check itself is reported."""
        return self.run.__name__.replace("_", ".")


@dataclass(frozen=True)
class Report:
    """The findings of all checks."""

    subject: Subject
    findings: tuple[tuple[str, Finding], ...]
    """With the heading of each, in the order of the checks."""
    seconds: float

    def of(self, severity: Severity) -> list[Finding]:
        """Return the findings of one severity."""
        return [finding for _, finding in self.findings if finding.severity == severity]

    @property
    def verdict(self) -> Severity:
        """The worst severity."""
        return max((finding.severity for _, finding in self.findings), key=SEVERITIES.index, default="ok")

    @property
    def summary(self) -> str:
        """The report in one line."""
        problems, warnings = self.of("problem"), len(self.of("warning"))
        also = f"; {_count(warnings, 'warning')}" if warnings else ""
        if problems:
            return f"{_count(len(problems), 'problem')} to fix before a run ({problems[0].check} first){also}"
        return f"nothing stops a run{also}"

    def json(self) -> str:
        """Return the report as JSON, for scripts and for issues."""
        version = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(OURS)
        checks = [
            {"part": part} | dataclasses.asdict(finding) | {"advice": finding.advice or None}
            for part, finding in self.findings
        ]
        about = {
            "format": FORMAT,
            "cohort": version,
            "root": str(self.subject.places.root),
            "quick": self.subject.quick,
            "seconds": round(self.seconds, 2),
            "verdict": self.verdict,
            "summary": self.summary,
            "checks": checks,
        }
        return json.dumps(about, indent=2, ensure_ascii=False, default=str)

    def print(self, out: Console) -> None:
        """Print a table by part, with advice below each finding that needs some, and the summary."""
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        last = ""
        for part, finding in self.findings:
            if part != last:
                table.add_row(f"[bold]{part}[/]", "", "")
                last = part
            style, text = _STYLES[finding.severity], escape(finding.found)
            if finding.advice:
                text += f"\n[{style}]->[/] {escape(finding.advice)}"
            table.add_row(f"  [{style}]{finding.severity}[/]", finding.check, text)
        out.print(table)
        seconds = f"[dim]({duration(self.seconds)})[/]"
        out.print(f"\n[{_STYLES[self.verdict]}]{escape(self.summary)}[/] {seconds}", soft_wrap=True)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


@dataclass
class _Visit:
    """A check in a thread of its own; a check that hangs is abandoned."""

    check: Check
    found: list[Finding] = field(default_factory=list)
    thread: threading.Thread | None = None

    def begin(self, subject: Subject) -> None:
        self.thread = threading.Thread(target=self._run, args=(subject,), name=self.check.name, daemon=True)
        self.thread.start()

    def _run(self, subject: Subject) -> None:
        found = self.found
        try:
            for finding in self.check.run(subject):
                found.append(finding)  # each when it is made, so that a late check keeps those it had
        except Exception as error:  # whatever is wrong with this machine must not hide other findings
            found.append(self._failure(f"{type(error).__name__}: {error}"))

    def end(self, until: float) -> None:
        """Wait until the check has ended or time is up; later findings are ignored."""
        assert self.thread is not None
        self.thread.join(max(0.0, until - time.monotonic()))
        if self.thread.is_alive():
            self.found = [*self.found, self._failure(f"no answer within {self.check.deadline:g} s")]

    def _failure(self, text: str) -> Finding:
        advice = "what it examines hangs or is in an unexpected state"
        return Finding(self.check.name, "problem", f"the check itself failed: {text}", advice)


def examine(
    subject: Subject, checks: Sequence[Check], *, announce: Callable[[str], None] = lambda name: None
) -> Report:
    """Run the checks that are due: the light ones side by side, then the heavy ones one after another.

    Findings are without logins and tokens.

    Args:
        announce: is called with the name of each heavy check when it begins.
    """
    began = time.monotonic()
    visits = [_Visit(check) for check in checks if check.quick in (None, subject.quick)]
    light = [visit for visit in visits if visit.check.quick is not False]
    for visit in light:
        visit.begin(subject)
    for visit in light:
        visit.end(began + visit.check.deadline)
    for visit in visits:
        if visit.check.quick is False:
            announce(visit.check.name)
            visit.begin(subject)
            visit.end(time.monotonic() + visit.check.deadline)
    found = tuple((visit.check.part, _redacted(finding)) for visit in visits for finding in visit.found)
    return Report(subject, found, time.monotonic() - began)


def _redacted(finding: Finding) -> Finding:
    found, advice, values = redacted([finding.found, finding.advice, finding.values])
    return dataclasses.replace(finding, found=found, advice="" if finding.severity == "ok" else advice, values=values)
