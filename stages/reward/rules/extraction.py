"""Where an output states its final answer. Pure string work, linear in the text, at most its last 4 KiB."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final, Literal, assert_never

__all__ = ["Convention", "boxed_answers", "find_answer", "last_lines", "tail", "words_apart"]

Convention = Literal["boxed", "tags", "hashes", "line", "phrase", "number"]

_TAIL: Final = 4096
_MARKS: Final = ("a:", "answer:", "final answer:", "答案:", "答案：")
_PHRASES: Final = ("answer is", "answer:", "答案是", "答案为", "答案:", "答案：")
_SENTENCE_END: Final = re.compile(r"[.!?](?:\s|$)|[。！？]")
_BOX: Final = re.compile(r"\\boxed ?\{")
_BRACE: Final = re.compile(r"\\[{}]|[{}]")  # an escaped brace is text
# Nothing but separators, or one word and "and": "\\boxed{1} papers and \\boxed{2} bins".
_BETWEEN_BOXES: Final = re.compile(
    r"(?:[\s,;$.]|and|or|和|\\text|\\quad|\\qquad|[{}]|\\\(|\\\)){0,24}|\$?\s+[a-z]{2,20}\s+and\s+\$?"
)
_FORMULA: Final = re.compile(r"\$[^$]+\$")
_CLOSING: Final = "final answer is"
_CHINESE_BORDER: Final = re.compile(r"(?<=[一-鿿])(?=[\w$\\-])|(?<=[\w%$}])(?=[一-鿿])", re.ASCII)


def find_answer(text: str, conventions: Sequence[Convention]) -> str | None:
    """The final answer of `text` by the first convention that finds one; None where none does.

    Of several marks of one convention the last counts: what a model says at the end is its answer. "The final answer is"
    behind the last box says it too: boxes before it held results on the way.
    """
    ending = tail(text)
    if "phrase" in conventions and _closed_by_phrase(ending):
        conventions = ["phrase", *conventions]
    for convention in conventions:
        answer = _finder(convention)(ending)
        if answer is not None and answer.strip():
            return answer.strip()
    return None


def tail(text: str) -> str:
    """The part of an output that is looked at, as valid Unicode (a lone surrogate cannot be stored)."""
    return text[-_TAIL:].encode("utf-8", "replace").decode("utf-8")


def last_lines(text: str) -> str:
    """The whole lines within `tail(text)`: a search must not begin inside an expression that was cut."""
    ending = tail(text)
    return ending if len(text) <= _TAIL else ending.partition("\n")[2].strip()


def words_apart(text: str) -> str:
    """Spaces between Chinese characters and what they touch: searches that look for borders of words find none in 共有99颗."""
    return _CHINESE_BORDER.sub(" ", text)


def boxed_answers(text: str) -> list[tuple[int, int, str]]:
    r"""Every closed, outermost `\boxed{...}`: start, end and content."""
    closing = _closing_braces(text)
    found: list[tuple[int, int, str]] = []
    for match in _BOX.finditer(text):
        end = closing.get(match.end() - 1)
        if end is not None and (not found or match.start() >= found[-1][1]):
            found.append((match.start(), end, text[match.end() : end - 1]))
    return found


def _finder(convention: Convention) -> Callable[[str], str | None]:
    match convention:
        case "boxed":
            return _boxed
        case "tags":
            return _tags
        case "hashes":
            return _hashes
        case "line":
            return _line
        case "phrase":
            return _phrase
        case "number":
            return _whole
        case _:
            assert_never(convention)


def _boxed(text: str) -> str | None:
    r"""The last `\boxed{}`; several with nothing but "and" or commas between them are one answer of several parts."""
    boxes = boxed_answers(text)
    if not boxes:
        return None
    parts = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        if not _BETWEEN_BOXES.fullmatch(text[box[1] : parts[0][0]]):
            break
        parts.insert(0, box)
    return ", ".join(content for _, _, content in parts)


def _closed_by_phrase(text: str) -> bool:
    """Whether a final answer with a digit in it is stated in words behind the last box."""
    start = text.lower().rfind(_CLOSING)
    boxes = boxed_answers(text) if start >= 0 else []
    return bool(boxes) and start > boxes[-1][1] and any(map(str.isdigit, _phrase(text[start:]) or ""))


def _tags(text: str) -> str | None:
    """Between the last `<answer>` and its `</answer>`."""
    before, closing, _ = text.rpartition("</answer>")
    _, opening, answer = before.rpartition("<answer>")
    return answer if closing and opening else None


def _hashes(text: str) -> str | None:
    """GSM8K: what follows the last `####` on its line."""
    start = text.rfind("####")
    return None if start < 0 else text[start:].lstrip("#").split("\n", 1)[0]


def _line(text: str) -> str | None:
    """The last line that begins with `A:` or `Answer:`."""
    for line in reversed(text.split("\n")):
        stripped = line.strip().strip("*").strip()
        for mark in _MARKS:
            if stripped.lower().startswith(mark):
                return stripped[len(mark) :].strip("* ")
    return None


def _phrase(text: str) -> str | None:
    """What follows the last "the answer is", to the end of its sentence."""
    lowered = text.lower()
    if len(lowered) != len(text):  # a few letters change their length with their case; positions would shift
        lowered = text
    start, length = max((lowered.rfind(phrase), len(phrase)) for phrase in _PHRASES)
    if start < 0:
        return None
    stated = text[start + length :].lstrip(" :：*").split("\n", 1)[0]
    return _SENTENCE_END.split(stated, maxsplit=1)[0].strip("* ")


def _whole(text: str) -> str | None:
    """The whole output, when it is nothing but a number or one formula."""
    stripped = text.strip()
    if len(stripped) <= 512 and _FORMULA.fullmatch(stripped):
        return stripped
    return stripped if len(stripped) <= 64 and re.fullmatch(r"[-+$]{0,2}\d[\d,.]*(?:/\d+)?%?", stripped) else None


def _closing_braces(text: str) -> dict[int, int]:
    """For every opening brace that is closed: the position behind its closing brace. One pass, whatever the nesting."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.end()
    return closing
