"""What one stage of a run needs and takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from flows.planning.memory import Memory
from flows.planning.work import Work

__all__ = ["STAGE_CALL", "StagePlan", "When"]

When = Literal["once", "iteration", "step", "evaluation"]

STAGE_CALL: Final = 0.02
"""Seconds that a stage call costs whatever it does: 8 to 10 ms of CPU through Prefect (docs/lab.md), sealing on top. Ours."""


@dataclass(frozen=True)
class StagePlan:
    """Figures of one call, and of the fullest device."""

    name: str
    when: When
    memory: Memory
    work: Work
    """Of all devices together."""
    seconds: float
    disk: float = 0.0
    """Bytes that it writes."""
    state: float = 0.0
    """Of these the optimizer's state."""
    keeps: Mapping[str, float] = field(default_factory=dict)
    """Bytes that stay in memory for its next call, by the slot they are kept in (`pipeline/residency.py`)."""
    held: float = 0.0
    """Bytes that other stages keep beside it."""
    settings: str = ""
    """Where the configuration says how it trains or decodes."""

    @property
    def own(self) -> float:
        """Bytes at its worst moment."""
        return sum(self.memory.values())

    @property
    def peak(self) -> float:
        """With what others keep."""
        return self.own + self.held
