"""math-verify as it runs in a worker process: symbolic comparison of one answer with one gold answer.

Its own alarms are off: they need the main thread and cannot interrupt C code, and the pool already has a deadline. Model
text reaches math-verify's grammar, never `sympify` or `eval`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

__all__ = ["compare_symbolically"]


def compare_symbolically(gold: str, answer: str) -> Literal["equal", "different", "no_answer", "no_gold"]:
    """Whether `answer` states the value that `gold` states; each is parsed on its own.

    Both are either one delimited expression (`$...$`) or a text in which math-verify is to search for the answer.
    """
    from math_verify import verify

    golds = _parse_gold(gold)
    if not golds:
        return "no_gold"
    answers = _parse(answer)
    if not answers:
        return "no_answer"
    return "equal" if verify(golds, answers, timeout_seconds=None) else "different"


@lru_cache(maxsize=256)  # G outputs share a gold answer
def _parse_gold(gold: str) -> list[Any]:
    return _parse(gold)


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    found: list[Any] = parse(text, parsing_timeout=None)
    return found
