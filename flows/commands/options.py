"""Options that several commands share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

__all__ = ["ConfigFiles", "Method", "Root", "Settings", "console", "debugging"]

Root = Annotated[Path | None, Parameter(name="--root")]
ConfigFiles = Annotated[list[Path] | None, Parameter(name="--config", negative="")]
Method = Annotated[str | None, Parameter(name="--method")]
Settings = Annotated[list[str] | None, Parameter(name="--set", negative="")]

_PLAIN_WIDTH = 120


def console() -> Console:
    """Standard output: as wide as the terminal, and of a fixed width where there is none."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PLAIN_WIDTH, highlight=False)


def debugging() -> bool:
    """Whether `--debug` or COHORT_DEBUG asks for tracebacks and the warnings of libraries."""
    return os.environ.get("COHORT_DEBUG", "") not in ("", "0")
