"""Reward functions with TRL's signature, good and bad, for the tests."""

from __future__ import annotations

import asyncio
import math
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
            case "none":
                scores.append(None)
            case "nan" | "inf":
                scores.append(float(completion))
            case "huge":
                scores.append(10**400)
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


def of_one_column(prompts: list[str], completions: list[str], completion_ids: Any, answer: list[str]) -> list[float]:
    """Takes the answer and nothing else."""
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


async def asynchronous(completions: list[str], **columns: Any) -> list[float]:
    """Awaits something, in a loop that all calls share."""
    await asyncio.sleep(0)
    _loops.add(asyncio.get_running_loop())
    return [float(len(_loops))] * len(completions)


_loops: set[Any] = set()


def returns_an_awaitable(completions: list[str], **columns: Any) -> Any:
    """No coroutine function, but what it returns has to be awaited."""
    return asynchronous(completions)


def by_answer(completions: list[str], answer: list[str], **columns: Any) -> Any:
    """The gold answer names what is returned, made of one score for each completion."""
    from tests.stages.reward.answers import BAD, GOOD

    make = BAD[answer[0]] if answer[0] in BAD else GOOD[answer[0]][0]
    return make([0.5 + row for row in range(len(completions))], completions)


def of_messages(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """Written for conversational completions, as TRL's examples are."""
    assert prompts is None or all(prompt[0]["role"] == "user" for prompt in prompts)
    return [float(completion[0]["content"]) for completion in completions]


def of_texts(completions: Any, **columns: Any) -> list[float]:
    """Written for completions that are texts."""
    return [float(completion.strip()) for completion in completions]


def vandal(completions: list[str], **columns: Any) -> list[float]:
    """Changes what others check numbers with, and answers with none."""
    math.isfinite = lambda x: True
    return [math.nan if completion == "nan" else 1.0 for completion in completions]


A_CONSTANT = 3


def share_written(completion_ids: list[list[int]], completion_mask: list[list[int]], **_: Any) -> list[float]:
    return [sum(mask) / len(ids) for ids, mask in zip(completion_ids, completion_mask, strict=True)]
