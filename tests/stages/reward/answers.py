"""What a reward function may answer for three completions, and what it may not; by name, for a worker to make."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, Final

import numpy as np

Answer = Callable[[list[float], list[str]], Any]
"""Of one score for each completion, and the completions themselves."""


async def _a_score() -> float:
    return 0.5


def _made_distinct(scores: list[float], completions: list[str]) -> list[float]:
    completions[:] = sorted(set(completions))
    return [1.0] * len(completions)


def _emptied(scores: list[float], completions: list[str]) -> list[float]:
    completions.clear()
    return scores


GOOD: Final[dict[str, tuple[Answer, list[float]]]] = {
    "list": (lambda scores, _: scores, [0.5, 1.5, 2.5]),
    "tuple": (lambda scores, _: tuple(scores), [0.5, 1.5, 2.5]),
    "numpy": (lambda scores, _: np.array(scores, dtype=np.float32), [0.5, 1.5, 2.5]),
    "numpy integers": (lambda scores, _: np.arange(len(scores)), [0.0, 1.0, 2.0]),
    "numpy bools": (lambda scores, _: np.ones(len(scores), dtype=bool), [1.0] * 3),
    "numpy scalars": (lambda scores, _: [np.float64(score) for score in scores], [0.5, 1.5, 2.5]),
    "fractions": (lambda scores, _: [Fraction(score) for score in scores], [0.5, 1.5, 2.5]),
    "bools": (lambda scores, _: [True] * len(scores), [1.0] * 3),
    "after it emptied its lists": (_emptied, [0.5, 1.5, 2.5]),
}
BAD: Final[dict[str, Answer]] = {
    "one score": lambda scores, _: [1.0],
    "distinct": lambda _, completions: [1.0] * len(set(completions)),
    "distinct, and so its list": _made_distinct,
    "one more": lambda scores, _: [*scores, 0.0],
    "empty": lambda scores, _: [],
    "none": lambda scores, _: None,
    "number": lambda scores, _: 0.5,
    "text": lambda scores, _: "0.5" * len(scores),
    "dict": lambda scores, _: dict.fromkeys(range(len(scores)), 0.5),
    "set": lambda scores, _: set(scores),
    "generator": lambda scores, _: (score for score in scores),
    "scores and details": lambda scores, _: (scores, {"details": []}),
    "column": lambda scores, _: np.array(scores)[:, None],
    "scalar array": lambda scores, _: np.array(0.5),
    "texts": lambda scores, _: ["0.5"] * len(scores),
    "numpy texts": lambda scores, _: np.array(["0.5"] * len(scores)),
    "pairs": lambda scores, _: [(score, "why") for score in scores],
    "dicts": lambda scores, _: [{"reward": score} for score in scores],
    "arrays": lambda scores, _: [np.array([score]) for score in scores],
    "complex": lambda scores, _: [1j] * len(scores),
    "numpy complex": lambda scores, _: [np.complex64(1j)] * len(scores),
    "coroutines": lambda scores, _: [_a_score() for _ in scores],
}
