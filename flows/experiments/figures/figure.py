"""What a figure is: as a drawing in memory, and as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["Figure", "Sketch"]


@dataclass(frozen=True)
class Sketch:
    """A figure that is drawn and not written yet."""

    name: str
    title: str
    caption: str
    canvas: Canvas


@dataclass(frozen=True)
class Figure:
    """A figure in files."""

    name: str
    """Of its files, without their endings."""
    title: str
    """The experiment, what is drawn, and the figure of the paper that is laid out so."""
    caption: str
    """How to read it, and what it shows: sentences that checks on its numbers chose."""
    png: Path
    svg: Path
