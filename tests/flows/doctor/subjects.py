"""What the tests of `cohort doctor` examine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from flows.doctor.examination import Finding, Subject
from flows.runs.paths import Places


def subject(root: Path, **environment: str) -> Subject:
    return Subject(Places(root), dict(os.environ) | environment)


def with_only(**environment: str) -> Subject:
    """A subject that has only these variables."""
    return Subject(Places(Path("/nowhere")), environment)


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding
