"""How evaluations are written for people: a dash where a number is undefined, in every view."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from flows.config.recipes import arithmetic_smoke
from flows.export.model_card import _with_interval
from flows.inspection.history import measures
from flows.inspection.run_view import _curve
from flows.runs.state import RunState
from flows.runs.summary import print_summary, summarise, summary_markdown
from flows.tracking.fold import charted
from flows.wording import accuracies, at_k
from stages.models import Checkpoint

KNOWN = {"accuracy": 0.5, "pass_at_1": 0.5, "maj_at_1": 0.5, "pass_at_8": 0.9, "maj_at_8": 0.6, "maj_at_8_ci_low": 0.5}
UNKNOWN = {name: value for name, value in KNOWN.items() if not name.startswith("maj")}


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (KNOWN, {"Pass@8": "pass_at_8", "Maj@8": "maj_at_8"}),
        (UNKNOWN, {"Pass@8": "pass_at_8", "Maj@8": "maj_at_8"}),
        ({"pass_at_16": 1.0, "pass_at_4": 1.0}, dict(zip(
            ("Pass@4", "Pass@16", "Maj@4", "Maj@16"), ("pass_at_4", "pass_at_16", "maj_at_4", "maj_at_16"), strict=True
        ))),
        ({"pass_at_1": 0.5, "pass_at_2_ci_low": 0.1, "greedy_accuracy": 1.0}, {}),
    ],
)  # fmt: skip
def test_both_measures_are_named_at_every_k_above_one(metrics: dict[str, float], expected: dict[str, str]) -> None:
    assert at_k(metrics) == expected
    assert list(at_k(metrics)) == list(expected)


def test_an_undefined_maj_at_k_is_a_dash_in_every_view() -> None:
    assert accuracies(UNKNOWN) == "sampled 0.500 pass@8 0.900 maj@8 -"
    assert _with_interval(UNKNOWN, measures(UNKNOWN)["Maj@8"]) == "-"
    text = io.StringIO()
    Console(file=text, width=200).print(_curve("held_out", {0: KNOWN, 2: UNKNOWN}))
    assert text.getvalue().splitlines()[-1].split()[:4] == ["2", "0.500", "0.900", "-"]


def test_a_summary_shows_a_dash_for_an_undefined_maj_at_k_and_no_change() -> None:
    points = {
        step: {f"eval/held_out/{name}": value for name, value in metrics.items()}
        for step, metrics in ((0, KNOWN), (4, UNKNOWN))
    }
    summary = summarise(arithmetic_smoke(), points, RunState(steps=4), Checkpoint("ab" * 32), {"run": Path("runs/x")})
    text = io.StringIO()
    print_summary(summary, Console(file=text, width=200), ui_command="cohort ui")
    row = next(line for line in text.getvalue().splitlines() if "Maj@8" in line)
    assert row.split("Maj@8")[1].replace("│", " ").split() == ["0.600", "-", "-"]
    assert "| held_out | Maj@8 | 0.600 | - |" in summary_markdown(summary, "cohort run x", {})


def test_intervals_at_k_stay_out_of_the_charts() -> None:
    metrics = {f"eval/a/{kind}_at_8{end}": 0.5 for kind in ("pass", "maj") for end in ("", "_ci_low", "_ci_high")}
    assert set(charted(metrics)) == {"eval/a/pass_at_8", "eval/a/maj_at_8"}
