"""The summary of a run: which evaluations are before, after and best, and that its picture and its JSON can be read."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from flows.config.recipes import arithmetic_smoke
from flows.runs.curve import draw_learning_curve
from flows.runs.state import RunState, StageTotals
from flows.runs.summary import Summary, print_summary, summarise, summary_markdown
from stages.models import Checkpoint

POINTS = {
    0: {"eval/held_out/accuracy": 0.4, "eval/held_out/accuracy_ci_low": 0.35, "eval/held_out/accuracy_ci_high": 0.45},
    1: {"reward/mean": 0.41, "policy/kl": 0.0},
    2: {"reward/mean": 0.9, "eval/held_out/accuracy": 0.95, "eval/held_out/pass_at_8": 1.0},
    4: {"reward/mean": 0.8, "eval/held_out/accuracy": 0.9, "eval/held_out/greedy_accuracy": 0.92},
}


def summary_of(points: dict[int, dict[str, float]], *warnings: str) -> Summary:
    state = RunState(steps=4, clock=lambda: 0.0, warnings=list(warnings))
    state.stages["rollout"] = StageTotals(executed=3, cached=1, seconds=6.0, saved=2.0)
    state.step = 4
    return summarise(arithmetic_smoke(), points, state, Checkpoint("ab" * 32), {"run": Path("runs/x")})


def test_before_is_the_first_evaluation_after_the_last_and_best_the_highest() -> None:
    summary = summary_of(POINTS)
    assert summary.before["held_out"]["accuracy"] == 0.4
    assert summary.after == {"held_out": {"accuracy": 0.9, "greedy_accuracy": 0.92}}
    assert summary.best == {"held_out": (2, 0.95)}
    assert summary.time["rollout"]["calls"] == 4


def test_the_curve_keeps_evaluations_and_reward_only() -> None:
    assert summary_of(POINTS).curve[1] == {"reward/mean": 0.41}
    assert summary_of(POINTS).curve[2].keys() == {"reward/mean", "eval/held_out/accuracy", "eval/held_out/pass_at_8"}


def test_a_summary_survives_json() -> None:
    summary = summary_of(POINTS)
    back = json.loads(json.dumps(summary.as_json()))
    assert back["after"] == summary.after
    assert back["policy"] == "ab" * 32


def test_a_run_without_evaluations_has_a_summary() -> None:
    summary = summary_of({1: {"reward/mean": 0.5}})
    assert (summary.before, summary.after, summary.best) == ({}, {}, {})
    assert "rollout" in printed(summary)


def test_a_run_that_samples_and_scores_nothing_has_a_summary_a_cost_and_a_curve(tmp_path: Path) -> None:
    points = {0: POINTS[0], 1: {"policy/entropy": 3.2, "time/update": 1.5}, 2: {"eval/held_out/accuracy": 0.5}}
    summary = summary_of(points)
    assert summary.curve[1] == {}
    assert summary.after == {"held_out": {"accuracy": 0.5}}
    cost = {"outputs": 0, "tokens": 0, "sampling_seconds": 0, "updating_seconds": 1.5}
    assert {key: summary.cost[key] for key in cost} == cost
    assert "+0.100" in printed(summary)
    draw_learning_curve(summary.curve, tmp_path / "curve.png", title="supervised")
    assert (tmp_path / "curve.png").stat().st_size > 0


def test_the_screen_shows_before_after_change_and_the_command_that_opens_the_ui() -> None:
    text = printed(summary_of(POINTS))
    row = next(line for line in text.splitlines() if "accuracy of samples" in line)
    assert "0.400 (0.350 - 0.450)" in row
    assert "+0.500" in row
    assert "3 stages computed, 1 reused from the store" in text
    assert text.rstrip().endswith("cohort ui")


def test_the_markdown_names_what_differs_from_the_recipe() -> None:
    text = summary_markdown(summary_of(POINTS), "cohort run x", {"update.objective.beta": (0.04, 0.0)})
    assert "| `update.objective.beta` | 0.04 | 0.0 |" in text
    assert "| held_out | accuracy of samples | 0.400 | 0.900 |" in text


def test_warnings_of_the_run_are_told_again_at_its_end() -> None:
    summary = summary_of(POINTS, "the outcome reward model stays [as it was]")
    assert "warning: the outcome reward model stays [as it was]" in printed(summary)
    assert "* warning: the outcome reward model stays" in summary_markdown(summary, "cohort run x", {})
    assert summary.as_json()["warnings"] == ["the outcome reward model stays [as it was]"]
    assert "warning" not in summary_markdown(summary_of(POINTS), "cohort run x", {})


def test_engine_against_trainer_is_one_line_with_the_worst_of_all_steps() -> None:
    worst_in = {"mean": (1e-7, 0.02), "max": (3e-6, 1e-6), "kl": (2e-14, 1e-15), "ess": (1.0, 0.9)}
    points = {step: {f"rollout/mismatch_{name}": each[step] for name, each in worst_in.items()} for step in (0, 1)}
    summary = summary_of({**points, 2: {"reward/mean": 0.5}})
    assert summary.mismatch == {"mean": 0.02, "max": 3e-6, "kl": 2e-14, "ess": 0.9}
    line = "rollout engine and trainer, worst step: mean 0.02, largest 3e-06, KL 2e-14, effective sample size 0.9"
    assert line in printed(summary)
    assert line in summary_markdown(summary, "cohort run x", {})
    assert summary_of(POINTS).mismatch == {}
    assert "worst step" not in printed(summary_of(POINTS))


def test_the_learning_curve_is_a_png(tmp_path: Path) -> None:
    for name, curve in (("full", POINTS), ("empty", {}), ("no_rewards", {0: POINTS[0]})):
        draw_learning_curve(curve, tmp_path / f"{name}.png", title="a run")
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def printed(summary: Summary) -> str:
    text = io.StringIO()
    print_summary(summary, Console(file=text, width=120, force_terminal=False), ui_command="cohort ui")
    return text.getvalue()
