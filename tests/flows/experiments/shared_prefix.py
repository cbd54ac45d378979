"""A tiny experiment whose arms share much and end in different policies; and the processes that a test left behind."""

from __future__ import annotations

from typing import Any, Final

import psutil

__all__ = ["MARK", "TINY", "marked"]

MARK: Final = "COHORT_TEST_MARK"
SHORT: Final = {"shortest": 2, "longest": 2}
TINY: Final[dict[str, Any]] = {
    "name": "tiny",
    "asks": "Does the learning rate matter?",
    "base": "arithmetic_smoke",
    "baseline": "usual",
    "common": {
        "data.demonstrations.chains": {"count": 2000, **SHORT},
        "data.train": {"count": 48, **SHORT},
        "data.evaluation.in_domain.count": 8,
        "sft.max_steps": 120,
        "reward.components": [{"kind": "accuracy", "verifier": "exact"}],
        "preflight.without_signal": None,
        "iterations": 2,
        "steps": 3,
        "questions_per_step": 6,
        "rollout.max_output_tokens": 16,
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
