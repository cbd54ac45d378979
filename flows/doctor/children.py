"""Questions that are put to other processes, so that what crashes, hangs or must be killed is not this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flows.doctor.finding import Severity

__all__ = ["Answer", "ask", "importing_ours", "probing", "together"]

_PROBE: Final = Path(__file__).with_name("probe.py")
"""A program for any Python interpreter: it needs the standard library, and what it is asked about."""
_LINES: Final = 3
_GRACE: Final = 2.0
"""Seconds."""


@dataclass(frozen=True)
class Answer:
    """How a process ended."""

    exit_code: int | None
    """Negative: the signal that ended it. None: it was killed at the deadline."""
    output: str
    errors: str

    @property
    def severity(self) -> Severity:
        """What its failure is: one that was only late may be the victim of a busy machine."""
        return "warning" if self.exit_code is None else "problem"

    def values(self) -> list[dict[str, Any]]:
        """The JSON objects that it printed, one a line; what libraries print besides is passed over."""
        return [json.loads(line) for line in self.output.splitlines() if line.startswith("{") and line.endswith("}")]

    def failure(self) -> str:
        """How it failed, with its last words."""
        last = " / ".join(self.errors.strip().splitlines()[-_LINES:])
        ended = "did not end in time" if self.exit_code is None else f"ended with exit code {self.exit_code}"
        return f"{ended}: {last}" if last else ended


def ask(command: Sequence[str | Path], environment: Mapping[str, str], *, deadline: float) -> Answer:
    """Run one program; it is killed after `deadline` seconds.

    Raises:
        OSError: there is no such program, or it is none.
    """
    return together([command], [environment], deadline=deadline)[0]


def together(
    commands: Sequence[Sequence[str | Path]], environments: Sequence[Mapping[str, str]], *, deadline: float
) -> list[Answer]:
    """Run programs side by side, each with an environment of its own.

    None is left after `deadline` seconds, or soon after one of them failed.

    Raises:
        OSError: there is no such program, or it is none.
    """
    end = time.monotonic() + deadline
    with tempfile.TemporaryDirectory(prefix="cohort-doctor-") as folder:
        places = [Path(folder, str(number)) for number in range(len(commands))]
        children: list[subprocess.Popen[bytes]] = []
        try:
            for command, environment, place in zip(commands, environments, places, strict=True):
                children.append(_started(command, environment, place))
            codes = _codes(children, end)
        finally:
            for child in children:
                child.kill()
                child.wait()
        return [
            Answer(code, _text(place, "out"), _text(place, "err")) for code, place in zip(codes, places, strict=True)
        ]


def probing(*arguments: str | Path, python: Path | None = None) -> list[str | Path]:
    """The command line for the probe in an interpreter, by default this one."""
    return [python or sys.executable, "-P", _PROBE, *arguments]


def importing_ours(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child of this interpreter that imports our packages, installed or not."""
    ours = str(Path(__file__).parents[2])
    return {**environment, "PYTHONPATH": os.pathsep.join([ours, *filter(None, [environment.get("PYTHONPATH")])])}


def _started(command: Sequence[str | Path], environment: Mapping[str, str], place: Path) -> subprocess.Popen[bytes]:
    # Files, not pipes: what prints much must not wait for a reader. No session: Ctrl-C reaches the children too.
    with Path(f"{place}.out").open("wb") as out, Path(f"{place}.err").open("wb") as err:
        return subprocess.Popen(command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=out, stderr=err)


def _codes(children: Sequence[subprocess.Popen[bytes]], end: float) -> list[int | None]:
    """Exit codes once all have ended, time is up, or one failed and the others, who may wait for it, had their chance."""
    while any(child.poll() is None for child in children) and time.monotonic() < end:
        if any(child.poll() for child in children):
            end = min(end, time.monotonic() + _GRACE)
        time.sleep(0.02)
    return [child.poll() for child in children]


def _text(place: Path, stream: str) -> str:
    return Path(f"{place}.{stream}").read_text(encoding="utf-8", errors="replace")
