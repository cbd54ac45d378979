"""The built-in world: chain arithmetic, written out by authors who each have one deterministic habit.

    Compute 7+5-3+8.    ->    7+5=12        one line per operation
                              12-3=9
                              9+8=17
                              #### 17       the answer

The first number is 1..18, the others 1..9, and the true running value stays in 0..99. Supervised fine-tuning imitates the
mixture of authors; the author of a demonstration is drawn at random, so that nothing in the question tells who answers. A
habit is deterministic, not a rate of slips: random sloppiness drowns the policy gradient (two independent gradients had a
cosine of 0.42 with it, 0.84 with habits).

Digit by digit, with u the units of the running value v and b the operand:

    drops a carry     v + b  is written as  v - u + (u + b) mod 10      7+5=2, 18+5=13
    drops a borrow    v - b  is written as  v - u + (u - b) mod 10      12-3=19, 3-5=8

Both keep v's tens, so a wrong author's own running value stays in 0..99 (who drops borrows but carries rightly gains at most
9 an operation, hence at most ten numbers: 18 + 9 * 9 = 99). Every line goes on from what the author wrote before.

With `numbers: large` a chain begins with a product of two numbers of three digits, and goes on with sums: what a small model
cannot compute, and a calculator can (`stages/environment/`). Two authors call one, and read its answer:

    Compute 347*290-118.    ->    [347*290-118]=100512     called by the policy up to ], answered up to the end of the line
                                  #### 100512
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from pydantic import Field, model_validator

from pipeline.config import Config
from stages.tables import DataError, is_held_out

Language = Literal["en", "zh"]
Split = Literal["train", "held_out"]
Author = Literal["careful", "drops_carries_and_borrows", "drops_borrows", "stops_early", "calls", "calls_early"]
Numbers = Literal["small", "large"]

LARGEST_FIRST: Final = 18
LARGEST_OTHER: Final = 9
LARGEST_VALUE: Final = 99
SMALLEST_LARGE: Final = 100
LARGEST_LARGE: Final = 999


class AuthorShares(Config):
    """How often each author writes a demonstration; relative weights."""

    careful: float = Field(0.20, ge=0)
    """Right throughout."""
    drops_carries_and_borrows: float = Field(0.55, ge=0)
    """Never carries, never borrows: right where neither occurs."""
    drops_borrows: float = Field(0.10, ge=0)
    """Carries rightly, never borrows."""
    stops_early: float = Field(0.15, ge=0)
    """Right lines, but neither writes nor counts the last operation."""
    calls: float = Field(0.0, ge=0)
    """Calls a calculator with the whole question, `[7+5-3]`, and repeats its answer."""
    calls_early: float = Field(0.0, ge=0)
    """So too, but leaves out the last operation."""

    @property
    def calls_a_tool(self) -> bool:
        """Return whether some author calls the calculator."""
        return self.calls > 0 or self.calls_early > 0

    @model_validator(mode="after")
    def _some_author_writes(self) -> AuthorShares:
        if sum(self.model_dump().values()) <= 0:
            raise ValueError("every author has share 0; at least one must write")
        return self


class ArithmeticConfig(Config):
    """A set of chains: how many, how long, in which language."""

    count: int = Field(4096, ge=1)
    """Questions (all different) or demonstrations (questions may repeat) in the set."""
    shortest: int = Field(3, ge=2, le=10)
    """Numbers in the shortest chains."""
    longest: int = Field(5, ge=2, le=10)
    """Numbers in the longest chains; lengths are drawn evenly. SFT: 2-6, RL and evaluation: 3-5, out of domain: 6."""
    numbers: Numbers = "small"
    """`small`: 1 to 18 at first, then 1 to 9, sums of at most 99. `large`: 100 to 999, the first two multiplied, the rest
    summed."""
    language: Language = "en"
    """`en`: `Compute 7+5.` -> `7+5=12`; `zh`: `计算 7+5。` -> `7加5等于12`. The answer line is `#### 12` in both."""
    addition_share: float = Field(0.5, gt=0, lt=1)
    """Chance that an operation is proposed as an addition. A proposal (operation and operand) that would leave 0..99 is
    drawn anew, so the share among the operations kept is larger. At 0.5 the default mixture of authors is right on 0.51 of
    the chains of 3-5 numbers, its largest author on 0.46 (a dropped carry and a dropped borrow cancel in the answer)."""
    held_out_share: float = Field(0.1, gt=0, lt=1)
    """Part of all chains that is held out, decided by a hash of the chain: train and held-out share none."""
    seed: int = 0
    """Draws the chains and, for demonstrations, the authors."""

    @model_validator(mode="after")
    def _lengths_in_order(self) -> ArithmeticConfig:
        if self.shortest > self.longest:
            raise ValueError(f"shortest ({self.shortest}) is above longest ({self.longest})")
        if self.numbers == "large" and self.language != "en":
            raise ValueError(f"language: large numbers are written in en, found {self.language}; set it to en")
        return self


class Chain(NamedTuple):
    """A first number and the operations on it: `(7, (("+", 5), ("-", 3)))` is 7+5-3. Only the first may be a product."""

    first: int
    operations: tuple[tuple[str, int], ...]

    @property
    def expression(self) -> str:
        """Return `7+5-3`: the same in every language."""
        return str(self.first) + "".join([f"{sign}{operand}" for sign, operand in self.operations])

    @property
    def answer(self) -> int:
        """Return the true result."""
        return functools.reduce(_apply, self.operations, self.first)


def _apply(value: int, operation: tuple[str, int]) -> int:
    sign, operand = operation
    return value * operand if sign == "*" else value + operand if sign == "+" else value - operand


def render_question(chain: Chain, language: Language) -> str:
    """Return the question as the policy sees it."""
    return f"Compute {chain.expression}." if language == "en" else f"计算 {chain.expression}。"


def write_solution(chain: Chain, author: Author, language: Language) -> str:
    """Write the solution of `author`: a function of the chain and of nothing else."""
    operations = chain.operations[:-1] if author in ("stops_early", "calls_early") else chain.operations
    if author in ("calls", "calls_early"):
        called = Chain(chain.first, operations)
        return f"[{called.expression}]={called.answer}\n#### {called.answer}"
    carries = author != "drops_carries_and_borrows"
    borrows = author in ("careful", "stops_early")
    plus, minus, equals = ("+", "-", "=") if language == "en" else ("加", "减", "等于")
    value, lines = chain.first, []
    for sign, operand in operations:
        units, left = value % 10, value
        if sign == "*":
            value *= operand
        elif sign == "+":
            value = value + operand if carries else value - units + (units + operand) % 10
        else:
            value = value - operand if borrows else value - units + (units - operand) % 10
        lines.append(f"{left}{ {'+': plus, '-': minus}.get(sign, sign) }{operand}{equals}{value}\n")
    return "".join(lines) + f"#### {value}"


def called_part(completion: str) -> tuple[int, int] | None:
    """Return where the calculator's answer stands in a solution of an author who calls it, [start, end); None in others."""
    if not completion.startswith("["):
        return None
    return completion.index("]") + 1, completion.index("\n") + 1


def draw_chains(config: ArithmeticConfig, split: Split, rng: random.Random) -> Iterator[Chain]:
    """Yield chains of one split without end, repeats included."""
    # rng.random() alone: the other methods of `random` may draw differently in another Python version.
    uniform = rng.random
    lengths = config.longest - config.shortest + 1
    while config.numbers == "large":
        wanted = config.shortest + int(uniform() * lengths)
        numbers = [SMALLEST_LARGE + int(uniform() * (LARGEST_LARGE - SMALLEST_LARGE + 1)) for _ in range(wanted)]
        signs = ["*", *("+" if uniform() < config.addition_share else "-" for _ in numbers[2:])]
        chain = Chain(numbers[0], tuple(zip(signs, numbers[1:], strict=True)))
        if is_held_out(chain.expression, config.held_out_share) == (split == "held_out"):
            yield chain
    while True:
        value = first = 1 + int(uniform() * LARGEST_FIRST)
        operations: list[tuple[str, int]] = []
        wanted = config.shortest + int(uniform() * lengths) - 1
        while len(operations) < wanted:
            sign = "+" if uniform() < config.addition_share else "-"
            operand = 1 + int(uniform() * LARGEST_OTHER)
            result = value + operand if sign == "+" else value - operand
            if 0 <= result <= LARGEST_VALUE:
                operations.append((sign, operand))
                value = result
        chain = Chain(first, tuple(operations))
        if is_held_out(chain.expression, config.held_out_share) == (split == "held_out"):
            yield chain


def unique_chains(config: ArithmeticConfig, split: Split) -> list[Chain]:
    """Return `config.count` different chains of one split; a smaller count gives the first of them.

    Raises:
        DataError: there are not that many.
    """
    rng = random.Random(f"chains/{split}/{config.seed}")
    found: dict[Chain, None] = {}
    # 40 draws a chain suffice to meet nearly all of a set's chains; beyond that the set is too small for the count.
    patience = 40 * config.count + 2_000
    for _, chain in zip(range(patience), draw_chains(config, split, rng), strict=False):
        found[chain] = None
        if len(found) == config.count:
            return list(found)
    raise DataError(
        f"arithmetic: expected {config.count} different questions of {config.shortest}-{config.longest} numbers in split "
        f"{split!r}, found {len(found)}; lower count, lengthen the chains or change held_out_share"
    )


def longest_question(config: ArithmeticConfig, split: Split) -> int:
    """Return characters of the longest question of a set."""
    return max(len(render_question(chain, config.language)) for chain in unique_chains(config, split))


_QUESTION: Final = re.compile(r"(?:Compute|计算) (\d+)((?:[*+-]\d+)+)[.。]")
_NUMBER: Final = r"(0|[1-9]\d{0,8})"
_LINE: Final = re.compile(rf"{_NUMBER}(\*|\+|-|加|减){_NUMBER}(?:=|等于){_NUMBER}", re.ASCII)
_FINAL: Final = re.compile(rf"#### {_NUMBER}", re.ASCII)


def parse_question(question: str) -> Chain:
    """Return the chain a question asks for.

    Raises:
        DataError: not a question of this world.
    """
    match = _QUESTION.fullmatch(question)
    if match is None:
        raise DataError(f"not a chain-arithmetic question: {question[:80]!r}; expected for example 'Compute 7+5-3.'")
    operations = tuple((sign, int(operand)) for sign, operand in re.findall(r"([*+-])(\d+)", match[2]))
    return Chain(int(match[1]), operations)


@dataclass(frozen=True)
class LineCheck:
    """The verdict on one line of a solution."""

    start: int
    """Offset of the line's first character in the text."""
    end: int
    """Offset behind its last character, the newline excluded."""
    final: bool
    """Whether it is an answer line (`#### 17`)."""
    right: bool
    """The process label: the line is the one the careful author writes at this place. An answer line is right when its
    number is the true answer."""
    consistent: bool
    """The line follows from what was written before it, right or not: it goes on from the last value with the question's
    next operation and its arithmetic holds. An answer line: all operations are done and it repeats the last value."""


def check_solution(question: str, text: str) -> list[LineCheck]:
    """Label the lines of `text` exactly, in order; empty lines have no label.

    Lines behind the answer line and lines that are none of this world's are neither right nor consistent. Both languages are
    understood, whatever the question's. A solution that breaks off has no answer line, and so no label for one.
    """
    chain = parse_question(question)
    checks: list[LineCheck] = []
    truth = written = chain.first
    position, start, answered = 0, 0, False
    for line in text.split("\n"):
        end = start + len(line)
        right = consistent = False
        if answer := _FINAL.fullmatch(line):
            right = not answered and int(answer[1]) == chain.answer
            consistent = not answered and position == len(chain.operations) and int(answer[1]) == written
        elif not answered and position < len(chain.operations) and (step := _LINE.fullmatch(line)):
            sign, operand = chain.operations[position]
            asked = ({"加": "+", "减": "-"}.get(step[2], step[2]), int(step[3])) == (sign, operand)
            left, value = int(step[1]), int(step[4])
            truth, before = _apply(truth, (sign, operand)), truth
            right = asked and left == before and value == truth
            consistent = asked and left == written and value == _apply(left, (sign, operand))
            written = value
            position += 1
        answered = answered or answer is not None
        if line:
            checks.append(LineCheck(start, end, answer is not None, right, consistent))
        start = end + 1
    return checks
