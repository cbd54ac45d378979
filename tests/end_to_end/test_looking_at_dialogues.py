"""Dialogues of a run, by every way to look at them: what tables say is what is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import run_command
from flows.experiments.results import read_experiment
from flows.runs.ledger import Ledger
from flows.runs.paths import Places
from flows.tracking.fold import MlflowFold
from pipeline.residency import evict
from pipeline.store import Store, use_store
from stages.environment import parts_of
from stages.tables import Rollouts, ToolCalls
from tests.end_to_end.test_resume import CALLS
from tests.flows.experiments.report.pages import parse

pytestmark = pytest.mark.slow
"""A run of twenty seconds."""

EXPERIMENT: dict[str, Any] = {
    "name": "dialogues",
    "asks": "What do its dialogues say?",
    "base": "arithmetic_smoke",
    "baseline": "tools",
    "common": CALLS
    | {"iterations": 1, "dynamic_sampling": 1, "sft.max_steps": 5, "sft.decay_steps": 1}
    | {"evaluation": {"every": 0, "samples": 0}, "data.evaluation.in_domain.count": 2},
    "arms": {"tools": {}},
    "seeds": [0],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with calls, which dynamic sampling chose among, and its report."""
    place = tmp_path_factory.mktemp("artifacts")
    (place / "dialogues.yaml").write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))
    assert run_command(["ablate", str(place / "dialogues.yaml"), "--engine", "inline", "--root", str(place)]) == 0
    yield place
    evict()


def ledger_of(root: Path) -> Ledger:
    result = read_experiment(root / "runs" / "dialogues")
    assert result is not None
    found = result.runs[0].ledger(Places(root))
    assert found is not None
    return found


def test_the_calls_of_chosen_outputs_are_recorded_and_shown(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = ledger_of(root).steps[1]
    with use_store(Store(root / "store")):
        outputs, calls = Rollouts(made["keep_informative"]).rows(), ToolCalls(made["keep_calls"]).rows()
    turns = {(row["question_id"], row["sample"]): len(row["turns"] or [0]) for row in outputs}
    answered = {(row["question_id"], row["sample"], row["turn"]) for row in calls}
    # An output that went on was answered; the last call of one may have had no room for its answer.
    assert answered >= {(*key, turn) for key, count in turns.items() for turn in range(count - 1)} != set()
    assert answered <= {(*key, turn) for key, count in turns.items() for turn in range(count)}
    row = next(row for row in calls if turns[row["question_id"], row["sample"]] > 1)
    capsys.readouterr()
    assert run_command(["show", made["keep_informative"], "--question", row["question_id"], "--root", str(root)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"calculator {row['input']!r}: {row['status']}" in said


def test_the_report_has_answers_apart_from_what_the_policy_wrote(root: Path) -> None:
    with use_store(Store(root / "store")):
        outputs = Rollouts(ledger_of(root).steps[2]["keep_informative"]).rows()
    parts = [part for row in outputs for part in parts_of(row)]
    section = parse((root / "runs" / "dialogues" / "report.html").read_text("utf-8")).section("completions")
    table = section.all("table", "completions")[1]  # what the last step learned from
    said = [(own, " ".join(text.split())) for own, text in parts]
    shown = [(part.attributes.get("class") != "observed", part.text) for part in table.all("pre")]
    asked = len(table.all("tr")) - 1
    assert len([own for own, _ in shown if not own]) > 0
    assert len([part for part in shown if part in said]) == len(shown) - asked
    calls = [part.text for part in table.all("p", "from") if part.text != "environment"]
    assert set(calls) <= {f"call of calculator: {status}" for status in ("ok", "error", "refused")} != set()


def test_metrics_of_calls_reach_mlflow_the_summary_and_a_figure(root: Path) -> None:
    result = read_experiment(root / "runs" / "dialogues")
    assert result is not None
    folder = root / "runs" / result.runs[0].folder
    curve = json.loads((folder / "summary.json").read_text())["curve"]
    with use_store(Store(root / "store")):
        fold = MlflowFold(folder)
        fold.read()
    for step in (1, 2):
        found = [part["metrics"] for part in fold.records if (part["kind"], part.get("step")) == ("step", step)]
        point = {name: value for metrics in found for name, value in metrics.items()}
        wanted = {name: curve[str(step)][name] for name in ("tool/calls_mean", "tool/used_rate", "time/tools")}
        assert point.items() >= wanted.items()
        assert 0 < wanted["tool/used_rate"] <= 1
        assert "tool/calls" not in point
    assert (root / "runs" / "dialogues" / "figures" / "calls.svg").is_file()
