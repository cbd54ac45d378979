"""Live progress: what plain output says, what is said once, and what the state of a run adds up to."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.runs.curve import Points
from flows.runs.display import Display, displaying
from flows.runs.state import RunState, StageTotals
from flows.wording import accuracies, duration, number
from pipeline.events import (
    EvaluationDone,
    Event,
    PreflightDone,
    StageDone,
    StageFailed,
    StageStarted,
    StepDone,
    emit,
)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


METRICS: dict[str, dict[str, Any]] = {}
"""Key of a call -> its record."""


def key_of(metrics: dict[str, float]) -> str:
    key = f"{len(METRICS):064x}"
    METRICS[key] = {"metrics": metrics}
    return key


def state_of(steps: int, **values: Any) -> RunState:
    return RunState(steps=steps, points=Points(METRICS.__getitem__), **values)


def plain(steps: int = 4) -> tuple[Display, Clock, io.StringIO]:
    clock, text = Clock(), io.StringIO()
    display = Display(state_of(steps, clock=clock), Console(file=text, width=120, force_terminal=False))
    return display, clock, text


def tell(display: Display, *events: Event) -> None:
    """Give events to the state, then to what shows it."""
    for event in events:
        display.state.take(event)
        display.take(event)


def tell_progress(display: Display, topic: str, values: dict[str, Any]) -> None:
    display.state.note(topic, values)
    display.note(topic, values)


def executed(name: str, seconds: float) -> StageDone:
    return StageDone(name, "a" * 64, f"digest of {name}", seconds, cached=False)


def step_of(done: int, iteration: int, metrics: dict[str, float]) -> StepDone:
    return StepDone(done, iteration, {"policy": key_of(metrics)})


def evaluation(step: int, name: str, mode: str, metrics: dict[str, float]) -> EvaluationDone:
    return EvaluationDone(step, name, mode, {"evaluation": key_of(metrics)})


def step(display: Display, done: int, reward: float = 0.5) -> None:
    tell(display, step_of(done, 0, {"reward/mean": reward}))


def test_a_run_counts_computed_and_reused_calls_with_their_seconds() -> None:
    state = state_of(1, clock=Clock())
    for event in (
        StageStarted("score", "a"),
        executed("score", 2.0),
        StageDone("score", "b", "d", 3.0, cached=True),
        StageFailed("score", "c", "ValueError: no"),
    ):
        state.take(event)
    assert state.stages == {"score": StageTotals(executed=1, cached=1, failed=1, seconds=2.0, saved=3.0)}
    assert (state.executed, state.cached, state.stages["score"].calls) == (1, 1, 3)
    assert state.artifacts == {"digest of score": "score", "d": "score"}


@pytest.mark.parametrize(("concurrent", "seconds"), [(0.0, [5.0, 12.0, 21.0]), (1.0, [5.0, 9.0, 15.0])])
def test_the_axis_of_seconds_counts_what_outputs_took_longer_than_the_update_beside(
    concurrent: float, seconds: list[float]
) -> None:
    """Steps of (sampling, update) 2 + 3, 4 + 3 and 6 + 3; during the update of 3 before, 4 takes 1 and 6 takes 3 more."""
    state = state_of(3, clock=Clock())
    for done, (sampling, where) in enumerate([(2.0, 0.0), (4.0, concurrent), (6.0, concurrent)], start=1):
        metrics = {"rollout/seconds": sampling, "time/update": 3.0, "rollout/concurrent": where}
        state.take(step_of(done, 0, metrics))
    assert [state.points.by_step[done]["progress/seconds"] for done in (1, 2, 3)] == seconds
    state.take(step_of(2, 0, {"rollout/seconds": 1.0, "time/update": 3.0, "rollout/concurrent": concurrent}))
    assert state.points.by_step[2]["progress/seconds"] == (8.0 if concurrent else 9.0), "of a step that is done again"


def test_two_stages_side_by_side_are_both_shown_with_their_own_progress() -> None:
    display, clock, _ = plain()
    tell(display, StageStarted("rollout", "a" * 64), StageStarted("update_policy", "b" * 64))
    tell_progress(display, "rollout", {"done": 3, "total": 8})
    tell_progress(display, "update_policy", {"done": 1, "total": 2})
    clock.now = 6.0
    found = [(call.stage, call.since, call.detail["done"]) for call in display.state.computing.values()]
    assert found == [("rollout", 0.0, 3), ("update_policy", 0.0, 1)]
    shown = Console(width=120, file=io.StringIO())
    shown.print(display)
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "rollout" in text
    assert "update_policy" in text
    tell(display, executed("rollout", 2.0))
    assert [call.stage for call in display.state.computing.values()] == ["update_policy"]


def test_the_forecast_is_the_mean_of_steps_that_computed_times_what_is_left() -> None:
    clock = Clock()
    state = state_of(10, clock=clock)
    for done, seconds in enumerate((50.0, 2.0, 4.0), start=1):  # the first also started engines
        clock.now += seconds
        state.take(executed("update_policy", 1.0))
        state.take(step_of(done, 0, {}))
    assert state.seconds_left() == pytest.approx(7 * 3.0)
    clock.now += 1.0
    assert state.seconds_left() == pytest.approx(7 * 3.0 - 1.0)


def test_there_is_no_forecast_from_reused_steps() -> None:
    state = state_of(3, clock=Clock())
    for done in (1, 2):
        state.take(step_of(done, 0, {}))
    assert state.seconds_left() is None


def test_plain_output_has_one_line_per_computed_step() -> None:
    display, clock, text = plain()
    for done in (1, 2):
        clock.now += 2.0
        tell(display, executed("update_policy", 1.0))
        step(display, done, reward=done / 4)
    assert text.getvalue().splitlines() == [
        "00:00:02  step   1/4  reward 0.250  2.0 s",
        "00:00:04  step   2/4  reward 0.500  2.0 s  about 4.0 s left",
    ]


def test_a_line_says_which_iteration_it_is_and_how_many_outputs_were_right() -> None:
    text = io.StringIO()
    state = state_of(4, iterations=2, clock=Clock())
    display = Display(state, Console(file=text, width=120, force_terminal=False))
    for done, right in ((2, 0.25), (3, 0.5)):
        tell(display, executed("update_policy", 1.0))
        metrics = {"reward/mean": 0.5, "reward/status_ok": right}
        tell(display, step_of(done, (done - 1) // 2, metrics))
    first, second = text.getvalue().splitlines()
    assert "step   2/4, iteration 1/2  reward 0.500  accuracy 0.250" in first
    assert "step   3/4, iteration 2/2  reward 0.500  0.0 s" in second, "accuracy is left out where it is the reward"


def test_a_step_without_rewards_or_kl_tells_what_it_has() -> None:
    display, clock, text = plain()
    clock.now += 2.0
    tell(display, executed("update_policy", 1.0))
    tell(display, step_of(1, 0, {"policy/entropy": 3.25, "tool/calls_mean": 0.5}))
    assert text.getvalue() == "00:00:02  step   1/4  entropy 3.250  calls 0.500  2.0 s\n"
    display.console.print(display)
    assert "step 1/4" in text.getvalue()


def test_reused_steps_are_one_line() -> None:
    display, _, text = plain()
    for done in (1, 2, 3):
        step(display, done)
    display.close()
    assert text.getvalue().splitlines() == ["00:00:00  step   1 to 3  reused from the store"]


def test_a_long_stage_says_every_five_seconds_where_it_stands() -> None:
    display, clock, text = plain()
    tell(display, StageStarted("supervised_finetuning", "k"))
    for done in range(1, 13):
        clock.now += 1.0
        tell_progress(display, "sft", {"done": done, "total": 600, "loss": 1.25})
    assert text.getvalue().splitlines() == [
        "00:00:05  supervised_finetuning 5/600  loss 1.25",
        "00:00:10  supervised_finetuning 10/600  loss 1.25",
    ]


def test_an_evaluation_is_shown_with_its_interval() -> None:
    display, _, text = plain()
    metrics = {"accuracy": 0.5, "accuracy_ci_low": 0.4, "accuracy_ci_high": 0.6, "pass_at_8": 0.9, "pass_at_1": 0.5}
    tell(display, evaluation(10, "held_out", "sampled", metrics))
    assert text.getvalue() == "00:00:00  step  10  held_out: sampled 0.500 [0.400, 0.600] pass@8 0.900 maj@8 -\n"


def test_greedy_and_sampled_accuracy_of_a_set_share_a_line() -> None:
    display, _, text = plain()
    for name in ("in_domain", "out_of_domain"):
        tell(display, evaluation(0, name, "greedy", {"accuracy": 0.5}))
        if name == "in_domain":
            tell(display, evaluation(0, name, "sampled", {"accuracy": 0.25}))
    display.close()
    assert text.getvalue().splitlines() == [
        "00:00:00  step   0  in_domain: greedy 0.500  sampled 0.250",
        "00:00:00  step   0  out_of_domain: greedy 0.500",
    ]


def test_a_warning_of_a_stage_is_shown_once_and_one_of_a_library_not_at_all() -> None:
    text = io.StringIO()
    with displaying(RunState(steps=1), Console(file=text, width=120, force_terminal=False)):
        for _ in range(3):
            warnings.warn_explicit("a file is damaged", UserWarning, str(STAGE_FILE), 1, module="pipeline.stage")
        warnings.warn_explicit("libraries chatter", UserWarning, "/site-packages/library.py", 1, module="library")
    assert text.getvalue().count("damaged") == 1
    assert "chatter" not in text.getvalue()


def test_what_was_warned_of_is_kept_for_the_summary_once() -> None:
    display, _, _ = plain()
    for message in ("the model stays", "a file is damaged", "the model stays"):
        display.warn(message)
    assert display.state.warnings == ["the model stays", "a file is damaged"]


def test_the_first_outputs_have_a_line_that_stays() -> None:
    display, _, text = plain()
    tell(display, PreflightDone(0, "1 truncated, 0 unparseable of 8", {}))
    assert text.getvalue() == "00:00:00  first outputs: 1 truncated, 0 unparseable of 8\n"


def test_events_emitted_inside_the_block_arrive() -> None:
    state = RunState(steps=1)
    with displaying(state, Console(file=io.StringIO(), force_terminal=False)):
        emit(executed("score", 1.5))
    emit(executed("score", 1.5))
    assert state.stages["score"].executed == 1


def test_a_terminal_shows_the_bar_of_the_computing_stage() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    display = Display(RunState(steps=4), console)
    tell(display, StageStarted("rollout", "k"))
    tell_progress(display, "rollout", {"done": 3, "total": 8, "tokens": 90, "tokens_per_s": 1234.5})
    with console.capture() as captured:
        console.print(display)
    assert "step 0/4" in captured.get()
    assert "3/8  tokens 90  1,234 tokens/s" in captured.get()


def test_a_terminal_shows_the_last_accuracy_on_each_held_out_set() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    display = Display(state_of(4, clock=Clock()), console)
    for mode, accuracy in (("greedy", 0.9), ("sampled", 0.7)):
        tell(display, evaluation(2, "in_domain", mode, {"accuracy": accuracy}))
    with console.capture() as captured:
        console.print(display)
    assert "in_domain 0.700" in captured.get()


def test_text_in_brackets_is_printed_as_it_is() -> None:
    display, _, text = plain()
    display.warn("expected [bold] columns")
    assert "expected [bold] columns" in text.getvalue()


def test_durations_and_numbers_read_well() -> None:
    assert [duration(x) for x in (0.04, 9.94, 59.4, 61, 3723)] == ["0.0 s", "9.9 s", "59 s", "1:01 min", "1:02:03 h"]
    assert [number(x) for x in (1234567, 0.123456, 12345.6, True, "kl")] == [
        "1,234,567",
        "0.1235",
        "12,346",
        "True",
        "kl",
    ]
    assert accuracies({"greedy_accuracy": 0.25}) == "greedy 0.250"


STAGE_FILE = Path(__file__).parents[3] / "pipeline" / "stage.py"
