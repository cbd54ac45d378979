"""Multiple choice: where the gold answer is an option's label, the label that an output settles on. Pure string work."""

from __future__ import annotations

import functools
import re
from typing import Final

from stages.reward.rules.extraction import last_lines

__all__ = ["choice_label", "find_choice"]

_WRAPPING: Final = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s?\{([^{}]*)\}|[$*]")
_BARE: Final = re.compile(r"[(\[{]?([A-J])[)\]}]?[.。]?")
_LABELLED: Final = re.compile(r"(?:[(\[]([A-J])[)\]]|([A-J])[).:])\s+\S.*")
_EXPLAINED: Final = re.compile(
    r"[(\[]?([A-J])[)\]]?(?:,\s+(?!or\b|and\b)[a-z]|,?\s+(?:because|since|as|so|which|due to)\b).*", re.DOTALL
)
_LOWER_CASE: Final = re.compile(r"[(\[{]?([a-j])[)\]}]?[.。]?")
# "C Cecile": a label without a mark, so that only an output that is a label and nothing else is compared with it.
_UNMARKED: Final = re.compile(r"([A-HJ])\s+[A-Z]\w+.*")
_OPENING: Final = re.compile(r"[(\[]?([A-J])[)\]]?(?:[.):,。，、：]|[一-鿿]|$)")
_DENIED: Final = re.compile(
    r"(?:\bnot|n't(?:\s+be)?|\bnor|\bneither|\bnon|\bpas|不是|不选|非)\s*[(\[]?[A-J]\b[)\]]?"
    r"(?:\s*(?:,|or|nor|and|或|和)\s*[(\[]?[A-J]\b[)\]]?)*"
)
# "I" is a word and "A" may be an article: neither is a label before a word in lower case, the first only in parentheses.
_LONE: Final = re.compile(r"\(([A-J])\)|(?<![A-Za-z0-9'’_\\])(?:A(?!\s+[a-z])|[B-HJ])(?![A-Za-z0-9_'’])")
_OPENING_LENGTH: Final = 4096
_FORMULA: Final = re.compile(r"[=+\-*/^_\\{}<>\d]")


@functools.lru_cache(maxsize=2**12)  # asked for every output of a question
def choice_label(gold: str) -> tuple[str, bool] | None:
    """The label of the right option, and whether the gold marks it as one (`C`, `(C) Cecile`, `C. Cecile`) or not (`C Cecile`).

    None where the gold answer is not that of a multiple-choice question.
    """
    lines = [_WRAPPING.sub(r"\1", line).strip() for line in gold.split("\n")]
    if len(lines) == 1 and (bare := _BARE.fullmatch(lines[0])):
        return bare[1], True
    for line in lines:
        if marked := _LABELLED.fullmatch(line):
            return marked[1] or marked[2], True
        if unmarked := _UNMARKED.fullmatch(line):
            return unmarked[1], False
    return None


def find_choice(text: str, answer: str | None, *, marked: bool, search: bool) -> str | None:
    """The label that an output settles on, or None.

    Args:
        text: the output.
        answer: what its conventions say is the answer, where they find one.
        marked: whether the gold marks its label; otherwise only a label and nothing else counts.
        search: whether a label that stands anywhere in the text counts, if it is the only one that is not denied.
    """
    stated = _WRAPPING.sub(r"\1", text[:_OPENING_LENGTH] if answer is None else answer).strip()
    if bare := _BARE.fullmatch(stated):
        return bare[1]
    if lower := _LOWER_CASE.fullmatch(stated):
        return lower[1].upper()
    if not marked:
        return None
    opening = _EXPLAINED.fullmatch(stated) or (_OPENING.match(stated) if answer is None else None)
    if labelled := _LABELLED.fullmatch(stated) or opening:
        return labelled[labelled.lastindex or 1]
    if answer is not None and not _FORMULA.search(stated):
        return _only_label(stated)
    return _only_label(last_lines(text)) if answer is None and search else None


def _only_label(prose: str) -> str | None:
    """The one label that the words leave standing: "It's not A, therefore B" leaves B, "A or B" none."""
    labels = {found[0].strip("()") for found in _LONE.finditer(_DENIED.sub(" ", prose))}
    return labels.pop() if len(labels) == 1 else None
