"""A tiny experiment whose arms share much and end in different policies; and the processes that a test left behind."""

from __future__ import annotations

from typing import Any, Final

import psutil

from tests.flows.short_runs import LEARNING

__all__ = ["MARK", "TINY", "marked"]

MARK: Final = "COHORT_TEST_MARK"
TINY: Final[dict[str, Any]] = {
    "name": "tiny",
    "asks": "Does the learning rate matter?",
    "base": "arithmetic_smoke",
    "baseline": "usual",
    "common": LEARNING
    | {
        "data.evaluation.in_domain.count": 8,
        "sft.max_steps": 120,
        "preflight.without_signal": None,
        "iterations": 2,
        "steps": 3,
        "evaluation": {"every": 2, "samples": 0, "estimates": {"ks": [1]}},
    },
    # `longer` shares all of `usual`, `faster` what comes before the first update.
    "arms": {
        "usual": {},
        "faster": {"update.training.optimizer.learning_rate": 0.01},
        "longer": {"iterations": 3},
    },
    "seeds": [0],
}


def marked(mark: str) -> list[psutil.Process]:
    """Processes that have a mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found
