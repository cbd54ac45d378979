"""Before the first update: what stops a run, what it says to change, and that a corrected run goes on from what is there."""

from __future__ import annotations

from typing import Any

import pytest

from flows.algorithm.preflight import NoSignalError, examine, preflight
from flows.config import IterativeRLConfig
from flows.config.methods import method_settings
from flows.config.recipes import arithmetic_smoke
from flows.runs.curve import Points
from pipeline.config import ConfigError
from pipeline.events import recording
from pipeline.store import Store, use_store
from stages.advantage import BatchConfig, CorrectConfig, GAEConfig, GroupConfig, OneConfig, PairsConfig
from stages.tables import Rewards, Rollouts
from tests.flows.short_runs import Run, copied, train

pytestmark = pytest.mark.usefixtures("store")
OK, WRONG = ("ok", 1.0), ("wrong", 0.0)
CUT, SILENT, LATE, BROKEN = ("truncated", 0.0), ("unparseable", 0.0), ("timeout", None), ("error", None)
Verdict = tuple[str, float | None]


def rows(*groups: list[Verdict], steps: list[list[float]] | None = None) -> list[dict[str, Any]]:
    """Rewards of questions `0`, `1`, ...; `steps` are those of all outputs, one after the other."""
    made = [
        {"question_id": str(question), "sample": sample, "reward": reward, "status": status, "extracted": None}
        for question, group in enumerate(groups)
        for sample, (status, reward) in enumerate(group)
    ]
    return [
        {**row, "components": [], "step_rewards": steps and steps[place], "step_ends": steps and [0], "scorer": None}
        for place, row in enumerate(made)
    ]


def outputs(table: list[dict[str, Any]], text: str = "and so it must be seven") -> Rollouts:
    fixed = {"prompt_ids": [1], "output_ids": [2], "logprobs": [0.0], "finish_reason": "stop", "text_ends": [len(text)]}
    return Rollouts.write(
        [
            {"question_id": row["question_id"], "sample": row["sample"], "text": text, "temperature": 1.0, "seed": 0}
            | fixed
            for row in table
        ]
    )


def config(method: str = "grpo", **changes: Any) -> IterativeRLConfig:
    base = arithmetic_smoke()
    return base.override(method_settings(method, base) | {"preflight": {}} | changes)


def refusal(checked: IterativeRLConfig, *groups: list[Verdict]) -> str:
    table = rows(*groups)
    with pytest.raises(NoSignalError) as caught:
        preflight(checked, outputs(table), Rewards.write(table), 0)
    return str(caught.value)


def passes(checked: IterativeRLConfig, *groups: list[Verdict], step: int = 0) -> Points:
    table, seen = rows(*groups), Points()
    with recording(seen.take):
        preflight(checked, outputs(table), Rewards.write(table), step)
    return seen


# ------------------------------------------------------------------------------------- what a method learns nothing from


@pytest.mark.parametrize(
    ("advantage", "silent"),
    [
        (OneConfig(), 0),
        (GroupConfig(), 3),
        (PairsConfig(), 3),
        (CorrectConfig(), 2),
        (GAEConfig(), 0),
        (BatchConfig(), 0),
        (BatchConfig(baseline="group_mean"), 0),
    ],
)
def test_each_advantage_has_its_own_reason_to_learn_nothing(advantage: Any, silent: int) -> None:
    # One of each: mixed, all right, all wrong, and one right that has no reward.
    found = examine(rows([OK, WRONG], [OK, OK], [WRONG, CUT], [("ok", None), WRONG]), advantage)
    assert (found.questions, found.equal, found.silent) == (4, 3, silent)


def test_ppo_learns_from_no_batch_of_one_reward_a_group_mean_from_no_agreeing() -> None:
    assert examine(rows([WRONG, WRONG], [CUT, WRONG]), GAEConfig()).silent == 2
    agreeing = rows([WRONG, WRONG], [OK, OK])
    assert [examine(agreeing, kind).silent for kind in (GAEConfig(), BatchConfig(baseline="group_mean"))] == [0, 2]


def test_process_supervision_learns_from_steps_where_outputs_have_equal_rewards() -> None:
    process = GroupConfig(supervision="process")
    table = rows([WRONG, WRONG], [WRONG, OK], steps=[[1.0, 0.0], [1.0], [0.5], [0.5, 0.5]])
    found = examine(table, process)
    assert (found.equal, found.silent) == (1, 1)
    assert examine(rows([WRONG, OK], steps=[[0.0], [0.0]]), process).silent == 1


# ------------------------------------------------------------------------------------- what is said


def test_outputs_cut_at_the_limit_are_advised_more_tokens() -> None:
    message = refusal(config(), [CUT, CUT], [CUT, CUT])
    assert "4 of 4 outputs are cut at rollout.max_output_tokens=24: raise it" in message
    assert "the first ends like 'and so it must be seven'" in message
    assert "without an answer" not in message


def test_outputs_without_an_answer_are_shown_with_the_conventions() -> None:
    answers = [{"kind": "accuracy", "verifier": "exact", "conventions": ["boxed", "hashes"]}]
    # A component for form makes the rewards differ: that alone is no signal.
    message = refusal(config(**{"reward.components": answers}), [SILENT, ("unparseable", 0.1)], [SILENT, LATE])
    assert "3 of 4 outputs are without an answer by the conventions (boxed, hashes): set reward.components" in message
    assert "ends like 'and so it must be seven'" in message
    assert "1 of 4 outputs are not scored within the deadline (reward.deadline_s=3" in message


def test_errors_of_the_scorer_are_not_taken_for_bad_answers() -> None:
    message = refusal(config(), [BROKEN, BROKEN], [BROKEN, BROKEN])
    assert "4 of 4 outputs are not scored for an error: fix what the warnings before this one name" in message
    assert "no output has a reward" in message


@pytest.mark.claim("training for hours on nothing")
@pytest.mark.parametrize(
    ("method", "groups", "said"),
    [
        ("grpo", ([OK, OK], [OK, OK]), "in 2 of 2 questions: all outputs are right; take harder questions"),
        ("grpo", ([WRONG, WRONG], [WRONG, WRONG]), "no output is right; take easier questions"),
        ("grpo", ([WRONG, WRONG], [OK, OK]), "raise rollout.G or rollout.temperature"),
        ("ppo", ([WRONG, WRONG], [WRONG, WRONG]), "equal rewards for all outputs that are compared"),
        ("rft", ([WRONG, CUT], [WRONG, WRONG]), "no right output for 2 of 2 questions, and rft learns from right ones"),
        ("online_rft", ([WRONG, CUT], [WRONG, WRONG]), "and online_rft learns from right ones"),
        ("dpo", ([WRONG, WRONG], [OK, OK]), "no pair of a right and a wrong output for 2 of 2 questions"),
    ],
)
def test_a_method_that_can_learn_nothing_stops_and_says_why(
    method: str, groups: tuple[list[Verdict], ...], said: str
) -> None:
    message = refusal(config(method), *groups)
    assert said in message
    assert "cut at" not in message


def test_a_lack_of_signal_is_put_down_to_what_most_outputs_have_in_common() -> None:
    message = refusal(config(), [CUT, CUT, CUT, WRONG])
    assert "3 of 4 outputs are cut" in message
    assert "no output is right" in message


def test_a_reward_model_of_equal_scores_is_named_in_place_of_questions() -> None:
    checked = config(reward_model={"models": [{"kind": "outcome"}]})
    message = refusal(checked, [("ok", 0.5), ("wrong", 0.5)])
    assert "the reward model tells no outputs apart" in message
    assert "questions that the policy" not in message


@pytest.mark.parametrize("method", ["grpo", "rft", "online_rft", "dpo", "ppo"])
def test_one_question_with_a_signal_is_enough(method: str) -> None:
    seen = passes(config(method), [OK, WRONG], [WRONG, WRONG], [WRONG, WRONG])
    assert seen.by_step[0]["reward/frac_degenerate_groups"] == pytest.approx(2 / 3)


def test_limits_may_be_stricter_or_switched_off() -> None:
    groups = ([OK, WRONG], [CUT, CUT])
    assert "2 of 4 outputs are cut" in refusal(config(preflight={"truncated": 0.5}), *groups)
    assert "in 1 of 2 questions" in refusal(config(preflight={"without_signal": 0.5}), *groups)
    off = {"truncated": None, "unreadable": None, "without_signal": None}
    passes(config(preflight=off), [CUT, CUT], [CUT, CUT])
    with pytest.raises(ConfigError, match=r"preflight\.truncated"):
        config(preflight={"truncated": 0.0})


def test_only_the_first_step_is_examined_and_demonstrations_never() -> None:
    assert passes(config(), [WRONG, WRONG], step=1).by_step == {}
    preflight(config("sft"), outputs(rows([OK])), None, 0)


def test_the_shares_are_reported_in_words_and_as_metrics_of_step_zero() -> None:
    texts: list[str] = []

    with recording(lambda event: texts.append(event.values()["text"])):
        seen = passes(config(), [OK, CUT, SILENT, LATE], [WRONG, WRONG, CUT, WRONG])
    assert texts == ["2 truncated, 1 unparseable, 1 timeout of 8; equal rewards in 1 of 2 questions"]
    assert seen.by_step == {
        0: {
            "reward/status_truncated": 0.25,
            "reward/status_unparseable": 0.125,
            "reward/status_timeout": 0.125,
            "reward/status_error": 0.0,
            "reward/frac_degenerate_groups": 0.5,
        }
    }


def test_rewards_whose_payload_was_pruned_were_examined_when_they_were_new(store: Store) -> None:
    table = rows([WRONG, WRONG])
    rewards = Rewards.write(table)
    assert store.prune(rewards.digest) > 0
    seen = Points()
    with recording(seen.take):
        preflight(config(), outputs(table), rewards, 0)
    assert seen.by_step == {}


# ------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def failed(supervised: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose rule looks for answers where the policy writes none."""
    run = Run(copied(supervised.store, tmp_path_factory))
    with pytest.raises(NoSignalError, match=r"without an answer by the conventions \(boxed\)"):
        train(run.store, "grpo", run=run, steps=1, preflight={}, **rule("boxed"))
    return run


def rule(convention: str) -> dict[str, Any]:
    accuracy = {"kind": "accuracy", "verifier": "exact", "conventions": [convention]}
    # Form is rewarded too, so that the rewards differ.
    return {"reward.components": [accuracy, {"kind": "format", "form": "hashes"}]}


@pytest.mark.claim("training for hours on nothing")
def test_a_run_without_signal_stops_before_any_update_with_its_figures_logged(failed: Run) -> None:
    assert failed.executed["score"] == 1
    assert failed.executed["estimate_advantages"] == failed.executed["update_policy"] == 0
    shares = failed.points[0]
    assert shares["reward/status_truncated"] + shares["reward/status_unparseable"] == 1.0
    assert 1 not in failed.points


def test_the_corrected_run_reuses_all_but_the_rewards(failed: Run) -> None:
    corrected = train(failed.store, "grpo", steps=1, preflight={}, **rule("hashes"))
    computed = {name for name, count in corrected.executed.items() if count}
    assert computed == {"score", "estimate_advantages", "update_policy"}
    assert corrected.points[0]["reward/status_unparseable"] < 1.0


def test_the_repeated_run_passes_by_reading_what_is_there(failed: Run) -> None:
    train(failed.store, "grpo", steps=1, preflight={}, **rule("hashes"))
    again = train(failed.store, "grpo", steps=1, preflight={}, **rule("hashes"))
    assert sum(again.executed.values()) == 0
    with use_store(failed.store):
        assert again.points[0]["reward/frac_degenerate_groups"] == again.points[1]["reward/frac_degenerate_groups"]
