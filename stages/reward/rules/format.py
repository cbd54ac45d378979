r"""The format of an output: its form, its length, and the coherence of its language.

Scripts, not languages: English and French look alike here, English and Chinese do not. Digits, operators, LaTeX, code, single
letters and the words of the question itself belong to every language.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from itertools import accumulate
from typing import Any, Final, Literal, assert_never

from stages.reward.rules.exact import read_number
from stages.reward.rules.extraction import boxed_answers

Form = Literal["hashes", "boxed", "line", "pattern"]

_ANSWER_LINE: Final = re.compile(r"A: ?\S.*")


def has_form(text: str, form: Literal["hashes", "boxed", "line"]) -> bool:
    r"""Return whether `text` ends in the asked form; whether a `pattern` is found, `match_pattern` says.

    * `hashes`: the last line is `#### <number>`, and no other line has the mark (an answer is given once);
    * `boxed`: exactly one `\boxed{}`, closed and not empty;
    * `line`: the last line is `A: <answer>`.
    """
    match form:
        case "hashes":
            before, mark, answer = text.rstrip().rpartition("####")
            is_single = mark != "" and "####" not in before and (not before or before.endswith("\n"))
            return (
                is_single
                and "\n" not in answer
                and answer.strip(" $-+.")[:1].isdigit()
                and read_number(answer) is not None
            )
        case "boxed":
            boxes = boxed_answers(text)
            return len(boxes) == 1 and boxes[0][2].strip() != ""
        case "line":
            return _ANSWER_LINE.fullmatch(text.rstrip().rpartition("\n")[2]) is not None
        case _:
            assert_never(form)


def is_quick(pattern: str) -> bool:
    """Return whether no text can keep the regular expression busy: no groups, and at most one character repeated.

    From each of n places at most n ends of the one repetition are tried: quadratic, 0.1 s at worst for 4 KiB. Two repetitions
    or one of a group may already take for ever.
    """
    return not set(pattern) & set("()") and sum(pattern.count(mark) for mark in "*+?{") <= 1


def match_pattern(pattern: str, arguments: Mapping[str, list[Any]]) -> list[float | None]:
    """Return for each of `arguments["texts"]` 1.0 where the user's regular expression is found in it, else 0.0.

    Called in a worker process unless the pattern is quick: what it makes of a text may take longer than anybody waits.
    """
    return [float(re.search(pattern, text) is not None) for text in arguments["texts"]]


def overlong_score(tokens: int, *, max_tokens: int, buffer_tokens: int) -> float:
    """Return 0 while |o| <= L_max - L_cache, ((L_max - L_cache) - |o|) / L_cache up to L_max, -1 beyond (DAPO, Eq. 13)."""
    return -min(max(tokens - (max_tokens - buffer_tokens), 0) / buffer_tokens, 1.0)


_LONGEST: Final = 16_384
_WINDOW: Final = 2048
_LONGEST_PERIOD: Final = 24
_NEUTRAL: Final = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`"  # code
    r"|\$\$.{0,500}?\$\$|\$[^$\n]*\$|\\\(.{0,500}?\\\)|\\\[.{0,500}?\\\]"  # formulas; bounded, or bait costs seconds
    r"|\\[A-Za-z]+|</?[A-Za-z]+>",  # commands of LaTeX, tags
    re.DOTALL,
)
_WORD: Final = re.compile(r"[^\W\d_]+")
_PASSAGE: Final = re.compile(r"[一-鿿぀-ヿ]|[^\W_]+")
_JAPANESE: Final = frozenset({"HIRAGANA", "KATAKANA", "CJK"})


def is_coherent(question: str, text: str, *, max_foreign: float, max_run: int, max_compression: float) -> bool:
    """Return whether `text` says something, in the script of `question`, with little of another script and of repetition.

    Args:
        question: decides the script; one without words allows any one script.
        text: the output; of more than 16,384 characters the last ones count.
        max_foreign: largest `foreign_share`.
        max_run: largest `longest_run`.
        max_compression: largest `compression`.
    """
    text = text[-_LONGEST:]
    return (
        text.strip() != ""
        and foreign_share(question, text) <= max_foreign
        and compression(text) <= max_compression
        and longest_run(text) <= max_run
    )


def foreign_share(question: str, text: str) -> float:
    """Return the share of the words of `text` that are of another script than `question`; 0 where it has no words.

    A word is a run of letters of one script, at least two of them; in Chinese and Japanese every character counts as one.
    Foreign words that the question has (names, units) do not count at all.
    """
    asked = _words(question)
    quoted = {word.lower() for word, _ in asked}
    said = _words(text)
    scripts = Counter(script for _, script in asked or said)
    if not scripts:
        return 0.0
    home = {scripts.most_common(1)[0][0]}
    if scripts.keys() & {"HIRAGANA", "KATAKANA"} and home <= _JAPANESE:
        home = set(_JAPANESE)
    at_home = sum(script in home for _, script in said)
    foreign = sum(script not in home and word.lower() not in quoted for word, script in said)
    return foreign / max(foreign + at_home, 1)


def main_script(text: str) -> str | None:
    """Return the script of most words of a text; None: it has none."""
    scripts = Counter(script for _, script in _words(text))
    return scripts.most_common(1)[0][0] if scripts else None


def longest_run(text: str) -> int:
    """Return how often one passage is repeated in a row: 3 for "so we go so we go so we go", 1 for a text without repetition.

    A passage is up to 24 words, numbers or Chinese characters and has at least one word: `2*2*2*2*2` is no repetition, nor are
    lines in which a number changes.
    """
    words = [word.lower() for word in _PASSAGE.findall(text)]
    meaning = [0, *accumulate(map(_is_word, words))]
    longest = 1
    for period in range(1, min(_LONGEST_PERIOD, len(words) // 2) + 1):
        if len(words) < period * (longest + 1):
            break  # longer passages do not fit often enough to matter
        longest = max(longest, _run(words, meaning, period))
    return longest


def _run(words: list[str], meaning: list[int], period: int) -> int:
    """Return the longest run of passages of `period` words; `meaning[i]` counts those of the first i that are not numbers."""
    longest = same = 0
    for place in range(period, len(words)):
        same = same + 1 if words[place] == words[place - period] else 0
        if same > longest and meaning[place + 1] > meaning[place + 1 - period]:
            longest = same
    return longest // period + 1


def _is_word(word: str) -> bool:
    return word.isalpha() and (len(word) > 1 or not word.isascii())


def compression(text: str) -> float:
    """Return the characters per compressed byte in the most repetitive 2,048 characters: 2-3 in prose, 10 and more in loops.

    Compressed by zlib, less the 8 bytes that an empty text needs; stretches under 256 characters count as 1. Characters, not
    bytes, are counted: three bytes to a Chinese character are no repetition.
    """
    highest = 1.0
    for start in range(0, max(len(text) - _WINDOW // 2, 1), _WINDOW // 2):
        stretch = text[start : start + _WINDOW]
        if len(stretch) >= 256:
            packed = len(zlib.compress(stretch.encode("utf-8", "replace"), 6)) - 8
            highest = max(highest, len(stretch) / packed)
    return highest


def _words(text: str) -> list[tuple[str, str]]:
    """Return the words of a text, each with its script; a run of letters of two scripts is two words."""
    words: list[tuple[str, str]] = []
    for run in _WORD.findall(_NEUTRAL.sub(" ", text)):
        start = 0
        for place in range(1, len(run) + 1):
            script = _script(run[start])
            if place < len(run) and script not in ("CJK", "HIRAGANA", "KATAKANA") and _script(run[place]) == script:
                continue
            if place - start > 1 or not run[start].isascii():
                words.append((run[start:place], script))
            start = place
    return words


@lru_cache(maxsize=65_536)
def _script(letter: str) -> str:
    """Return the script of a letter by the first word of its Unicode name: LATIN, CJK, CYRILLIC, ARABIC, HIRAGANA."""
    return unicodedata.name(letter, "UNKNOWN").split()[0]
