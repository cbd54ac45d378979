r"""Format consistency: whether an output has the form that was asked for. 1.0 or 0.0, never in between."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Literal, assert_never

from stages.reward.rules.exact import read_number
from stages.reward.rules.extraction import boxed_answers

__all__ = ["Form", "has_form", "is_quick", "match_pattern"]

Form = Literal["hashes", "boxed", "line", "pattern"]

_LINE: Final = re.compile(r"A: ?\S.*")


def has_form(text: str, form: Literal["hashes", "boxed", "line"]) -> bool:
    r"""Whether `text` ends in the asked form; whether a `pattern` is found, `match_pattern` says.

    * `hashes`: the last line is `#### <number>`, and no other line has the mark (an answer is given once);
    * `boxed`: exactly one `\boxed{}`, closed and not empty;
    * `line`: the last line is `A: <answer>`.
    """
    match form:
        case "hashes":
            before, mark, answer = text.rstrip().rpartition("####")
            alone = mark != "" and "####" not in before and (not before or before.endswith("\n"))
            return (
                alone and "\n" not in answer and answer.strip(" $-+.")[:1].isdigit() and read_number(answer) is not None
            )
        case "boxed":
            boxes = boxed_answers(text)
            return len(boxes) == 1 and boxes[0][2].strip() != ""
        case "line":
            return _LINE.fullmatch(text.rstrip().rpartition("\n")[2]) is not None
        case _:
            assert_never(form)


def is_quick(pattern: str) -> bool:
    """Whether no text can keep the regular expression busy: characters in a row, without groups, at most one of them repeated.

    From each of n places at most n ends of the one repetition are tried: quadratic, 0.1 s at worst for 4 KiB. Two repetitions
    or one of a group may already take for ever.
    """
    return not set(pattern) & set("()") and sum(pattern.count(mark) for mark in "*+?{") <= 1


def match_pattern(pattern: str, arguments: Mapping[str, list[Any]]) -> list[float | None]:
    """For each of `arguments["texts"]` 1.0 where the user's regular expression is found in it, else 0.0.

    Called in a worker process unless the pattern is quick: what it makes of a text may take longer than anybody waits.
    """
    return [float(re.search(pattern, text) is not None) for text in arguments["texts"]]
