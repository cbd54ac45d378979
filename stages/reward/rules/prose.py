r"""Words around an answer: `72, in total, so ...` states 72, and a choice is settled on by its label. Pure string work.

Words are cut off only behind mathematics, where they neither join another value to it nor deny it.
"""

from __future__ import annotations

import functools
import re
from typing import Final

from stages.reward.rules.exact import read_number
from stages.reward.rules.numerals import split
from stages.reward.rules.units import MATHEMATICAL, NUMBER_WORDS, RETRACTING, introduces, is_word

LAST_CHARACTERS: Final = 4096
_CHINESE_BORDER: Final = re.compile(r"(?<=[一-鿿])(?=[\w$\\-])|(?<=[\w%$}])(?=[一-鿿])", re.ASCII)


def outside_thinking(text: str, tags: tuple[str, str], *, opened: bool) -> str:
    """Return the text behind the thinking; nothing where it never ends.

    Args:
        text: the output.
        tags: what opens the thinking and what closes it.
        opened: whether the prompt has opened it, so that an output without either tag is all thinking.
    """
    opening, closing = tags
    _, closed, behind = text.rpartition(closing)
    if not closed:
        return "" if opened else text.partition(opening)[0]
    return behind.partition(opening)[0]


def tail(text: str) -> str:
    """Return the last 4 KiB of an output, as valid Unicode (a lone surrogate cannot be stored)."""
    return valid(text[-LAST_CHARACTERS:])


def last_lines(text: str) -> str:
    """Return the whole lines within `tail(text)`: a search must not begin inside an expression that was cut."""
    ending = tail(text)
    return ending if len(text) <= LAST_CHARACTERS else ending.partition("\n")[2].strip()


def words_apart(text: str) -> str:
    """Return the text with spaces around Chinese words: searches for borders of words find none in 共有99颗."""
    return _CHINESE_BORDER.sub(" ", text)


def valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


_UNFINISHED: Final = re.compile(
    r"(?<![A-Za-z])(?:and|or|not|than|to|by|of|plus|minus|times|[-+*/=^<>])$", re.IGNORECASE
)
_LONGEST: Final = 2048
_SEPARATOR: Final = re.compile(
    r"[,;:](?:\s+|(?=[A-Za-z]{2}))|\s*[，；：。！？]\s*|[.!?](?=\s)\s+|\s*—\s*|\s+[–-]{1,2}\s+|\s+(?=[(\[])|(?<=[\d%}])(?=[(（\[])"
    r"|\s+(?=(?:because|since|as|so|which|whereas|making|therefore|thus|hence|due)\b)"
)
_VALUE: Final = re.compile(r"(?<![A-Za-z_^{\\])[-+]?(?:\\?\$\s?[-+]?\\?)?(?:\d|\\[dt]?frac|\\sqrt|\.\d|\((?=[\d\\-]))")
_LABEL: Final = re.compile(
    r"\s*(?:\\(?:text|mathrm|mbox|operatorname)\s?\{([A-Za-z ]{2,}):?\s*\}\s*[=:]?"
    r"|([A-Z][a-z]{2,}(?: [a-z]{2,}){0,4})\s*[=:])\s*(?=[-+$\d\\])"
)
_MATHEMATICS: Final = re.compile(r"[\d\\½-¾⅓-⅞]|^[A-Za-z]$|[=^]|[一二三四五六七八九十百千万零两]|^\W*[A-Za-z]\W")
_FIRST_WORD: Final = re.compile(r"[(（\[]?\s*\**([^\W\d_]+(?:['’][^\W\d_]+)?)(?P<next>.?)", re.DOTALL)
_TEXT: Final = re.compile(r"^\\(?:text|mbox|mathrm)\s?\{([^{}]*)\}")
_CHINESE: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_CHINESE_JOINT: Final = re.compile(
    r"\s*(?:或|和|与|及|以及|跟|还是|不|非|错|等等|到|至|约|大约|也许|可能|应该|更正|抱歉|哦|[零一二三四五六七八九十百千万两]+(?:$|[^\u4e00-\u9fff]))"
)
_CHINESE_DENIAL: Final = re.compile(r"不对|不是(?:答案|正确)|错了|错误|更正|抱歉|重新|应该是|等一下|等等")
_ALTERNATIVE: Final = split(
    "or and then maybe perhaps possibly alternatively plus minus times to by through versus vs but however depending "
    "else otherwise approximately about roughly mod modulo base over"
)
_LEADING: Final = frozenset(["so", "hence", "thus", "therefore", "then", "making", "giving", "equals", "namely", "ie"])
_DENIAL: Final = re.compile(
    r"\b(?:wait|actually|sorry|oops|correction|correct(?:ing|ed)|incorrect(?:ly)?|wrong|mistake[ns]?|hmm+|nope|redo|recheck|recompute|"
    r"i mean|i meant|let me|make that|scratch that|on second thought|should (?:be|have)|(?:is|was|'s|are) not|isn't|wasn't|"
    r"not (?:right|the|correct|it|quite|sure)|cannot be|can't be)\b",
    re.IGNORECASE,
)
_SHORT: Final = split("in as so is it he we at by on an of if my us")


def without_words(stated: str) -> str:
    """Return what is stated, up to the words that explain it; all of it where there are none."""
    text = _without_lead(stated[:_LONGEST])
    for separator in _SEPARATOR.finditer(text):
        head, rest = text[: separator.start()].rstrip(), text[separator.end() :]
        if not head or _UNFINISHED.search(head) or _open_brackets(head) or not _MATHEMATICS.search(head):
            continue
        if _explains(rest.strip(), separator[0]) or _repeats(head, rest):
            return head
        if retracts(rest):
            return stated
    return text if len(stated) <= _LONGEST else stated


def _without_lead(stated: str) -> str:
    """Return what is stated without the words that lead to a number in it: `the largest n is 34`, `that she has 42 eggs`."""
    if (label := _LABEL.match(stated)) and introduces(f"{label[1] or label[2]} "):
        return stated[label.end() :]
    value = _VALUE.search(stated)
    if value is None or not value.start() or not stated[0].isalpha():
        return stated
    return stated[value.start() :] if introduces(stated[: value.start()]) else stated


def doubts(sentence: str) -> bool:
    """Return whether a sentence denies, compares or computes: a number in it may then be no answer."""
    words = {word.lower() for word in re.findall(r"[^\W\d_]+(?:['’]t)?", sentence[:_LONGEST])}
    return bool(words & (RETRACTING | MATHEMATICAL | NUMBER_WORDS)) or retracts(sentence)


def retracts(rest: str) -> bool:
    """Return whether words behind an answer take it back, wholly or perhaps: `no, wait`, `that is wrong`, 不对."""
    first = _FIRST_WORD.match(rest)
    return bool(
        (first and first[1].lower() in RETRACTING) or _DENIAL.search(rest[:400]) or _CHINESE_DENIAL.search(rest[:400])
    )


def _explains(rest: str, separator: str) -> bool:
    rest = _TEXT.sub(r"\1", rest).strip()
    if not rest:
        return separator.strip() != ""
    if retracts(rest):
        return False
    core = rest.lstrip("(（[ ")
    if core[:5].lower().startswith(("i.e.", "e.g.")):
        return not core[4:].lstrip(" ,:")[:1].isdigit()
    if _CHINESE.match(core):
        return _CHINESE_JOINT.match(core) is None
    first = _FIRST_WORD.match(rest)
    if first is None:
        return False
    word, behind = first[1].lower(), rest[first.end(1) :].lstrip()
    if word in _ALTERNATIVE:
        return word == "and" and _is_plain(behind)
    if word in _LEADING and re.match(r"[$\\\d-]", behind):
        return False
    if word in ("i",):
        return bool(re.match(r"[A-Za-z]{2,}", behind))
    return _is_plain(rest.lstrip("(（[* "))


def _repeats(head: str, rest: str) -> bool:
    """Return whether the words say the number again: `72 (six dozen)`, `72, seventy-two`."""
    again = re.match(r"[(（\[]?\s*([^()\[\].,;）]*)", rest)
    value = read_number(again[1]) if again and again[1][:1].isalpha() else None
    number = read_number(head)
    return value is not None and number is not None and value.value == number.value


def _is_plain(text: str) -> bool:
    """Return whether a text begins with a word of prose: no variable, function, number in words or equation."""
    word = re.match(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", text)
    if word is None:
        return False
    lowered, behind = word[0].lower(), text[word.end() :].lstrip()
    if behind[:1] in ("=", "^", "_", "+", "*", "/", "<", ">", "{", "\\") or (
        behind[:1] == "(" and text[word.end()] == "("
    ):
        return False
    if lowered in MATHEMATICAL or lowered in RETRACTING or lowered in _ALTERNATIVE:
        return False
    if lowered.split("-")[0] in NUMBER_WORDS:  # another number
        return False
    return lowered == "a" or lowered in _SHORT or is_word(word[0])


def _open_brackets(head: str) -> bool:
    head = head.replace(r"\left", "").replace(r"\right", "")
    opened = sum(map(head.count, "([{（")) - sum(map(head.count, ")]}）"))
    return opened > 0 or (head.replace(r"\$", "").count("$") % 2 == 1 and not re.match(r"\s*-?\$\s?\d", head))


_WRAPPING: Final = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s?\{([^{}]*)\}|[$*]")
_LABEL_ONLY: Final = re.compile(r"[(\[{]?([A-J])[)\]}]?[.。]?")
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
    """Return the label of the right option, and whether the gold marks it as one (`C`, `(C) Cecile`) or not (`C Cecile`).

    None where the gold answer is not that of a multiple-choice question.
    """
    lines = [_WRAPPING.sub(r"\1", line).strip() for line in gold.split("\n")]
    if len(lines) == 1 and (core := _LABEL_ONLY.fullmatch(lines[0])):
        return core[1], True
    for line in lines:
        if marked := _LABELLED.fullmatch(line):
            return marked[1] or marked[2], True
        if unmarked := _UNMARKED.fullmatch(line):
            return unmarked[1], False
    return None


def find_choice(text: str, answer: str | None, *, marked: bool, search: bool) -> str | None:
    """Return the label that an output settles on, or None.

    Args:
        text: the output.
        answer: what its conventions say is the answer, where they find one.
        marked: whether the gold marks its label; otherwise only a label and nothing else counts.
        search: whether a label anywhere in the text counts, if it is the only one that is not denied.
    """
    stated = _WRAPPING.sub(r"\1", text[:_OPENING_LENGTH] if answer is None else answer).strip()
    if core := _LABEL_ONLY.fullmatch(stated):
        return core[1]
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
    """Return the one label that the words leave standing: "It's not A, therefore B" leaves B, "A or B" none."""
    labels = {found[0].strip("()") for found in _LONE.finditer(_DENIED.sub(" ", prose))}
    return labels.pop() if len(labels) == 1 else None
