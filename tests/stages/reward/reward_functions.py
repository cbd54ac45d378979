"""Reward functions with TRL's signature, good and bad, for the tests."""

from __future__ import annotations

import os
import sys
import time
from typing import Any


def by_text(prompts: list[str], completions: list[str], **columns: Any) -> list[Any]:
    """Each completion says what becomes of the call: a number is its score."""
    scores: list[Any] = []
    for completion in completions:
        match completion:
            case "hang":
                time.sleep(600)
            case "allocate":
                kept = []
                while True:
                    kept.append(bytearray(2**28))  # more than the limit at once: filling pages would take its time
            case "raise":
                raise KeyError("no such rule")
            case "exit":
                sys.exit(3)
            case "abort":
                os.abort()
            case "drop":
                pass
            case "twice":
                scores += [1.0, 1.0]
            case "print":
                print("printed by the function")
                os.write(1, b"written by the function\n")
                scores.append(0.25)
            case "none":
                scores.append(None)
            case "nan" | "inf":
                scores.append(float(completion))
            case "text":
                scores.append("0.5")
            case "true":
                scores.append(True)
            case _:
                scores.append(float(completion))
    return scores


def length_of_call(completions: list[str], **columns: Any) -> list[float]:
    """What a call holds; a completion "raise" fails it."""
    if "raise" in completions:
        raise ValueError("one of them is bad")
    return [float(len(completions))] * len(completions)


def facts(
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]],
    question: list[str],
    answer: list[str],
    solution: list[str | None],
) -> list[float]:
    """1 where every argument of a row is what the table says."""
    return [
        float((p, c, ids, q, a, s) == ("2+2=?", "4", [7, 8], "2+2=?", "4", None if i else "2+2=4"))
        for i, (p, c, ids, q, a, s) in enumerate(
            zip(prompts, completions, completion_ids, question, answer, solution, strict=True)
        )
    ]


def without_return(completions: list[str], **columns: Any) -> None:
    """Forgets its scores."""


def always_hang(completions: list[str], **columns: Any) -> list[float]:
    """Sleeps for ever."""
    time.sleep(600)
    return [1.0] * len(completions)


def of_one_column(prompts: list[str], completions: list[str], completion_ids: Any, answer: list[str]) -> list[float]:
    """Takes the answer and nothing else."""
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


async def asynchronous(completions: list[str], **columns: Any) -> list[float]:
    """TRL awaits such a function; here it is refused."""
    return [0.0] * len(completions)


A_CONSTANT = 3
