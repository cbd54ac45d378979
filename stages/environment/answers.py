"""Define the seam between `answer_calls` and whatever answers: the turns of an output in, an answer out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from pipeline.orchestration.interruption import check

Status = Literal["ok", "error", "timeout", "memory", "refused"]


Call = TypeVar("Call")


@dataclass(frozen=True)
class Dialogue:
    """Hold an output whose last turn ends in a call."""

    question: Mapping[str, Any]
    """The row of `Questions`."""
    turns: Sequence[str]
    """Text of each turn that the policy wrote."""
    calls: Sequence[Mapping[str, Any]]
    """Rows of `ToolCalls`: what was called before, and what it came to; one per turn but the last."""


@dataclass(frozen=True)
class Answer:
    """Hold what a call came to: columns of `ToolCalls`."""

    tool: str
    input: str
    output: str
    observation: str
    status: Status
    done: bool = False


class Environment(Protocol):
    """Answer calls. What it knows of an output is what `Dialogue` records: an answer is a function of it."""

    def answer(self, dialogues: Sequence[Dialogue]) -> list[Answer]:
        """Return the answer to the last call of each output, in their order."""
        ...


def side_by_side(answer: Callable[[Call], Answer], calls: Sequence[Call], *, most: int) -> list[Answer]:
    """Return the answer to each, in their order; `most` are made at a time, in threads."""
    with ThreadPoolExecutor(most) as threads:
        futures = [threads.submit(answer, call) for call in calls]
        try:
            found = []
            for future in futures:
                check()
                found.append(future.result())
            return found
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def plain(text: str) -> str:
    """Return the text; `?` stands for what is no character (half of a surrogate pair)."""
    return text.encode("utf-8", "replace").decode()


def cut(text: str, most: int) -> str:
    """Return a text of at most `most` characters; `...` stands for what is left out behind them."""
    return text if len(text) <= most else f"{text[:most]}..."
