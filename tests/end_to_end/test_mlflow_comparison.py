"""Arms side by side in MLflow: a real experiment, MLflow's own server, and its pages in Chromium.

Asserted is what a person sees who did not run it: arms, charts that line up, what differs, figures, the same questions with the
answers of every arm, and the models that came of it.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import run_command
from flows.experiments.results import ExperimentResult, read_experiment
from flows.runs.curve import COLOURS
from pipeline.residency import evict
from tests.flows.browser import Browser, chromium
from tests.flows.short_runs import LEARNING, SHORT

REPOSITORY = Path(__file__).parents[2]
NAME = "pair"
EXPERIMENT: dict[str, Any] = {
    "name": NAME,
    "asks": "Does the clip range matter?",
    "base": "arithmetic_smoke",
    "baseline": "usual",
    "common": LEARNING
    | {
        "data.evaluation.in_domain": {"count": 6, **SHORT},
        "reward_model": {
            "models": [{"kind": "outcome"}],
            "trunk": "initial_policy",
            "questions": 48,
            "held_out_questions": 6,
            "training": {
                "questions_per_update": 12,
                "training": {"precision": "fp32", "threads": 1, "optimizer": {"kind": "adamw", "learning_rate": 1e-3}},
            },
            "scoring": {"precision": "fp32", "threads": 1},
            "gauges": {"resamples": 100},
        },
        "iterations": 2,
        "steps": 1,
        "evaluation": {"every": 1, "samples": 2, "estimates": {"ks": [2]}},
    },
    "arms": {"usual": {}, "hot": {"rollout.temperature": 1.25}},
    "seeds": [0],
}
SECTIONS = ("eval/in_domain", "reward", "policy", "rollout", "rm", "time", "progress", "final/in_domain")

pytestmark = pytest.mark.slow
"""Two runs, MLflow's server and a browser: two minutes."""


@dataclass(frozen=True)
class Served:
    """An experiment in MLflow's server."""

    root: Path
    url: str

    @property
    def result(self) -> ExperimentResult:
        found = read_experiment(self.root / "runs" / NAME)
        assert found is not None
        return found

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        """What MLflow's REST interface answers; a GET where nothing is given."""
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(f"{self.url}/{path}", data=data, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return dict(json.load(answer))

    @property
    def experiment(self) -> str:
        """Id of the experiment."""
        return str(
            self.ask(f"api/2.0/mlflow/experiments/get-by-name?experiment_name={NAME}")["experiment"]["experiment_id"]
        )

    def runs(self) -> dict[str, dict[str, Any]]:
        """Name -> run as MLflow has it."""
        found = self.ask("api/2.0/mlflow/runs/search", experiment_ids=[self.experiment])["runs"]
        return {run["info"]["run_name"]: run for run in found}

    def arms(self) -> dict[str, str]:
        """Arm -> id of its run."""
        tags = {name: {tag["key"]: tag["value"] for tag in run["data"]["tags"]} for name, run in self.runs().items()}
        return {tags[name]["arm"]: run["info"]["run_id"] for name, run in self.runs().items() if "arm" in tags[name]}

    def page(self, path: str) -> str:
        return f"{self.url}/#/{path}"

    def version(self, model: str, digest: str) -> dict[str, Any]:
        """The one version of a digest."""
        wanted = urllib.parse.quote(f"name='{model}' and tags.digest='{digest}'")
        (found,) = self.ask(f"api/2.0/mlflow/model-versions/search?filter={wanted}")["model_versions"]
        return dict(found)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The experiment, run, and served as `cohort ui` does."""
    root = tmp_path_factory.mktemp("artifacts")
    file = root / "pair.yaml"
    file.write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert run_command(["ablate", str(file), "--engine", "inline", "--root", str(root)]) == 0
    evict()
    with serving(root) as url:
        yield Served(root, url)


@contextlib.contextmanager
def serving(root: Path) -> Iterator[str]:
    """`cohort ui`, which sends to MLflow what it lacks first."""
    command = [sys.executable, "-m", "flows.cli", "ui", "--port", "0", "--root", str(root)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        shown = next(line for line in process.stdout if line.startswith("MLflow"))
        yield shown.split()[1]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        subprocess.run(
            [sys.executable, "-m", "flows.cli", "server", "down", "--root", str(root)], cwd=REPOSITORY, check=True
        )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


# ------------------------------------------------------------------------------------- what MLflow holds


def test_arms_have_equal_metrics_at_equal_steps_each_once(served: Served) -> None:
    arms = served.arms()
    assert sorted(arms) == ["hot", "usual"]
    keys = [{metric["key"] for metric in run["data"]["metrics"]} for name, run in served.runs().items() if name != NAME]
    assert keys[0] == keys[1]
    assert 40 < len(keys[0]) <= 64  # with reward models, one held-out set
    chosen = "&".join(f"run_ids={run}" for run in arms.values())
    grids = {}
    for key in sorted(keys[0]):
        wanted = urllib.parse.urlencode({"metric_key": key, "max_results": 2500})
        path = f"ajax-api/2.0/mlflow/metrics/get-history-bulk-interval?{chosen}&{wanted}"
        points = [(point["run_id"], point["step"]) for point in served.ask(path)["metrics"]]
        assert len(points) == len(set(points)), f"{key} has a step twice"
        grids[key] = [sorted(step for run, step in points if run == arm) for arm in arms.values()]
        if not key.startswith("rm/"):  # an AUC needs right and wrong outputs, which a step may lack
            assert grids[key][0] == grids[key][1], key
    assert grids["eval/in_domain/accuracy"][0] == [0, 1, 2]
    assert grids["reward/mean"][0] == grids["progress/seconds"][0] == [1, 2]


def test_versions_are_the_policies_and_reward_models_of_the_runs(served: Served) -> None:
    arms = served.arms()
    for run in served.result.runs:
        version = served.version("policy", run.policy)
        assert version["run_id"] == arms[run.arm]
        assert version["source"] == f"cohort:///objects/{run.policy[:2]}/{run.policy}"
    best = served.result.best_run()
    assert best is not None
    alias = served.ask(f"api/2.0/mlflow/registered-models/alias?name=policy&alias=best-{NAME}")["model_version"]
    assert alias["version"] == served.version("policy", best.policy)["version"]
    wanted = urllib.parse.quote("name='reward-model'")
    models = served.ask(f"api/2.0/mlflow/model-versions/search?filter={wanted}")["model_versions"]
    tags = [{tag["key"]: tag["value"] for tag in model["tags"]} for model in models]
    digests = [tag["digest"] for tag in tags]
    assert len(digests) == len(set(digests))
    assert {tag["iteration"] for tag in tags} == {"0", "1"}
    assert all(0 <= float(tag["held_out_auc"]) <= 1 for tag in tags if "held_out_auc" in tag)


# ------------------------------------------------------------------------------------- what a person sees


def test_the_experiment_page_shows_every_arm_with_its_models_and_data(served: Served, browser: Browser) -> None:
    names = [run.name for run in served.result.runs]
    text = browser.open(served.page(f"experiments/{served.experiment}/runs"), *names, "train (", "policy")
    version = served.version("policy", served.result.runs[0].policy)["version"]
    assert f"v{version}" in text


def test_the_chart_page_draws_the_curves_of_both_arms_in_one_chart_each(
    served: Served, browser: Browser, tmp_path: Path
) -> None:
    names = [run.name for run in served.result.runs]
    url = served.page(f"experiments/{served.experiment}/runs?compareRunsMode=CHART")
    text = browser.open(url, *names, *SECTIONS)
    assert set(SECTIONS) <= set(text.splitlines())  # headings of their own, one for each prefix
    colours = [f"rgb({int(hue[1:3], 16)}, {int(hue[3:5], 16)}, {int(hue[5:7], 16)})" for hue in COLOURS[:2]]
    for metric in ("eval/in_domain/accuracy", "reward/mean", "rm/auc"):
        browser.write("Search metric charts", metric)
        assert set(browser.lines_of(metric)) == set(colours)
    assert browser.picture(tmp_path / "charts.png").stat().st_size > 20_000


def test_the_comparison_shows_the_arms_side_by_side_and_what_differs(served: Served, browser: Browser) -> None:
    runs = urllib.parse.quote(json.dumps(list(served.arms().values())))
    experiments = urllib.parse.quote(json.dumps([served.experiment]))
    names = [run.name for run in served.result.runs]
    text = browser.open(
        served.page(f"compare-runs?runs={runs}&experiments={experiments}"),
        *names,
        "diff.rollout.temperature",
        "eval/in_domain",
    )
    rows = [line.split("\t") for line in text.splitlines()]
    (difference,) = [row for row in rows if row[0] == "rollout.temperature" and len(row) == 3]
    assert sorted(cell.strip() for cell in difference[1:]) == ["1.0", "1.25"]
    # The table of metrics is written name after name, then value after value, as far as it is on the screen.
    table = text[text.rindex("\nMetrics\n") :].partition("\nArtifacts\n")[0].splitlines()
    metrics = [line for line in table if "/" in line]
    values = [float(line) for line in table if line.strip().lstrip("-")[:1].isdigit()]
    assert len(metrics) >= 10
    assert len(values) == 2 * len(metrics)  # none is lacking in either arm


def test_every_arm_answers_the_same_questions_in_mlflow(served: Served, browser: Browser) -> None:
    names = [run.name for run in served.result.runs]
    url = served.page(f"experiments/{served.experiment}/runs?compareRunsMode=ARTIFACT")
    browser.open(url, *names, "completions.json", "Group by: question", "Compare: completion")
    tables = [served.ask(f"get-artifact?path=completions.json&run_uuid={run}") for run in served.arms().values()]
    assert tables[0]["columns"][:2] == ["question", "completion"]
    asked = [row[0] for row in tables[0]["data"]]
    assert asked == [row[0] for row in tables[1]["data"]]
    shown = " ".join(browser.text(asked[0]).split())
    answers = [" ".join(str(row[1]).split()) for table in tables for row in table["data"] if row[0] == asked[0]]
    assert all(answer in shown for answer in answers)


def test_the_run_of_the_experiment_has_its_figure(served: Served, browser: Browser) -> None:
    run = served.runs()[NAME]["info"]["run_id"]
    listed = served.ask(f"api/2.0/mlflow/artifacts/list?run_id={run}&path=figures")["files"]
    picture = next(file["path"] for file in listed if file["path"].endswith(".png"))
    browser.open(served.page(f"experiments/{served.experiment}/runs/{run}/artifacts/{picture}"), Path(picture).name)
    assert browser.until("[...document.querySelectorAll('img')].some(image => image.naturalWidth > 300)") is True


def test_the_registry_page_shows_the_versions_and_the_alias_of_the_best_arm(served: Served, browser: Browser) -> None:
    best = served.result.best_run()
    assert best is not None
    text = browser.open(served.page("models/policy"), f"best-{NAME}", "Version 1")
    assert best.policy[:12] in text.replace("\u200b", "")
    assert all(f"arm {run.arm}" in " ".join(text.replace(":", " ").split()) for run in served.result.runs)
    browser.open(served.page("models/reward-model"), "Version 1", "iteration", "held_out_auc")
    version = served.version("policy", best.policy)["version"]
    browser.open(served.page(f"models/policy/versions/{version}"), best.name, f"cohort show {best.policy[:12]}")
