"""All checks, side by side: each has a deadline, and one that fails is a finding, never an error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from flows.doctor import devices, engines, imports, places, servers, surroundings, versions
from flows.doctor.finding import SEVERITIES, Finding, Severity, redacted
from flows.doctor.subject import Subject

__all__ = ["CHECKS", "Check", "Report", "examine"]


@dataclass(frozen=True)
class Check:
    """A check, and when it is made."""

    part: str
    """The heading that its findings stand under."""
    run: Callable[[Subject], Iterable[Finding]]
    deadline: float = 30.0
    """Seconds."""
    quick: bool | None = None
    """True: only with `--quick`; False: only without, for what is heavy; None: always."""

    @property
    def name(self) -> str:
        """What a failure of the check itself is called."""
        return self.run.__name__.replace("_", ".")


CHECKS: Final = (
    Check("versions", versions.python),
    Check("versions", versions.packages),
    Check("versions", versions.companions),
    Check("versions", versions.ground_types),
    Check("versions", imports.imports, deadline=400.0, quick=False),
    Check("versions", engines.vllm, deadline=100.0),
    Check("versions", engines.vllm_imports, deadline=100.0, quick=False),
    Check("devices", devices.processors),
    Check("devices", devices.memory),
    Check("devices", devices.driver, quick=True),
    Check("devices", devices.torch, deadline=100.0, quick=False),
    Check("store", places.file_system),
    Check("store", places.space),
    Check("store", places.commits),
    Check("store", places.locking),
    Check("store", places.records),
    Check("store", places.temporary),
    Check("servers", servers.prefect),
    Check("servers", servers.prefect_database),
    Check("servers", servers.mlflow),
    Check("servers", servers.loopback),
    Check("servers", servers.proxies),
    Check("servers", engines.vllm_servers),
    Check("environment", surroundings.launcher),
    Check("environment", surroundings.threads),
    Check("environment", surroundings.switches),
)
"""Adding a check is a function and a line here."""


@dataclass(frozen=True)
class Report:
    """What all checks found."""

    subject: Subject
    findings: tuple[tuple[str, Finding], ...]
    """With the heading of each, in the order of the checks."""
    seconds: float

    def of(self, severity: Severity) -> list[Finding]:
        """The findings of one severity."""
        return [finding for _, finding in self.findings if finding.severity == severity]

    @property
    def verdict(self) -> Severity:
        """The worst there is."""
        return max((finding.severity for _, finding in self.findings), key=SEVERITIES.index, default="ok")


@dataclass
class _Visit:
    """A check on its way, in a thread of its own; one that hangs is left behind."""

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
        except Exception as error:  # whatever is wrong with this machine must not hide what else is
            found.append(self._failure(f"{type(error).__name__}: {error}"))

    def end(self, until: float) -> None:
        """Wait until the check has ended or time is up; what a late one still finds is not listened to."""
        assert self.thread is not None
        self.thread.join(max(0.0, until - time.monotonic()))
        if self.thread.is_alive():
            self.found = [*self.found, self._failure(f"no answer within {self.check.deadline:g} s")]

    def _failure(self, text: str) -> Finding:
        advice = "what it looks at hangs or is in a state that nobody thought of"
        return Finding(self.check.name, "problem", f"the check itself failed: {text}", advice)


def examine(
    subject: Subject, checks: Sequence[Check] = CHECKS, *, announce: Callable[[str], None] = lambda name: None
) -> Report:
    """Make the checks that are due: the light ones side by side, then the heavy ones, one after another.

    What they say is without logins and tokens.

    Args:
        announce: is told the name of each heavy check when it begins.
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
    found = tuple((visit.check.part, _told(finding)) for visit in visits for finding in visit.found)
    return Report(subject, found, time.monotonic() - began)


def _told(finding: Finding) -> Finding:
    return replace(
        finding,
        found=redacted(finding.found),
        advice=redacted(finding.advice),
        values=redacted(finding.values),
    )
