"""Rows of the tables that stages exchange, with plain values for what a test does not say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.artifact import Table
from stages.tables import Questions

Row = dict[str, Any]


def question_table(
    answer: str = "1", *, question_id: str = "q", question: str = "?", solution: Any = None
) -> Questions:
    return Questions.write([{"question_id": question_id, "question": question, "answer": answer, "solution": solution}])


def output_row(
    question_id: str, sample: int, text: str = "", *, tokens: int | None = None, cut: bool = False, **changes: Any
) -> Row:
    """Return an output of a token for each character and, unless `cut`, one for the end of sequence; or of so many `tokens`."""
    ends = [len(text)] * tokens if tokens is not None else [*range(1, len(text) + 1), *([] if cut else [len(text)])]
    sampled = {"prompt_ids": [1], "output_ids": list(range(2, len(ends) + 2)), "logprobs": [0.0] * len(ends)}
    said = {
        "finish_reason": "length" if cut else "stop",
        "text": text,
        "text_ends": ends,
        "temperature": 1.0,
        "seed": 0,
    }
    return {"question_id": question_id, "sample": sample, **sampled, **said, **changes}


def reward_row(question_id: str, sample: int, reward: float | None, **changes: Any) -> Row:
    """Return the reward of an output by rules: right above 0."""
    status = "error" if reward is None else "ok" if reward > 0 else "wrong"
    scored = {"reward": reward, "status": status, "extracted": None, "components": [("accuracy", reward)]}
    unsaid = {"step_rewards": None, "step_ends": None, "scorer": None}
    return {"question_id": question_id, "sample": sample, **scored, **unsaid, **changes}


def label_row(question_id: str, sample: int, output_ids: list[int], label: float, **changes: Any) -> Row:
    """Return the label of an output, read at its last token."""
    read = {"prompt_ids": [5], "output_ids": output_ids, "scored_index": len(output_ids) - 1, "label": label}
    unsaid = {"step_ends": None, "step_labels": None, "origin": "a" * 64, "vocabulary": "b" * 64}
    return {"question_id": question_id, "sample": sample, **read, **unsaid, **changes}


def rollout_row(question: str, sample: int, ids: Sequence[int], prompt: Sequence[int] = (1, 2), **changes: Any) -> Row:
    """Return an output that ended by itself, of log-probability -1 at every token."""
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


def advantage_row(question: str, sample: int, advantage: Sequence[float] | None, **changes: Any) -> Row:
    """Return the advantages of an output; null ones mask it."""
    row = {"question_id": question, "sample": sample, "advantage": advantage, "returns": None, "pair": None}
    return row | changes


def column(table: Table, name: str) -> list[Any]:
    """Return the values of a column."""
    return table.read([name])[name].to_pylist()


def question_rows(*texts: str) -> list[Row]:
    """Return questions named q0, q1, ... with the answer 0."""
    return [{"question_id": f"q{i}", "question": t, "answer": "0", "solution": None} for i, t in enumerate(texts)]
