r"""Format consistency: whether an output has the form that was asked for. 1.0 or 0.0, never in between."""

from __future__ import annotations

import re
from typing import Final, Literal, assert_never

from stages.reward.rules.exact import read_number
from stages.reward.rules.extraction import boxed_answers, tail

__all__ = ["Form", "has_form"]

Form = Literal["hashes", "boxed", "line", "pattern"]

_LINE: Final = re.compile(r"A: ?\S.*")


def has_form(text: str, form: Form, pattern: str | None = None) -> bool:
    r"""Whether `text` ends in the asked form.

    * `hashes`: the last line is `#### <number>`, and no other line has the mark (an answer is given once);
    * `boxed`: exactly one `\boxed{}`, closed and not empty;
    * `line`: the last line is `A: <answer>`;
    * `pattern`: the regular expression is found in the last 4 KiB.
    """
    ending = tail(text)
    match form:
        case "hashes":
            before, mark, answer = ending.rstrip().rpartition("####")
            alone = mark != "" and "####" not in before and (not before or before.endswith("\n"))
            return alone and "\n" not in answer and read_number(answer) is not None
        case "boxed":
            boxes = boxed_answers(ending)
            return len(boxes) == 1 and boxes[0][2].strip() != ""
        case "line":
            return _LINE.fullmatch(ending.rstrip().rpartition("\n")[2]) is not None
        case "pattern":
            return pattern is not None and re.search(pattern, ending) is not None
        case _:
            assert_never(form)
