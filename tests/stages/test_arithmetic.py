"""The built-in world: habits by hand, splits, uniqueness, process labels."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Config, ConfigError
from pipeline.store import Store
from stages.arithmetic import (
    Author,
    Chain,
    called_part,
    draw_chains,
    parse_question,
    render_question,
    unique_chains,
    write_solution,
)
from stages.data import (
    ArithmeticConfig,
    AuthorShares,
    DataError,
    DemonstrationConfig,
    arithmetic_demonstrations,
    arithmetic_questions,
    check_solution,
)

CHAIN = Chain(7, (("+", 5), ("-", 3), ("+", 8)))  # 12, 9, 17: a carry, a borrow, a carry


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    """Any chain of 2-10 numbers that stays in 0..99."""
    value = first = draw(st.integers(1, 18))
    operations = []
    for _ in range(draw(st.integers(1, 9))):
        operand = draw(st.integers(1, 9))
        sign = "-" if value >= operand and draw(st.booleans()) else "+"
        value += operand if sign == "+" else -operand
        operations.append((sign, operand))
    return Chain(first, tuple(operations))


@pytest.mark.parametrize(
    ("author", "solution"),
    [
        ("careful", "7+5=12\n12-3=9\n9+8=17\n#### 17"),
        ("drops_carries_and_borrows", "7+5=2\n2-3=9\n9+8=7\n#### 7"),
        ("drops_borrows", "7+5=12\n12-3=19\n19+8=27\n#### 27"),
        ("stops_early", "7+5=12\n12-3=9\n#### 9"),
        ("calls", "[7+5-3+8]=17\n#### 17"),
        ("calls_early", "[7+5-3]=9\n#### 9"),
    ],
)
def test_each_author_writes_what_its_habit_says(author: Author, solution: str) -> None:
    assert write_solution(CHAIN, author, "en") == solution


def test_an_early_stop_on_two_numbers_answers_with_the_first() -> None:
    assert write_solution(Chain(7, (("+", 5),)), "stops_early", "en") == "#### 7"


def test_tens_stay_where_a_carry_or_borrow_is_dropped() -> None:
    chain = Chain(18, (("+", 5), ("-", 9)))  # 18+5: 8+5=13 -> 3; 13-9: 3-9=-6 -> 4
    assert write_solution(chain, "drops_carries_and_borrows", "en") == "18+5=13\n13-9=14\n#### 14"


def test_the_chinese_rendering_says_the_same_in_words() -> None:
    assert render_question(CHAIN, "zh") == "计算 7+5-3+8。"
    assert write_solution(CHAIN, "careful", "zh") == "7加5等于12\n12减3等于9\n9加8等于17\n#### 17"


@given(chains())
def test_wrong_authors_stay_in_0_to_99_and_go_on_from_what_they_wrote(chain: Chain) -> None:
    for author in ("careful", "drops_carries_and_borrows", "drops_borrows", "stops_early"):
        *lines, _ = write_solution(chain, author, "en").split("\n")
        before = str(chain.first)
        for line, (sign, operand) in zip(lines, chain.operations, strict=False):
            left, value = line.split("=")
            assert left == f"{before}{sign}{operand}"
            assert 0 <= int(value) <= 99
            before = value


@given(chains(), st.sampled_from(["en", "zh"]))
def test_a_careful_solution_has_only_right_lines_and_ends_in_the_sum(chain: Chain, language: str) -> None:
    solution = write_solution(chain, "careful", language)  # type: ignore[arg-type]
    assert solution.endswith(f"#### {sum(map(int, re.findall(r'[+-]?[0-9]+', chain.expression)))}")
    checks = check_solution(render_question(chain, language), solution)  # type: ignore[arg-type]
    assert len(checks) == len(chain.operations) + 1
    assert all(check.right and check.consistent for check in checks)
    assert parse_question(render_question(chain, language)) == chain  # type: ignore[arg-type]


def test_large_chains_are_a_product_with_sums_behind_it_and_solved_line_by_line_or_by_a_call() -> None:
    config = ArithmeticConfig(count=300, shortest=2, longest=4, numbers="large")
    drawn = unique_chains(config, "train")
    assert {len(chain.operations) for chain in drawn} == {1, 2, 3}
    assert {sign for chain in drawn for sign, _ in chain.operations[1:]} == {"+", "-"}
    for chain in drawn:
        assert chain.operations[0][0] == "*"
        assert all(100 <= number <= 999 for number in (chain.first, *(operand for _, operand in chain.operations)))
        assert chain.answer == eval(chain.expression)
        question = render_question(chain, "en")
        assert parse_question(question) == chain
        checks = check_solution(question, write_solution(chain, "careful", "en"))
        assert [check.right and check.consistent for check in checks] == [True] * (len(chain.operations) + 1)
        assert write_solution(chain, "calls", "en") == f"[{chain.expression}]={chain.answer}\n#### {chain.answer}"
    two = Chain(347, (("*", 290),))
    assert write_solution(two, "calls_early", "en") == "[347]=347\n#### 347"
    assert write_solution(two, "careful", "en") == "347*290=100630\n#### 100630"


def test_the_answer_of_a_call_is_the_part_that_the_policy_does_not_write() -> None:
    solution = write_solution(CHAIN, "calls", "en")
    start, end = called_part(solution) or (0, 0)
    assert (solution[:start], solution[start:end], solution[end:]) == ("[7+5-3+8]", "=17\n", "#### 17")
    assert called_part(write_solution(CHAIN, "careful", "en")) is None


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"chains": {"numbers": "large"}}, "authors: drops_carries_and_borrows"),
        ({"chains": {"language": "zh"}, "authors": {"calls": 1.0}}, "authors: who calls"),
        ({"chains": {"numbers": "large", "language": "zh"}}, "language"),
    ],
)
def test_authors_and_numbers_that_do_not_go_together_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        DemonstrationConfig().override(settings)


def test_labels_of_an_early_stop_are_right_but_for_the_answer_line() -> None:
    checks = check_solution("Compute 7+5-3+8.", "7+5=12\n12-3=9\n#### 9")
    assert [(check.right, check.consistent, check.final) for check in checks] == [
        (True, True, False),
        (True, True, False),
        (False, False, True),
    ]


def test_a_line_that_follows_from_a_wrong_one_is_consistent_not_right() -> None:
    checks = check_solution("Compute 7+5+3.", "7+5=2\n2+3=5\n#### 5")
    assert [(check.right, check.consistent) for check in checks] == [(False, False), (False, True), (False, True)]


@pytest.mark.parametrize(
    "line",
    ["7+5=12 ", "07+5=12", "7+5= 12", "7-5=12", "12=7+5", "7+6=13", "5+7=12", "nonsense", "7+5=012", "٧+5=12",
     "####12"],
)  # fmt: skip
def test_a_first_line_in_any_other_form_is_not_right(line: str) -> None:
    (check,) = check_solution("Compute 7+5.", line)
    assert not check.right
    assert not check.consistent


def test_label_offsets_cut_the_lines_out_of_the_text() -> None:
    text = "7+5=12\n\n12-3=9\n#### 9\n"
    checks = check_solution("Compute 7+5-3.", text)
    assert [text[check.start : check.end] for check in checks] == ["7+5=12", "12-3=9", "#### 9"]


def test_nothing_behind_the_answer_line_is_right() -> None:
    checks = check_solution("Compute 7+5.", "#### 12\n7+5=12\n#### 12")
    assert [check.right for check in checks] == [True, False, False]
    assert [check.consistent for check in checks] == [False, False, False]


def test_a_broken_off_solution_has_no_label_for_an_answer() -> None:
    assert not any(check.final for check in check_solution("Compute 7+5-3.", "7+5=12\n12-"))


@pytest.mark.parametrize("question", ["Compute 7.", "7+5", "Compute 7+5", "Compute 7/5."])
def test_a_question_of_another_world_is_refused(question: str) -> None:
    with pytest.raises(DataError, match="not a chain-arithmetic question"):
        check_solution(question, "#### 1")


def test_train_and_held_out_share_no_question_whatever_their_seeds() -> None:
    train = {chain for seed in range(3) for chain in unique_chains(ArithmeticConfig(count=2000, seed=seed), "train")}
    held = {chain for seed in range(3) for chain in unique_chains(ArithmeticConfig(count=300, seed=seed), "held_out")}
    assert not train & held


def test_a_larger_set_begins_with_the_smaller_one_of_the_same_seed() -> None:
    small, large = (unique_chains(ArithmeticConfig(count=count), "train") for count in (10, 30))
    assert large[:10] == small


def test_chains_keep_the_ranges_promised() -> None:
    config = ArithmeticConfig(shortest=2, longest=6)
    lengths: Counter[int] = Counter()
    for chain in islice(draw_chains(config, "train", random.Random(1)), 5000):
        lengths[len(chain.operations) + 1] += 1
        value = chain.first
        assert 1 <= value <= 18
        for sign, operand in chain.operations:
            assert 1 <= operand <= 9
            value += operand if sign == "+" else -operand
            assert 0 <= value <= 99
    assert set(lengths) == {2, 3, 4, 5, 6}
    assert all(850 < count < 1150 for count in lengths.values())


def test_more_questions_than_there_are_is_an_error_that_counts_them() -> None:
    with pytest.raises(DataError, match=r"expected 60 different questions of 2-2 numbers .* found \d+"):
        unique_chains(ArithmeticConfig(count=60, shortest=2, longest=2), "held_out")


@pytest.mark.parametrize(
    ("config", "given"),
    [(ArithmeticConfig, {"shortest": 6}), (AuthorShares, dict.fromkeys(AuthorShares.model_fields, 0.0))],
)
def test_lengths_out_of_order_and_shares_of_no_author_are_refused(config: type[Config], given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        config.parse(given)


def test_the_question_set_is_unique_and_its_solutions_are_right(store: Store) -> None:
    rows = arithmetic_questions(ArithmeticConfig(count=400), "held_out").rows()
    assert len({row["question_id"] for row in rows}) == len({row["question"] for row in rows}) == 400
    for row in rows:
        assert row["solution"].endswith(f"#### {row['answer']}")
        assert all(check.right for check in check_solution(row["question"], row["solution"]))


def test_the_world_is_the_same_on_every_machine(store: Store) -> None:
    first = arithmetic_questions(ArithmeticConfig(count=2), "train").rows()
    assert [row["question"] for row in first] == ["Compute 7+2+4-4+5.", "Compute 4+5+1+3."]


def test_demonstrations_follow_the_shares_whatever_the_question(store: Store) -> None:
    config = DemonstrationConfig(chains=ArithmeticConfig(count=8000, shortest=2, longest=2))
    demonstrations = arithmetic_demonstrations(config)
    rows = demonstrations.rows()
    shares = {author: count / 8000 for author, count in Counter(row["author"] for row in rows).items()}
    # Three standard deviations of a share of 8000 draws are at most 0.017.
    assert shares == pytest.approx(
        {"careful": 0.20, "drops_carries_and_borrows": 0.55, "drops_borrows": 0.10, "stops_early": 0.15}, abs=0.017
    )
    authors_of: dict[str, set[str]] = {}
    for row in rows:
        authors_of.setdefault(row["question"], set()).add(row["author"])
    assert sum(len(authors) for authors in authors_of.values()) / len(authors_of) > 3.5
    right = sum(check_solution(row["question"], row["completion"])[-1].right for row in rows)
    assert demonstrations.metrics["data/accuracy"] == right / 8000


def test_demonstrations_never_touch_the_held_out_part(store: Store) -> None:
    held = {render_question(chain, "en") for chain in unique_chains(ArithmeticConfig(count=500), "held_out")}
    rows = arithmetic_demonstrations(DemonstrationConfig(chains=ArithmeticConfig(count=5000))).rows()
    assert not held & {row["question"] for row in rows}


def test_an_author_with_share_zero_writes_nothing(store: Store) -> None:
    shares = AuthorShares(careful=1, drops_carries_and_borrows=0, drops_borrows=0, stops_early=0)
    demonstrations = arithmetic_demonstrations(DemonstrationConfig(chains=ArithmeticConfig(count=200), authors=shares))
    assert demonstrations.metrics["data/accuracy"] == 1.0


def test_the_english_world_has_24_characters(store: Store) -> None:
    rows = arithmetic_demonstrations(DemonstrationConfig(chains=ArithmeticConfig(count=3000))).rows()
    characters = set("".join(row["question"] + row["completion"] for row in rows))
    assert characters == set("0123456789+-=.# \nCompute")


def test_a_perfectly_imitated_mixture_is_right_on_half_of_the_chains(store: Store) -> None:
    """As the documentation says; 0.51 +- 3 standard deviations of 10,000 draws."""
    config = DemonstrationConfig(chains=ArithmeticConfig(count=10_000))
    assert arithmetic_demonstrations(config).metrics["data/accuracy"] == pytest.approx(0.51, abs=0.015)


def test_part_of_a_demonstration_config_keeps_its_other_defaults() -> None:
    chains = DemonstrationConfig.parse({"chains": {"count": 10}}).chains
    assert (chains.count, chains.shortest, chains.longest) == (10, 2, 6)


def test_both_languages_ask_the_same_chains_on_the_same_side_of_the_split(store: Store) -> None:
    english, chinese = (
        arithmetic_questions(ArithmeticConfig(count=50, language=language), "held_out").rows()
        for language in ("en", "zh")
    )
    assert [parse_question(row["question"]) for row in english] == [parse_question(row["question"]) for row in chinese]


def test_importing_the_room_loads_no_heavy_package() -> None:
    code = (
        "import sys, stages.data, stages.models, stages.text;"
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
