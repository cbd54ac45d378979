"""What becomes a chart in MLflow: by hand, and of a real run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.cli import run_command
from flows.runs.paths import Places
from flows.runs.record import read_records as read_runs
from flows.tracking.fold import charted
from pipeline.residency import evict
from pipeline.store import Store
from pipeline.tracking.records import Record
from tests.flows.logs import records_of
from tests.flows.short_runs import smoke

TINY = ["iterations=2", "steps=1", "sft.max_steps=2", "sft.decay_steps=1", "evaluation.every=0", "evaluation.samples=4"]
AT_MOST = 60


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root in which the smallest recipe ran."""
    folder = tmp_path_factory.mktemp("artifacts")
    assert run_command(smoke(folder, *TINY)) == 0
    evict()
    return folder


def of_kind(root: Path, kind: str) -> list[Record]:
    (run,) = read_runs(Places(root))
    return [record for record in records_of(root, f"runs/{run.folder.name}") if record["kind"] == kind]


@pytest.mark.slow
def test_a_run_with_two_held_out_sets_would_have_at_most_sixty_charts(root: Path) -> None:
    keys = {key for record in of_kind(root, "step") for key in record["metrics"]}
    second = [key for key in keys if "/in_domain/" in key]
    assert len(second) == 9 + 1 + 2  # evaluation, best, final
    assert 40 < len(keys) + len(second) <= AT_MOST


@pytest.mark.slow
def test_no_two_charts_of_a_run_always_show_the_same(root: Path) -> None:
    doubles = {"policy/policy_loss", "reward/status_ok", "reward/status_truncated", "rollout/samples", "rollout/tokens"}
    keys = {key for record in of_kind(root, "step") for key in record["metrics"]}
    assert keys & doubles == set()
    assert {"policy/loss", "reward/accuracy", "rollout/truncated_rate", "progress/samples", "progress/tokens"} <= keys


@pytest.mark.slow
def test_time_spent_so_far_is_an_axis_that_ascends(root: Path) -> None:
    found = [part["metrics"] for part in of_kind(root, "step") if "progress/seconds" in part["metrics"]]
    spent = [part["progress/seconds"] for part in found]
    assert len(spent) == 2
    assert spent[0] == pytest.approx(found[0]["rollout/seconds"] + found[0]["time/update"])
    assert spent[1] == pytest.approx(spent[0] + found[1]["rollout/seconds"] + found[1]["time/update"])


@pytest.mark.slow
def test_mlflow_gets_the_data_that_the_run_read(root: Path) -> None:
    store = Store(root / "store")
    split = {call["result"]: call["arguments"].get("split") for call in store.actions()}
    named = {record["name"]: record for record in of_kind(root, "dataset")}
    assert list(named) == ["train", "demonstrations", "in_domain"]
    assert [split[part["digest"]] for part in named.values()] == ["train", None, "held_out"]
    assert [part["rows"] for part in named.values()] == [64, 512, 16]
    assert [part["context"] for part in named.values()] == ["training", "supervised fine-tuning", "evaluation"]


@pytest.mark.slow
def test_the_final_policy_is_logged_last_with_its_accuracy(root: Path) -> None:
    (run,) = read_runs(Places(root))
    logged = of_kind(root, "model")[-1]
    assert (logged["model"], logged["digest"], logged["step"]) == ("policy", run.policy, 2)
    accuracy = f"{run.accuracy['final']['in_domain']['accuracy']:.4f}"
    assert logged["tags"] == {
        "run": "arithmetic_smoke",
        "experiment": "arithmetic",
        "arm": "arithmetic_smoke",
        "seed": "0",
        "which": "final",
        "accuracy.in_domain": accuracy,
    }


@pytest.mark.parametrize(
    ("metrics", "kept"),
    [
        ({"policy/loss": 0.3, "policy/policy_loss": 0.3}, ["policy/loss"]),
        ({"eval/a/maj_at_4": 0.5, "eval/a/maj_at_16": 0.6, "eval/b/maj_at_8": 1.0}, ["eval/a/maj_at_16", "eval/b/maj_at_8"]),
        ({"eval/a/accuracy_ci_low": 0.1, "eval/a/greedy_accuracy_ci_low": 0.1}, ["eval/a/accuracy_ci_low"]),
        ({"reward/mean": 1.0, "reward/model": 1.0, "reward/rule": 0.5}, ["reward/mean", "reward/rule"]),
        ({"reward/mean": 1.1, "reward/model": 1.0}, ["reward/mean", "reward/model"]),
    ],
)  # fmt: skip
def test_what_another_metric_says_is_left_out(metrics: dict[str, float], kept: list[str]) -> None:
    assert list(charted(metrics)) == kept


AUC = "rm/held_out_auc/"


@pytest.mark.parametrize(
    ("measured", "shown"),
    [
        ({"old_model_old_policy": 0.9}, (0.9, 0.9)),
        ({"old_model_old_policy": 0.9, "old_model_new_policy": 0.8}, (0.8, 0.8)),
        ({"old_model_new_policy": 0.8, "new_model_old_policy": 0.7, "new_model_new_policy": 0.85}, (0.8, 0.85)),
    ],
)
def test_arms_with_and_without_retraining_have_the_same_charts_of_ageing(
    measured: dict[str, float], shown: tuple[float, float]
) -> None:
    metrics: dict[str, Any] = {f"{AUC}{name}": value for name, value in measured.items()}
    assert charted(metrics) == {f"{AUC}old_model_new_policy": shown[0], f"{AUC}new_model_new_policy": shown[1]}
