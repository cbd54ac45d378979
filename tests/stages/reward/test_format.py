"""Language coherence: the script of the question, no mixing, no loops; digits, formulas and code belong to every language."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.reward import LanguageConfig
from stages.reward.rules.format import compression, foreign_share, is_coherent, longest_run

ENGLISH = "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May. How many in all?"
CHINESE = "米米摘了32个桃，淘淘比米米多8个，他们一共摘了多少个桃？"
RIGHT_ENGLISH = "She sold 48/2 = 24 clips in May.\nAltogether she sold 48+24 = 72 clips.\n#### 72"
RIGHT_CHINESE = "淘淘摘了32+8=40个桃。\n他们一共摘了32+40=72个桃。\n#### 72"
LIMITS = LanguageConfig().model_dump(include={"max_foreign", "max_run", "max_compression"})


def coherent(question: str, text: str, **changes: Any) -> bool:
    return is_coherent(question, text, **(LIMITS | changes))


@pytest.mark.parametrize(
    ("question", "text", "expected"),
    [
        (ENGLISH, RIGHT_ENGLISH, True),
        (CHINESE, RIGHT_CHINESE, True),
        (ENGLISH, "48/2=24\n48+24=72\n#### 72", True),
        (CHINESE, "32+8=40\n32+40=72\n#### 72", True),
        (CHINESE, r"设桃数为 $x$，则 \boxed{\frac{x}{2}=36 \text{ so}}，因此 $x=72$ 个桃。", True),
        (
            CHINESE,
            "可以用程序算：\n```python\ndef total(first, more):\n    return first + first + more\n```\n一共72个桃。",
            True,
        ),
        ("Haley的班上有11个男孩，每人9颗弹珠，一共多少颗？", "Haley一共要准备99颗弹珠，Haley有99颗。", True),
        ("How many 元 does the 桃 cost?", "The 桃 costs 3 元, so 3 元 it is.", True),
        ("Compute 7+5-3.", "7+5=12\n12-3=9\n#### 9", True),
        ("7+5-3=?", RIGHT_CHINESE, True),
        ("7+5-3=?", RIGHT_ENGLISH, True),
        ("りんごは全部でいくつありますか？", "りんごは全部で三個あります。答えは3です。", True),
        (ENGLISH, "Elle a vendu l'autre moitié en mai.", True),
        (ENGLISH, "2*2*2*2*2*2*2*2 = 256", True),
        (ENGLISH, "\n".join(f"On day {day} she sells {2 * day} clips." for day in range(1, 9)), True),
        (ENGLISH, RIGHT_CHINESE, False),
        (CHINESE, RIGHT_ENGLISH, False),
        (ENGLISH, "Она продала семьдесят две штуки.", False),
        (CHINESE, "りんごは全部でいくつありますか、七十二です。", False),
        (ENGLISH, f"{RIGHT_ENGLISH}\n{RIGHT_CHINESE}", False),
        (CHINESE, "淘淘摘了 forty 个桃，so altogether there are seventy two 个桃 in the basket。", False),
        (ENGLISH, "", False),
        (CHINESE, " \n\t", False),
        (
            ENGLISH,
            "She sold clips and she sold clips and she sold clips and she sold clips and she sold clips and",
            False,
        ),
        (CHINESE, "所以答案是72，" * 5, False),
        (CHINESE, "好好好好好好好好", False),
        (ENGLISH, "She sold 72 clips, wait, " * 5, False),
        (ENGLISH, "1/3 = 0." + "3" * 600, False),
        (ENGLISH, "She has 72. " + "= 72 " * 200, False),
    ],
)
def test_an_output_is_coherent_in_its_questions_language_unmixed_and_unrepeated(
    question: str, text: str, expected: bool
) -> None:
    assert coherent(question, text) is expected


def test_the_foreign_share_counts_words_and_chinese_characters() -> None:
    assert foreign_share(ENGLISH, "two words 四个汉字") == 4 / 6
    assert foreign_share(CHINESE, "two words 四个汉字") == 2 / 6
    assert foreign_share(CHINESE, "x = 5 cm, y = 6") == 1.0  # cm is the only word
    assert foreign_share(ENGLISH, "12 + 30 = 42") == 0.0


def test_each_limit_is_the_one_declared() -> None:
    mixed = "two words 四个汉字"
    assert coherent(ENGLISH, mixed, max_foreign=4 / 6)
    assert not coherent(ENGLISH, mixed, max_foreign=0.6)
    loop = "and so on " * 3
    assert coherent(ENGLISH, loop, max_run=3)
    assert not coherent(ENGLISH, loop, max_run=2)
    ratio = compression("ab" * 1000)
    assert ratio > 50
    assert coherent(ENGLISH, "ab" * 1000, max_compression=ratio)


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("", 1),
        ("so we go", 1),
        ("so we go so we go so we go", 3),
        ("well, so we go; so we go! So we go on", 3),
        ("no no no no", 4),
        ("1 1 1 1 1", 1),
        ("day 1 day 2 day 3", 1),
        ("day 1 day 1 day 1", 3),
        ("对对对", 3),
        ("x x x x", 1),
        (" ".join([*"abcdefghijklmnopqrstuvw", "word"] * 3), 3),
    ],
)
def test_a_run_is_how_often_one_passage_is_repeated(text: str, times: int) -> None:
    assert longest_run(text) == times


def test_prose_compresses_little_and_short_texts_not_at_all() -> None:
    assert compression(RIGHT_ENGLISH) == 1.0
    assert (
        1.0 < compression(ENGLISH + RIGHT_ENGLISH + "It is a sum of two months, which are added in the end." * 2) < 4.0
    )
    assert compression("所以答案是七十二。" * 40) > 6


def test_a_loop_at_the_end_of_a_long_text_is_found() -> None:
    prose = " ".join(f"Step {i} moves marble {i * i % 97} into box {i * 7 % 31}." for i in range(200))
    assert coherent(ENGLISH, prose)
    assert not coherent(ENGLISH, prose + " over and over again" * 60)


words = st.text(alphabet="abcdefghijklmnopqrstuvwxyz", min_size=2, max_size=8)


@settings(deadline=None)
@given(st.text(max_size=80), st.text(max_size=80))
def test_any_text_has_a_share_between_0_and_1_and_a_verdict(question: str, text: str) -> None:
    assert 0.0 <= foreign_share(question, text) <= 1.0
    assert longest_run(text) >= 1
    assert compression(text) >= 1.0
    assert coherent(question, text) in (True, False)


@settings(deadline=None)
@given(st.text(alphabet="0123456789+-*/=().,<># \n$%", max_size=200))
def test_digits_and_operators_belong_to_every_language(text: str) -> None:
    assert foreign_share(ENGLISH, text) == foreign_share(CHINESE, text) == 0.0
    assert longest_run(text) == 1


@settings(deadline=None)
@given(st.lists(words, min_size=1, max_size=20), st.lists(words, min_size=1, max_size=6), st.integers(5, 9))
def test_a_passage_repeated_more_often_than_declared_is_never_coherent(
    prose: list[str], passage: list[str], times: int
) -> None:
    text = " ".join(prose + passage * times)
    assert longest_run(text) >= times
    assert not coherent(ENGLISH, text)


@settings(deadline=None)
@given(st.integers(0, 30), st.integers(0, 30))
def test_the_share_is_that_of_the_words_of_the_other_script(latin: int, han: int) -> None:
    text = "word " * latin + "字" * han
    everything = max(latin + han, 1)
    assert foreign_share("Which one?", text) == han / everything
    assert foreign_share("哪一个", text) == latin / everything


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet="ab $`\\()[]<>x好1\n", min_size=0, max_size=60), st.integers(1, 400))
def test_bait_costs_milliseconds(piece: str, times: int) -> None:
    started = time.process_time()
    coherent(CHINESE, piece * times)
    assert time.process_time() - started < 2.0


@pytest.mark.slow
def test_right_answers_of_real_models_are_coherent(data_dir: Path) -> None:
    path = data_dir / "gsm8k" / "gsm8k_example_model_solutions.jsonl"
    if not path.exists():
        pytest.skip(f"real data not found: {path}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    models = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    solutions = [(row["question"], row[model]) for row in rows for model in models]
    right = [(question, each["solution"]) for question, each in solutions if each["is_correct"]]
    wrong = [(question, each["solution"]) for question, each in solutions if not each["is_correct"]]
    assert [text for question, text in right if not coherent(question, text)] == []
    loops = [text for question, text in wrong if not coherent(question, text)]
    assert 0 < len(loops) < len(wrong) / 100
    assert not any(coherent(CHINESE, text) for _, text in right[:200])
