"""Rows of the tables that stages exchange, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def rollout_row(
    question: str, sample: int, ids: Sequence[int], prompt: Sequence[int] = (1, 2), **changes: Any
) -> dict[str, Any]:
    """An output that ended by itself, of log-probability -1 at every token."""
    return {
        "question_id": question,
        "sample": sample,
        "prompt_ids": list(prompt),
        "output_ids": list(ids),
        "logprobs": [-1.0] * len(ids),
        "finish_reason": "stop",
        "text": "",
        "text_ends": [0] * len(ids),
        "temperature": 1.0,
        "seed": 0,
        **changes,
    }


def advantage_row(question: str, sample: int, advantage: Sequence[float] | None, **changes: Any) -> dict[str, Any]:
    """The advantages of an output; null ones mask it."""
    row = {"question_id": question, "sample": sample, "advantage": advantage, "returns": None, "pair": None}
    return row | changes


def question_rows(*texts: str) -> list[dict[str, Any]]:
    """Questions named q0, q1, ... with the answer 0."""
    return [{"question_id": f"q{i}", "question": t, "answer": "0", "solution": None} for i, t in enumerate(texts)]
