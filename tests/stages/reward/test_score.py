"""The reward stage: one row per output, statuses, weights, truncation, and nothing started that is not needed."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from pipeline.config import ConfigError
from pipeline.store import Store
from stages.join import JoinError
from stages.reward import AccuracyConfig, FormatConfig, LanguageConfig, RewardConfig, score
from stages.reward.composition import Part, compose
from stages.reward.rules.accuracy import GoldError
from stages.tables import Questions, Rollouts
from tests.stages.rows import column, output_row, question_table

pytestmark = pytest.mark.usefixtures("store")


def questions(**answers: str) -> Questions:
    rows = [{"question_id": k, "question": "?", "answer": v, "solution": None} for k, v in answers.items()]
    return Questions.write(rows)


def rollouts(*rows: tuple[str, int, str] | tuple[str, int, str, str]) -> Rollouts:
    """Of (question, sample, text) and, where the length limit cut it, `length`."""
    return Rollouts.write([output_row(*row[:3], tokens=2, cut="length" in row[3:]) for row in rows])


EXACT = RewardConfig(components=(AccuracyConfig(verifier="exact"),))


@pytest.mark.claim("two rewards for one output, or none", "line 8")
def test_every_output_has_its_row_with_status_score_and_extracted_answer() -> None:
    made = score(
        rollouts(("b", 0, "#### 1,000.0"), ("a", 1, "#### 18"), ("a", 0, "#### 17"), ("b", 1, "no idea")),
        questions(a="17", b="1000"),
        EXACT,
    )
    assert column(made, "question_id") == ["b", "a", "a", "b"]
    assert column(made, "sample") == [0, 1, 0, 1]
    assert column(made, "reward") == [1.0, 0.0, 1.0, 0.0]
    assert column(made, "status") == ["ok", "wrong", "ok", "unparseable"]
    assert column(made, "extracted") == ["1000", "18", "17", None]
    for scored_as_a_whole_by_rules in ("step_rewards", "step_ends", "scorer"):
        assert column(made, scored_as_a_whole_by_rules) == [None] * 4


def test_the_reward_is_the_weighted_sum_and_component_scores_stay_in_the_table() -> None:
    config = RewardConfig(components=(AccuracyConfig(verifier="exact"), FormatConfig(weight=0.25)))
    made = score(rollouts(("a", 0, "#### 17"), ("a", 1, "A: 17"), ("a", 2, "#### 3")), questions(a="17"), config)
    assert column(made, "reward") == [1.25, 1.0, 0.25]
    assert column(made, "components") == [
        [("accuracy", 1.0), ("format", 1.0)],
        [("accuracy", 1.0), ("format", 0.0)],
        [("accuracy", 0.0), ("format", 1.0)],
    ]
    assert made.metrics["reward/mean"] == pytest.approx(2.5 / 3)
    assert made.metrics["reward/accuracy"] == pytest.approx(2 / 3)
    assert made.metrics["reward/format"] == pytest.approx(2 / 3)
    assert made.metrics["reward/status_ok"] == pytest.approx(2 / 3)
    assert made.metrics["reward/status_timeout"] == 0.0


@pytest.mark.claim("truncated outputs treated by accident")
@pytest.mark.parametrize(
    ("policy", "reward", "status"),
    [("as_unparseable", 0.0, "truncated"), ("as_is", 1.0, "ok"), ("no_reward", None, "truncated")],
)
def test_a_truncated_output_is_treated_as_the_config_names_it(policy: str, reward: float | None, status: str) -> None:
    config = EXACT.override({"truncated": policy})
    made = score(rollouts(("a", 0, "#### 17", "length"), ("a", 1, "#### 17")), questions(a="17"), config)
    assert column(made, "reward") == [reward, 1.0]
    assert column(made, "status") == [status, "ok"]
    assert made.metrics["reward/mean"] == (0.5 if reward == 0.0 else 1.0)


FAR = "#### 17\n" + "and so on " * 600


@pytest.mark.claim("an answer that the model did not mean")
@pytest.mark.parametrize(
    ("settings", "text", "status"),
    [
        ({}, FAR, "ok"),
        ({"reads": "last_characters"}, FAR, "unparseable"),
        ({"reads": "last_characters", "last_characters": 7000}, FAR, "ok"),
        ({"reads": "last_characters", "last_characters": 2}, "#### 17", "ok"),
        ({}, "<think>#### 17\n</think>I cannot tell.", "ok"),
        ({"thinking": {}}, "<think>#### 17\n</think>I cannot tell.", "unparseable"),
        ({"thinking": {}}, "<think>#### 3\n</think>#### 17", "ok"),
        ({"thinking": {}}, "<think>#### 17", "unparseable"),
        ({"thinking": {}}, "#### 17", "ok"),
        ({"thinking": {}}, "#### 3\n</think>#### 17", "ok"),
        ({"thinking": {"opened_by_prompt": True}}, "#### 17", "unparseable"),
        ({"thinking": {"opened_by_prompt": True}}, "hmm</think>#### 17", "ok"),
        ({"thinking": {"tags": ["[", "]"]}}, "[#### 17]", "unparseable"),
    ],
)
def test_only_the_part_that_is_read_states_an_answer(settings: dict[str, Any], text: str, status: str) -> None:
    made = score(rollouts(("a", 0, text)), questions(a="17"), EXACT.override(settings))
    assert column(made, "status") == [status]


@pytest.mark.claim("an answer that the model did not mean")
@pytest.mark.parametrize(("mark", "statuses"), [("last", ["wrong", "ok"]), ("first", ["ok", "wrong"])])
def test_the_mark_that_counts_is_a_setting(mark: str, statuses: list[str]) -> None:
    config = RewardConfig.parse({"components": [{"kind": "accuracy", "verifier": "exact", "mark": mark}]})
    outputs = rollouts(("a", 0, "#### 17\n\nQuestion: and now?\n#### 7"), ("a", 1, "#### 7\nno\n#### 17"))
    assert column(score(outputs, questions(a="17"), config), "status") == statuses


def test_a_form_is_looked_for_where_the_answer_is() -> None:
    config = RewardConfig.parse({"components": [{"kind": "format", "form": "boxed"}], "thinking": {}})
    outputs = rollouts(("a", 0, r"<think>\boxed{1}</think>\boxed{2}"), ("a", 1, r"<think>\boxed{1}</think>2"))
    assert column(score(outputs, questions(a="17"), config), "reward") == [0.1, 0.0]


@pytest.mark.parametrize(
    "changes",
    [
        {"last_characters": 100},
        {"reads": "last_characters", "last_characters": 0},
        {"thinking": {"tags": ["<a>", "<a>"]}},
        {"thinking": {"tags": ["", "</a>"]}},
        {"thinking": {}, "components": [{"kind": "format", "form": "pattern", "pattern": "x"}]},
        {"reads": "last_characters", "components": [{"kind": "language"}]},
        {"components": []},
        {"components": [{}, {}]},
        {"components": [{"kind": "accuracy"}] * 2},
        {"components": [{"kind": "format", "form": "pattern"}]},
        {"components": [{"kind": "steps"}, {"kind": "steps", "name": "again"}]},
        {"components": [{"kind": "overlong"}]},
        {"components": [{"kind": "accuracy"}, {"kind": "overlong", "max_tokens": 200, "buffer_tokens": 300}]},
    ],
)
def test_a_reward_of_nothing_of_unclear_or_of_ignored_parts_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RewardConfig.parse(changes)


def test_an_answer_beyond_arithmetic_is_compared_symbolically() -> None:
    made = score(
        rollouts(("a", 0, r"\boxed{\frac{\sqrt2}{2}}"), ("a", 1, r"\boxed{\sqrt{2}}"), ("a", 2, r"\boxed{9^{9^9}}")),
        questions(a=r"\frac{1}{\sqrt{2}}"),
        RewardConfig(workers=1, deadline_s=20),
    )
    assert column(made, "status") == ["ok", "wrong", "unparseable"]
    assert made.metrics["reward/screened"] == pytest.approx(1 / 3)


def test_language_adds_its_share_to_the_reward_and_decides_no_status() -> None:
    config = RewardConfig(components=(AccuracyConfig(verifier="exact"), LanguageConfig()))
    outputs = rollouts(
        ("a", 0, "There are 17 eggs.\n#### 17"), ("a", 1, "一共有十七个\n#### 17"), ("a", 2, "", "length")
    )
    made = score(outputs, question_table("17", question_id="a", question="How many eggs are there?"), config)
    assert column(made, "reward") == [1.1, 1.0, 0.0]
    assert column(made, "status") == ["ok", "ok", "truncated"]
    assert column(made, "components")[1] == [("accuracy", 1.0), ("language", 0.0)]
    assert made.metrics["reward/language"] == pytest.approx(1 / 3)


@pytest.mark.claim("0.0 read as missing")
def test_a_hanging_comparison_costs_its_own_row_only() -> None:
    bomb = r"\boxed{\sin^{40}(x)+\cos^{40}(x)-\tan^{20}(x)\sec^{20}(x)}"
    config = RewardConfig(workers=1, deadline_s=0.05)  # the comparison takes seconds
    made = score(rollouts(("a", 0, bomb), ("a", 1, r"\boxed{17}")), questions(a="17"), config)
    assert column(made, "status") == ["timeout", "ok"]
    assert column(made, "reward") == [None, 1.0]
    assert made.metrics["reward/missing"] == made.metrics["reward/faults"] == 0.5
    assert made.metrics["reward/mean"] == 1.0


def test_a_row_that_is_repeated_or_of_an_unknown_question_is_refused_by_its_key() -> None:
    with pytest.raises(JoinError) as unknown:
        score(rollouts(("zz", 0, "#### 1")), questions(a="1"), EXACT)
    with pytest.raises(JoinError) as repeated:
        score(rollouts(("a", 0, "#### 1"), ("a", 0, "#### 2")), questions(a="1"), EXACT)
    assert (unknown.value.missing, repeated.value.repeated) == ("zz", ("a", 0))


def test_a_question_without_an_answer_is_refused_by_name() -> None:
    with pytest.raises(GoldError, match="'a'"):
        score(rollouts(("a", 0, "#### 1")), questions(a=" "), EXACT)


def test_an_empty_batch_has_an_empty_table() -> None:
    made = score(Rollouts.write({name: [] for name in Rollouts.schema.names}), questions(a="1"), EXACT)
    assert made.rows() == []


@pytest.mark.claim("abstaining components summed as 0")
def test_a_score_that_is_no_number_is_refused_with_its_component_and_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.reward.components.has_form", lambda text, *_: math.nan if text == "x" else 1.0)
    config = RewardConfig(components=(AccuracyConfig(verifier="exact"), FormatConfig()))
    with pytest.raises(ValueError, match=r"'format' .*\('a', 1\).* nan"):
        score(rollouts(("a", 0, "#### 17"), ("a", 1, "x")), questions(a="17"), config)


def test_a_rollout_whose_text_ends_do_not_match_its_tokens_is_refused_by_name() -> None:
    row = output_row("a", 3, "#### 17", tokens=2, text_ends=[7])
    with pytest.raises(ValueError, match=r"\('a', 3\).* text_ends"):
        score(Rollouts.write([row]), questions(a="17"), EXACT)


def test_workers_and_deadlines_are_not_part_of_the_key() -> None:
    assert RewardConfig(workers=7, deadline_s=9.0, memory_mb=999).key() == RewardConfig().key()


@pytest.mark.claim("0.0 read as missing", "abstaining components summed as 0")
@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([Part(1.0, 1.0, "no_reward"), Part(None, 0.5, "no_reward")], None),
        ([Part(1.0, 1.0, "no_reward"), Part(None, 0.5, "zero")], 1.0),
        ([Part(1.0, 1.0, "no_reward"), Part(None, 0.5, "rescale")], 1.5),
        ([Part(None, 0.5, "rescale")], None),
        ([Part(0.0, 1.0, "no_reward")], 0.0),
    ],
)
def test_a_missing_score_counts_as_declared(parts: list[Part], expected: float | None) -> None:
    assert compose(parts) == expected


def test_scoring_arithmetic_starts_no_process_and_imports_no_sympy(store: Store) -> None:
    code = f"""
import sys, multiprocessing
from pathlib import Path
from pipeline.residency import resident
from pipeline.store import Store, use_store
from stages.reward import RewardConfig, score
from stages.tables import Questions, Rollouts
row = dict(prompt_ids=[1], output_ids=[2], logprobs=[-0.1], finish_reason="stop", temperature=1.0, seed=0, text_ends=[0])
with use_store(Store(Path({str(store.root)!r}))):
    questions = Questions.write([dict(question_id="a", question="?", answer="17", solution=None)])
    texts = ["7+5=12\\n#### 17", "#### 1,700", "#### -3", "nothing", "17", "#### $17.0", "#### 34/2"]
    outputs = Rollouts.write([dict(row, question_id="a", sample=i, text=t) for i, t in enumerate(texts)])
    print([r["status"] for r in score(outputs, questions, RewardConfig()).rows()])
assert not resident("verifier", (2, 1024), lambda: None).started
assert not multiprocessing.active_children()
print(sorted(m for m in ("sympy", "math_verify", "torch", "pebble", "numpy.random") if m in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    statuses, modules = done.stdout.strip().splitlines()[-2:]
    assert statuses == "['ok', 'wrong', 'wrong', 'unparseable', 'ok', 'ok', 'ok']"
    for heavy in ("sympy", "math_verify", "torch", "pebble"):
        assert heavy not in modules
