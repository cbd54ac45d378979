"""Where an output states its final answer. Pure string work, linear in the text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final, Literal, TypeVar

from stages.reward.rules.exact import read_number
from stages.reward.rules.prose import LAST_CHARACTERS, retracts, valid, without_words

Convention = Literal["boxed", "tags", "hashes", "line", "phrase", "number"]
Mark = Literal["last", "first"]
T = TypeVar("T")

_LONGEST_WHOLE: Final = 512
_NEXT_WORDS: Final = 40
"""Characters of the next sentence in which it would take the answer back."""
_EMPHASIS: Final = "*_` "
_LABEL: Final = r"(?:the\s+)?(?:(?:final|correct)\s+)?answer"
_LINE: Final = re.compile(
    rf"[ \t>#*_`•-]{{0,12}}(?:(?:A|{_LABEL})[ \t*_`]{{0,8}}[:：]|{_LABEL}[ \t*_`]{{0,8}}(?:=|(?=\$|\\\(|\\\[))"
    rf"|答案[ \t*_`]{{0,8}}[:：])"
    rf"|[ \t]*(?:#{{1,6}}|[*_]{{2}})[ \t*_`]*(?:{_LABEL}|答案)[ \t*_`.]*(?=\n|$)",
    re.IGNORECASE,
)
_LINE_MARKS: Final = ("answer", "答案", "a:", "a：")
_FARTHEST: Final = 48
"""Characters of markup that may stand before a mark on its line."""
_STATES: Final = r"(?:is|was|equals|(?:must|would|should|will)\s+be|comes\s+(?:out\s+)?to|turns\s+out\s+to\s+be)\b"
_PHRASE: Final = re.compile(
    rf"answers?[*_`]{{0,3}}(?:\s+(?:to|of|for)\s[^.\n]{{1,60}}?)?\s+(?:{_STATES}|are\b)(?:\s+(?:therefore|thus|then|hence|so|clearly"
    r"|simply|just|exactly|indeed|now|equal\s+to|given\s+by)\b,?)*|answer[*_`]{0,3}\s*[:：=]|答案(?:应该是|应为|就是|是|为|[:：]|(?=不))",
    re.IGNORECASE,
)
_PHRASE_MARKS: Final = ("answer", "答案")
_FINAL_PHRASE: Final = re.compile(rf"final answer[*_`]{{0,3}}\s+{_STATES}", re.IGNORECASE)
_SENTENCE_END: Final = re.compile(r"(?<!\bi\.e)(?<!\be\.g)[.?](?:\s|$)|[。！？]|(?<!\b[A-Za-z])!(?:\s+(?=[A-Z])|$)")
_FACTORIAL: Final = re.compile(r"[\w^*/+(){}\\ -]*!")
_HASHES: Final = re.compile(r"####[ \t]*#*")
_HEADING: Final = re.compile(
    r"\W*(?:step|solution|part|case|explanation|conclusion|verification|summary|calculation|reasoning|analysis|question|problem)\b",
    re.IGNORECASE,
)
_LABEL_ALONE: Final = re.compile(rf"\W*{_LABEL}\W*", re.IGNORECASE)
_BOX: Final = re.compile(r"\\(?:boxed|fbox|framebox|bbox)\s*(?:\[[^\]\n]{0,20}\]\s*)*(\{)?")
_UNBRACED_BOX: Final = re.compile(
    r"[-+]?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?\\?%?|\\(?:text|mathrm|mathbf)\s?\{[^{}]*\}|\\[dt]?frac\s*(?:\{[^{}]*\}\s*\{[^{}]*\}|\d\s*\d)|(?<![A-Za-z])[A-Za-z](?![A-Za-z])"
)
_BRACE: Final = re.compile(r"\\[{}]|[{}]")  # an escaped brace is text
# Nothing but separators and labels of parts, one word and "and" (`\boxed{1} papers and \boxed{2} bins`), or which part of the
# question the box was for (`\boxed{1} for part (a) and \boxed{2}`).
_BETWEEN_BOXES: Final = re.compile(
    r"(?:[\s,;$.]|and|or|和|\\text|\\quad|\\qquad|[{}]|\\\(|\\\)|\([a-h]\)){0,24}|\$?\s+[a-z]{2,20}\s+and\s+\$?"
    r"|\$?\s*(?:\\text\s?\{)?\s*(?:for|in|of|from)(?: (?:[a-z]{1,9}|\([a-z]{1,3}\))){1,4},? and\s*\}?\s*\$?"
)
_NAMED: Final = re.compile(r"((?:\\[A-Za-z]+|(?<![\\A-Za-z])[A-Za-z])(?:_(?:\{\w{1,9}\}|\w))?)\s{0,4}=\s{0,4}\$?$")
"""The quantity whose value the box behind it holds: `y_1 = \\boxed{3}`."""
_LONGEST_NAME: Final = 32
# The closing brace escaped by mistake: `\boxed{185\}`.
_ESCAPED_BOX: Final = re.compile(r"\\boxed\s?\{((?:[^{}\n\\]|\{[^{}\n]{0,200}\}|\\(?!\})){1,512})\\\}")
_ONE_FORMULA: Final = re.compile(r"\$\$?[^$]+\$\$?|\\\([^$]+\\\)|\\\[[^$]+\\\]", re.DOTALL)
_PURE: Final = re.compile(r"[-+$]{0,2}(?:[\d.(\[√∛½¼¾]|\\(?!boxed|fbox))[^=#]*")
_PROSE: Final = re.compile(r"(?<![\\A-Za-z])(?!sqrt|frac|sin|cos|tan|log|ln|exp|pi)[A-Za-z]{2,}")


def find_answer(text: str, conventions: Sequence[Convention], mark: Mark = "last") -> str | None:
    """Return the final answer of `text` by the first convention that finds one; None where none does.

    Of several marks of one convention the last counts: what a model says at the end is its answer. `mark="first"` is for
    models that go on to a next question of their own. "The final answer is" behind the last box says it too: boxes before it
    held results on the way.
    """
    if "phrase" in conventions and mark == "last" and _closed_by_phrase(text):
        conventions = ["phrase", *conventions]
    for convention in conventions:
        answer = _FINDERS[convention](text, mark)
        if answer is not None and answer.strip():
            return valid(answer.strip())
    return None


def boxed_answers(text: str) -> list[tuple[int, int, str]]:
    r"""Return every closed, outermost `\boxed{...}` (`\fbox`, `\framebox`, and `\boxed 42`): start, end and content."""
    closing: dict[int, int] | None = None
    found: list[tuple[int, int, str]] = []
    if "box" not in text:
        return found
    for match in _BOX.finditer(text):
        if found and match.start() < found[-1][1]:
            continue
        if match[1]:
            closing = _closing_braces(text) if closing is None else closing
            end = closing.get(match.end() - 1)
            if end is not None:
                found.append((match.start(), end, text[match.end() : end - 1]))
        elif core := _UNBRACED_BOX.match(text, match.end()):
            found.append((match.start(), core.end(), core[0]))
    return found


def _boxed(text: str, mark: Mark) -> str | None:
    r"""Return one `\boxed{}`; several with nothing but "and" or commas between them are one answer of several parts.

    Parts that are all named keep their names: `x = \boxed{1}` and `y = \boxed{2}` state `x=1, y=2`.
    """
    boxes = boxed_answers(text)
    if not boxes:
        return last[1] if (last := _at(list(_ESCAPED_BOX.finditer(text)), mark)) else None
    groups: list[list[tuple[str | None, str]]] = []
    behind = 0
    for start, end, content in boxes:
        name = _NAMED.search(text[max(behind, start - _LONGEST_NAME) : start])
        between = text[behind : start - (len(name[0]) if name else 0)]
        if not groups or len(between) > _LONGEST_WHOLE or not _BETWEEN_BOXES.fullmatch(between):
            groups.append([])
        groups[-1].append((name[1] if name else None, content))
        behind = end
    parts = _at(groups, mark) or []
    named = len(parts) > 1 and all(name for name, _ in parts)
    return ", ".join(f"{name}={content}" if named else content for name, content in parts)


def _at(found: Sequence[T], mark: Mark) -> T | None:
    if not found:
        return None
    return found[0] if mark == "first" else found[-1]


def _closed_by_phrase(text: str) -> bool:
    """Return whether a final answer with a digit in it is stated in words behind the last box."""
    start = _lowered(text).rfind("final answer")
    boxes = boxed_answers(text) if start >= 0 and _FINAL_PHRASE.match(text, start) else []
    if not boxes or start <= boxes[-1][1]:
        return False
    return any(map(str.isdigit, _phrase(text[start:], "last") or ""))


def _tags(text: str, mark: Mark) -> str | None:
    """Return what is between `<answer>` and its `</answer>`."""
    if mark == "first":
        answer, closing, _ = text.partition("<answer>")[2].partition("</answer>")
        return answer if closing else None
    before, closing, _ = text.rpartition("</answer>")
    _, opening, answer = before.rpartition("<answer>")
    return answer if closing and opening else None


def _hashes(text: str, mark: Mark) -> str | None:
    """Return what follows a `####` on its line, as in GSM8K; a heading of that form has its answer below, or none."""
    places = [match.end() for match in _HASHES.finditer(text)]
    for place in places if mark == "first" else reversed(places):
        line = _line_from(text, place)
        if _LABEL_ALONE.fullmatch(line):
            return _below(text, place)
        if not _HEADING.match(line):
            return line if _FACTORIAL.fullmatch(line.strip(_EMPHASIS)) else _first_sentence(line)
    return None


def _line(text: str, mark: Mark) -> str | None:
    """Return a line that begins with `A:` or `Answer:`; a heading "Final Answer" has its answer below."""
    return _announced(text, _LINE_MARKS, _line_mark, mark)


def _phrase(text: str, mark: Mark) -> str | None:
    """Return what follows "the answer is", to the end of its sentence."""
    return _announced(text, _PHRASE_MARKS, _phrase_mark, mark)


def _line_mark(text: str, start: int) -> int | None:
    """Return where the label ends whose word is at `start`, if it opens its line."""
    line = max(text.rfind("\n", max(0, start - _FARTHEST), start) + 1, 0)
    if line == 0 and start > _FARTHEST:
        return None
    label = _LINE.match(text, line)
    return label.end() if label and label.end() > start else None


def _phrase_mark(text: str, start: int) -> int | None:
    phrase = _PHRASE.match(text, start)
    return phrase.end() if phrase else None


def _announced(text: str, words: Sequence[str], end_of: Callable[[str, int], int | None], mark: Mark) -> str | None:
    """Return the sentence behind the last, or the first, mark that has one of `words` in it."""
    lowered = _lowered(text)
    ends = [end for word in words if (end := _search(text, lowered, word, end_of, mark)) is not None]
    return _first_sentence(_stated(text, (min if mark == "first" else max)(ends))) if ends else None


def _search(text: str, lowered: str, word: str, end_of: Callable[[str, int], int | None], mark: Mark) -> int | None:
    start = lowered.find(word) if mark == "first" else lowered.rfind(word)
    while start >= 0:
        end = end_of(text, start)
        if end is not None:
            return end
        start = lowered.find(word, start + 1) if mark == "first" else lowered.rfind(word, 0, start + len(word) - 1)
    return None


def _lowered(text: str) -> str:
    """Return the text in lower case, at the same positions: a few letters change their length with their case."""
    lowered = text.lower()
    return lowered if len(lowered) == len(text) else text


def _line_from(text: str, place: int) -> str:
    end = text.find("\n", place)
    return text[place:] if end < 0 else text[place:end]


def _stated(text: str, place: int) -> str:
    """Return what a mark announces: the rest of its line, else what is below it; of a displayed formula all its lines."""
    line = _line_from(text, place).lstrip(" :：=" + _EMPHASIS)
    return _shown(
        text[place : place + LAST_CHARACTERS].lstrip(" :：=" + _EMPHASIS + "\n")
        if line.strip() in ("", r"\[", "$$")
        else line
    )


def _below(text: str, place: int) -> str:
    return _shown(text[place : place + LAST_CHARACTERS].partition("\n")[2].lstrip())


def _shown(rest: str) -> str:
    """Return the first line, or all lines of a displayed formula."""
    for opening, closing in ((r"\[", r"\]"), ("$$", "$$")):
        if rest.startswith(opening) and closing in rest[2:]:
            return rest[2:].partition(closing)[0].strip()
    return rest.partition("\n")[0].strip(_EMPHASIS)


def _first_sentence(line: str) -> str:
    """Return a line up to the end of its first sentence; all of it where the next one takes the answer back."""
    for end in _SENTENCE_END.finditer(line):
        sentence, rest = line[: end.start()], line[end.end() :]
        return (line if retracts(rest.lstrip()[:_NEXT_WORDS]) else sentence).strip(_EMPHASIS)
    return line.strip(_EMPHASIS)


def _whole(text: str, mark: Mark) -> str | None:
    """Return the whole output, or what follows `</think>`, if it is nothing but a number with its unit, or one formula."""
    stripped = (
        text[-LAST_CHARACTERS:].rpartition("</think>")[2].strip()
        if "</think>" in text[-LAST_CHARACTERS:]
        else text.strip()
    )
    if not stripped or len(stripped) > _LONGEST_WHOLE or "\n" in stripped.strip("$\\[] \n"):
        return None
    if _ONE_FORMULA.fullmatch(stripped):
        return stripped
    if not _PURE.fullmatch(stripped.strip(_EMPHASIS)):
        return None
    if _PROSE.search(stripped) and read_number(without_words(stripped)) is None:
        return None
    return stripped


def _closing_braces(text: str) -> dict[int, int]:
    """Return the position behind the closing brace of every opening one that is closed. One pass, whatever the nesting."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.end()
    return closing


_FINDERS: Final[dict[Convention, Callable[[str, Mark], str | None]]] = {
    "boxed": _boxed,
    "tags": _tags,
    "hashes": _hashes,
    "line": _line,
    "phrase": _phrase,
    "number": _whole,
}
