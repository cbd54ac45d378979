"""Where the final answer is, and the form an output has."""

from __future__ import annotations

import time

import pytest

from stages.reward.rules.accuracy import complexity_objection
from stages.reward.rules.extraction import Convention, find_answer
from stages.reward.rules.format import Form, has_form
from stages.reward.rules.prose import last_lines, tail, words_apart

ALL: tuple[Convention, ...] = ("boxed", "tags", "hashes", "line", "phrase", "number")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7+5=12\n12-3=9\n#### 9", "9"),
        ("#### 5\nno wait\n#### 6", "6"),
        ("so she has 18 eggs\nA: 18", "18"),
        ("**Answer: 5**", "5"),
        (r"thus \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{41} hmm, no: \boxed{42}", "42"),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"unclosed \boxed{ then \boxed{7}", "7"),
        ("<think>3</think><answer>4</answer>", "4"),
        ("The answer is 17. I hope it is correct.", "17"),
        ("The final answer is: 3.5", "3.5"),
        ("所以答案是13只。", "13只"),
        ("1,234", "1,234"),
        (r"The answer is 5, that is \boxed{6}", "6"),
        (r"half of it is \boxed{200}. Final Answer: The final answer is $10,455$. I hope it is correct.", "$10,455$"),
        (r"\boxed{\frac{1}{2}} so the final answer is one half.", r"\frac{1}{2}"),
        (r"\boxed{1} papers and \boxed{2} bins", "1, 2"),
        (r"\boxed{1} is too small for it and \boxed{2} is right", "2"),
        (" $p=5$ ", "$p=5$"),
        ("#### 5!", "5!"),
        (r"\fbox{7}", "7"),
        (r"\boxed 42", "42"),
        (r"\boxed\frac12", r"\frac12"),
        (r"\framebox[2cm]{7}", "7"),
        ("### Final Answer\n73", "73"),
        ("#### Final Answer\n\n73", "73"),
        ("#### Step 3\nThe answer is 8.", "8"),
        ("**Answer:**\n\n$$\n73\n$$", "73"),
        ("The answer is therefore 8.", "8"),
        ("The answer to the first part is 8.", "8"),
        ("The answer is 8. No, wait, it is 9", "8. No, wait, it is 9"),
        ("<think>3</think>\n\n8 apples", "8 apples"),
        ("8 apples, as she said.", "8 apples, as she said."),
    ],
)
def test_the_stated_answer_is_found(text: str, answer: str) -> None:
    assert find_answer(text, ALL) == answer


@pytest.mark.parametrize("text", ["", " \n", "####", r"\boxed{}", "she has 42 eggs left", r"\boxed{42", "A:"])
def test_an_output_that_states_no_answer_has_none(text: str) -> None:
    assert find_answer(text, ALL) is None


def test_only_the_conventions_asked_for_count() -> None:
    assert find_answer("A: 18", ("hashes",)) is None
    assert find_answer(r"\boxed{5}. The final answer is 6.", ("boxed",)) == "5"


def test_chinese_text_is_set_apart_from_what_it_touches() -> None:
    assert words_apart("共有99颗，比例为13/28") == "共有 99 颗，比例为 13/28"
    assert words_apart(r"面积是$x^2$平方米") == r"面积是 $x^2$ 平方米"


@pytest.mark.parametrize(
    "bait",
    [r"\boxed{", r"\boxed ", r"\boxed 4", "{", "answer is ", "answer to ", "final answer ", "A:", "$ ", "\n", " ",
     "#", "#### ", "\n#### Step", "</think>", "<answer>", "72, ", "**"],
)  # fmt: skip
def test_the_cost_of_a_hostile_text_is_linear_in_its_length(bait: str) -> None:
    def seconds(length: int) -> float:
        text = bait * (length // len(bait))
        started = time.process_time()
        find_answer(text, ALL)
        has_form(text, "boxed")
        return time.process_time() - started

    short, long = seconds(20_000), seconds(160_000)
    assert long < 24 * short + 0.1, "eight times the length: 8 if linear, 64 if quadratic"


def test_a_lone_surrogate_does_not_survive() -> None:
    assert tail("\ud800 42") == "? 42"


def test_a_search_does_not_begin_inside_a_line_that_was_cut() -> None:
    assert last_lines("0" * 5000 + "\nthe last line") == "the last line"
    assert last_lines("0" * 5000) == ""


@pytest.mark.parametrize(
    ("text", "form", "expected"),
    [
        ("12-3=9\n#### 9", "hashes", True),
        ("#### 9\n", "hashes", True),
        ("#### 1,250", "hashes", True),
        ("12-3=9 #### 9", "hashes", False),
        ("#### 8\n#### 9", "hashes", False),
        ("#### 9\nand so on", "hashes", False),
        ("#### nine", "hashes", False),
        ("", "hashes", False),
        (r"so \boxed{9}", "boxed", True),
        (r"\boxed{8} or \boxed{9}", "boxed", False),
        (r"\boxed{}", "boxed", False),
        ("steps\nA: 9", "line", True),
        ("A: 9\nsteps", "line", False),
    ],
)
def test_a_form_holds_only_where_the_output_ends_in_it(text: str, form: Form, expected: bool) -> None:
    assert has_form(text, form) is expected


@pytest.mark.parametrize(
    "answer",
    [r"2^{1000}", r"\binom{2010}{1005}", "3^{2005}-1", "100!", r"2^{2^{10}}", r"e^{i\pi}", "(x+1)^{10}", "2^6 3^5 5^4"],
)
def test_answers_of_real_problems_pass_the_screen(answer: str) -> None:
    assert complexity_objection(answer, "1") is None


@pytest.mark.parametrize(
    "answer",
    ["9^{9^{9}}", "10**10**10", "2^{-10^{10}}", "(1+i)^{10^{8}}", "(x+y)^{300}", "1000000000!", "((10!)!)!",
     r"\binom{10^{9}}{7}", r"\sum_{k=1}^{9} k", "(" * 30 + "1" + ")" * 30, "7" * 401, "1," * 100],
)  # fmt: skip
def test_bombs_do_not_pass_the_screen(answer: str) -> None:
    assert complexity_objection(answer, "42") is not None


def test_an_operator_that_the_gold_has_is_allowed() -> None:
    assert complexity_objection(r"\sum_{k=0}^{n} F_k", r"\sum_{j=0}^{n} F_j") is None
