"""Your own reward: TRL's signature, in processes that are killed; one bad row never costs the others."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ConfigError
from pipeline.store import Store
from pipeline.workers.functions import find_source
from pipeline.workers.pool import KillablePool, Outcome
from stages.reward import AccuracyConfig, FunctionConfig, RewardConfig, score
from stages.reward.functions import RewardFunctionError, call_in_pieces
from stages.tables import Questions, Rewards, Rollouts
from tests.stages.reward.answers import BAD, GOOD
from tests.stages.rows import column, output_row, question_table

pytestmark = [pytest.mark.usefixtures("one_store"), pytest.mark.filterwarnings("ignore:component 'function'")]

MODULE = "tests.stages.reward.reward_functions"


def config(
    name: str, *, memory_mb: int = 256, truncated: Any = "as_unparseable", max_errors: float = 1.0, **fields: Any
) -> RewardConfig:
    function = FunctionConfig(function=name if ":" in name else f"{MODULE}:{name}", **({"deadline_s": 2.0} | fields))
    return RewardConfig(components=(function,), memory_mb=memory_mb, truncated=truncated, max_errors=max_errors)


def rollouts(*groups: tuple[str, ...], cut: tuple[str, ...] = ()) -> Rollouts:
    """One question for each group of texts, `a`, `b`, ..."""
    return Rollouts.write(
        [
            output_row("abcdef"[question], sample, text, tokens=2, cut=text in cut, output_ids=[7, 8])
            for question, texts in enumerate(groups)
            for sample, text in enumerate(texts)
        ]
    )


def questions() -> Questions:
    rows = [{"question_id": each, "question": "2+2=?", "answer": "4", "solution": None} for each in "bcdef"]
    return Questions.write([{"question_id": "a", "question": "2+2=?", "answer": "4", "solution": "2+2=4"}, *rows])


def scored(reward: RewardConfig, *groups: tuple[str, ...], cut: tuple[str, ...] = ()) -> Rewards:
    return score(rollouts(*groups, cut=cut), questions(), reward)


def test_a_function_gets_what_trl_passes_and_its_numbers_are_the_scores() -> None:
    facts = config("facts", columns=["question", "answer", "solution"])
    assert column(scored(facts, ("4",), ("4",)), "reward") == [1.0, 1.0]
    made = scored(config("by_text"), ("0.5", "-2", "0", "1"))
    assert column(made, "reward") == [0.5, -2.0, 0.0, 1.0]
    assert column(made, "status") == ["ok", "wrong", "wrong", "ok"]
    assert made.metrics["reward/function"] == pytest.approx(-0.125)
    assert made.metrics["reward/faults"] == 0.0
    assert "tests.stages.reward.reward_functions" not in sys.modules, "it runs in workers only"


def test_each_bad_row_has_its_status_and_the_rest_of_the_batch_its_scores() -> None:
    bad = ("hang", "allocate", "raise", "exit", "abort", "nan", "inf", "huge", "nonsense")
    texts = [text for i, each in enumerate(bad) for text in (each, str(i))]
    with pytest.warns(UserWarning, match=r"by_text for 9 of 18 outputs, such as \('a', 0\)"):
        made = scored(config("by_text", deadline_s=1.5), tuple(texts))
    assert column(made, "status")[::2] == ["timeout"] + ["error"] * 8
    assert column(made, "reward")[::2] == [None] * 9
    assert column(made, "reward")[1::2] == list(range(9))
    assert made.metrics["reward/faults"] == made.metrics["reward/missing"] == 0.5


def test_none_is_no_score_and_treated_as_declared() -> None:
    texts = ("none", "0.5")
    assert column(scored(config("by_text"), texts), "reward") == [None, 0.5]
    assert column(scored(config("by_text"), texts), "status") == ["unparseable", "ok"]
    assert column(scored(config("by_text", missing="zero"), texts), "reward") == [0.0, 0.5]
    both = RewardConfig(
        components=(
            AccuracyConfig(verifier="exact"),
            FunctionConfig(function=f"{MODULE}:by_text", weight=0.5, missing="rescale"),
        )
    )
    made = scored(both, ("none", "4"))
    assert column(made, "components") == [
        [("accuracy", 0.0), ("function", None)],
        [("accuracy", 1.0), ("function", 4.0)],
    ]
    assert column(made, "reward") == [0.0, 3.0]
    assert column(made, "status") == ["unparseable", "ok"]


def test_a_call_holds_whole_what_belongs_together() -> None:
    groups = (("1",) * 9, ("2",) * 6, ("3",) * 5)
    assert column(scored(config("length_of_call"), *groups), "reward") == [16.0] * 16 + [4.0] * 4
    by_question = config("length_of_call", together="question")
    assert column(scored(by_question, *groups), "reward") == [15.0] * 15 + [5.0] * 5
    assert column(scored(config("length_of_call", together="batch"), *groups), "reward") == [20.0] * 20


def test_a_unit_that_fails_alone_costs_its_own_rows_only() -> None:
    groups = (("1", "2"), ("raise", "4"), ("5", "6"))
    by_row = column(scored(config("length_of_call"), *groups), "status")
    assert by_row == ["ok", "ok", "error", "ok", "ok", "ok"]
    by_question = column(scored(config("length_of_call", together="question"), *groups), "status")
    assert by_question == ["ok", "ok", "error", "error", "ok", "ok"]
    assert column(scored(config("length_of_call", together="batch"), *groups), "status") == ["error"] * 6


def test_without_patience_the_rows_of_a_failing_call_share_its_fault() -> None:
    with pytest.warns(UserWarning, match="3 outputs: KeyError"):
        made = scored(config("by_text", patience_s=0.0), ("1", "raise", "3"))
    assert column(made, "status") == ["error"] * 3


class Hanging(KillablePool):
    """Runs nothing: every task misses its deadline, on a clock of its own."""

    now = 0.0
    asked = 0

    def run(self, function: Any, tasks: Sequence[Any], *, deadline_s: float) -> list[Outcome]:
        self.asked += len(tasks)
        self.now += deadline_s * math.ceil(len(tasks) / self.workers)
        return [Outcome(fault="timeout")] * len(tasks)


def test_a_function_that_always_hangs_ends_within_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Hanging(workers=2, memory_mb=64)
    monkeypatch.setattr("stages.reward.functions.time.monotonic", lambda: pool.now)
    units = [[row] for row in range(40)]
    made = call_in_pieces(len, None, {}, units, pool=pool, deadline_s=0.5, patience_s=2.0)  # type: ignore[arg-type]
    assert [score.fault for score in made] == ["timeout"] * 40
    # Three calls on two workers take 1 s, and pieces of them, two at a time, 2 s.
    assert (pool.now, pool.asked) == (3.0, 3 + 8)


@pytest.mark.parametrize("answer", GOOD)
def test_one_number_for_each_completion_is_an_answer(answer: str) -> None:
    assert column(scored_by_answer(answer), "reward") == GOOD[answer][1]


@pytest.mark.claim("one score taken for several outputs")
@pytest.mark.parametrize("answer", BAD)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_any_other_answer_is_refused_whatever_max_errors(answer: str) -> None:
    with pytest.raises(ConfigError, match=f"'{MODULE}:by_answer' .*'function': expected a list of 3 scores"):
        scored_by_answer(answer)


def scored_by_answer(answer: str) -> Rewards:
    """Three outputs, two of which are equal, of a question whose gold answer is `answer`."""
    asked = question_table(answer, question_id="a")
    return score(rollouts(("x", "x", "y")), asked, config("by_answer", columns=("answer",)))


@pytest.mark.parametrize("name", ["asynchronous", "returns_an_awaitable"])
def test_what_has_to_be_awaited_is_awaited_in_one_loop_for_all_calls(name: str) -> None:
    groups = (("1",) * 16, ("2",) * 16, ("3",) * 16)  # three calls, two workers: one has two of them
    assert column(scored(config(name), *groups), "reward") == [1.0] * 48


def test_conversational_completions_are_lists_of_messages() -> None:
    assert column(scored(config("of_messages", conversational=True), ("0.5", "2")), "reward") == [0.5, 2.0]
    assert column(scored(config("of_texts"), ("0.5", "2")), "reward") == [0.5, 2.0]


@pytest.mark.parametrize(
    ("name", "conversational", "fault"), [("of_messages", False, "TypeError"), ("of_texts", True, "AttributeError")]
)
def test_a_function_for_the_other_form_of_completions_is_refused(name: str, conversational: bool, fault: str) -> None:
    reward = config(name, conversational=conversational, max_errors=0.0)
    advice = f"Set `conversational: {str(not conversational).lower()}`"
    with pytest.raises(RewardFunctionError, match=f"{MODULE}:{name} for 2 of 2 outputs.*{fault}: .*{advice}"):
        scored(reward, ("0.5", "2"))


def test_a_weighted_sum_beyond_all_numbers_is_refused_before_it_is_written(store: Store) -> None:
    with pytest.raises(ValueError, match=r"\('a', 1\) is inf"):
        scored(config("by_text", weight=10.0), ("1", "1e308"))
    assert not any(record["stage"] == "score" for record in store.actions())


@pytest.mark.claim("a service that was down as a verdict")
def test_a_service_that_was_down_leaves_no_verdict_and_is_asked_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, folder = tmp_path / "answer", tmp_path / "functions"
    folder.mkdir()
    (folder / "a_service.py").write_text(
        f"def service(completions, **columns):\n    return [float(open({str(answer)!r}).read())] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(folder)
    reward = config("a_service:service", max_errors=0.0, patience_s=0.0)
    with pytest.raises(RewardFunctionError, match=r"a_service:service for 2 of 2 outputs, .*FileNotFoundError"):
        scored(reward, ("x", "y"))
    assert not any(record["stage"] == "score" for record in store.actions())
    answer.write_text("0.75")
    assert column(scored(reward, ("x", "y")), "reward") == [0.75, 0.75]


@pytest.mark.parametrize(
    ("max_errors", "stops"), [(RewardConfig().max_errors, True), (0.24, True), (0.25, False), (1.0, False)]
)
def test_failures_up_to_the_share_cost_rows_and_more_the_run(store: Store, max_errors: float, stops: bool) -> None:
    stopping = pytest.raises(RewardFunctionError, match=r"1 of 4 outputs, such as \('a', 1\)")
    with stopping if stops else contextlib.nullcontext():
        made = scored(config("by_text", max_errors=max_errors), ("1", "raise", "3", "none"))
        assert column(made, "status") == ["ok", "error", "ok", "unparseable"]


def test_stored_rewards_with_more_failures_than_are_allowed_now_are_refused(store: Store) -> None:
    tolerant, strict = (config("by_text", max_errors=share) for share in (0.5, 0.4))
    made = scored(tolerant, ("raise", "1"))
    assert made.metrics["reward/failed"] == 0.5
    assert scored(tolerant, ("raise", "1")) == made
    with pytest.raises(RewardFunctionError, match=f"0.5 .*cohort forget {made.digest[:12]}"):
        scored(strict, ("raise", "1"))
    store.forget(made.digest)
    with pytest.raises(RewardFunctionError, match="1 of 2 outputs"):
        scored(strict, ("raise", "1"))


def test_a_function_that_changes_the_checks_themselves_costs_its_own_rows_only() -> None:
    made = scored(config("vandal"), ("1", "nan", "1"))
    assert column(made, "status") == ["ok", "error", "ok"]
    assert column(made, "reward") == [1.0, None, 1.0]


def test_truncated_outputs_reach_the_function_only_if_they_count() -> None:
    made = scored(config("by_text"), ("raise", "1"), cut=("raise",))
    assert column(made, "status") == ["truncated", "ok"]
    assert column(made, "reward") == [0.0, 1.0]
    assert column(scored(config("by_text", truncated="as_is"), ("2", "1"), cut=("2",)), "reward") == [2.0, 1.0]


@pytest.mark.parametrize(
    ("name", "columns", "found"),
    [
        ("by_test", (), "'by_text'"),
        ("scores", (), "AttributeError"),  # the name of a variable inside a function
        ("A_CONSTANT", (), "int"),
        ("of_one_column", ("answer", "question"), "'question'"),
        ("facts", (), "'question'"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_at_once(name: str, columns: tuple[Any, ...], found: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{MODULE}:{name}' in .*reward_functions.py: .*{found}"):
        scored(config(name, columns=columns), ("1",))


def test_only_the_columns_named_are_passed() -> None:
    assert column(scored(config("of_one_column", columns=("answer",)), ("4", "5")), "reward") == [1.0, 0.0]


@pytest.mark.parametrize(
    ("function", "missing"),
    [
        ("no_such_module:reward", "'no_such_module' in "),
        ("tests.no_such_module:reward", r"'tests.no_such_module' in .*tests;"),
        ("json.decoder.deeper:reward", "'json.decoder.deeper' in a module that is no package"),
        ("sys:exit", "'sys', found built-in"),
    ],
)
def test_a_module_that_is_not_there_is_refused_with_where_it_was_looked_for(function: str, missing: str) -> None:
    with pytest.raises(ConfigError, match=f"'{function}': .*{missing}"):
        config(function).key()


@pytest.mark.parametrize("function", ["reward", "a.b", "a/b.py:reward", "a:b.c", ":reward", "a:", "os;x:reward"])
def test_a_function_is_named_as_module_and_name(function: str) -> None:
    with pytest.raises(ConfigError, match="function"):
        FunctionConfig.parse({"function": function})


def test_the_files_content_is_part_of_the_key_and_a_changed_one_runs_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "my_rewards.py"
    file.write_text("def reward(completions, **columns):\n    return [1.0] * len(completions)\n")
    mine = config("my_rewards:reward")
    first = mine.key()
    assert column(scored(mine, ("x",)), "reward") == [1.0]
    file.write_text("def reward(completions, **columns):\n    return [2.0] * len(completions)\n")
    assert mine.key() != first
    assert column(scored(mine, ("x",)), "reward") == [2.0]
    assert "my_rewards" not in sys.modules


def test_a_packages_code_does_not_run_while_the_function_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bomb" / "inner"
    folder.mkdir(parents=True)
    for place in (tmp_path / "bomb", folder):
        (place / "__init__.py").write_text("raise SystemExit('this must not run here')\nreward = None\n")
    (folder / "rules.py").write_text("def reward(**columns): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    source = find_source("bomb.inner.rules:reward")
    assert (source.file, source.root) == (folder / "rules.py", tmp_path)
    assert find_source("bomb.inner:reward").root == tmp_path
    with pytest.raises(ConfigError, match=r"'bomb.inner.rules:reward' in .*SystemExit"):
        scored(config("bomb.inner.rules:reward"), ("1",))


def test_a_package_may_import_its_own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kit"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "scale.py").write_text("FACTOR = 0.5\n")
    (folder / "rules.py").write_text(
        "from .scale import FACTOR\ndef reward(completions, **columns):\n    return [FACTOR * float(c) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert column(scored(config("kit.rules:reward"), ("3",)), "reward") == [1.5]


def test_limits_of_time_are_not_part_of_the_key_and_what_is_scored_is() -> None:
    plain = FunctionConfig(function=f"{MODULE}:by_text")
    assert plain.override({"deadline_s": 99.0, "patience_s": 1.0}).key() == plain.key()
    assert plain.override({"together": "batch"}).key() != plain.key()
    assert plain.override({"function": f"{MODULE}:facts"}).key() != plain.key()


def test_a_function_may_ask_who_wrote_each_token() -> None:
    turns = [{"start": 0, "end": 1}, {"start": 2, "end": 3}]
    rows = [output_row("q", 0, "ab", turns=turns), output_row("q", 1, "ab", turns=None)]
    component = FunctionConfig(function=f"{MODULE}:share_written", columns=("completion_mask",))
    made = score(Rollouts.write(rows), question_table(), RewardConfig(components=(component,)))
    assert [row["reward"] for row in made.rows()] == pytest.approx([2 / 3, 1.0])
