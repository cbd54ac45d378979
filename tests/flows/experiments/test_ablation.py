"""Experiments as runs: which there are, what is computed once, what a repeat, a new arm or a changed base costs, failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import run_command
from flows.experiments.arms import plan
from flows.experiments.results import ExperimentResult, read_experiment
from flows.experiments.studies import EXPERIMENTS, SCALES, named_experiment
from flows.runs.ledger import Ledger
from flows.runs.paths import Places
from flows.runs.record import read_records
from pipeline.event_log import LOG, read_events
from pipeline.events import RunEnded
from pipeline.experiment import Experiment
from pipeline.residency import evict
from pipeline.store import Store
from tests.flows.logs import records_of
from tests.pipeline.processes import until

ROOT = Path(__file__).parents[3]
TINY: dict[str, Any] = {
    "name": "tiny",
    "asks": "Does the clip range matter?",
    "base": "arithmetic_smoke",
    "baseline": "usual",
    "common": {
        "data.evaluation.in_domain.count": 4,
        "iterations": 1,
        "steps": 1,
        "sft.max_steps": 2,
        "sft.decay_steps": 1,
        "evaluation.every": 0,
    },
    "arms": {"usual": {}, "wide": {"update.objective.eps": 0.4}},
    "seeds": [0, 1],
}


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("COHORT_DEBUG", "0")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root of a tiny experiment that was run once."""
    root = tmp_path_factory.mktemp("artifacts")
    assert ablate(root) == 0
    yield root
    evict()


def ablate(root: Path, *arguments: str, **changes: Any) -> int:
    """Run the tiny experiment, changed, as the command does."""
    file = root / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY | changes))
    return run_command(["ablate", str(file), "--engine", "inline", "--root", str(root), *arguments])


def result_of(root: Path, name: str = "tiny") -> ExperimentResult:
    result = read_experiment(root / "runs" / name)
    assert result is not None
    return result


def last_attempts(root: Path) -> dict[str, tuple[int, int]]:
    """Computed and reused stage calls of the last attempt of every run."""
    return {r.name: (r.attempts[-1].executed, r.attempts[-1].cached) for r in read_records(Places(root))}


def ledgers(root: Path) -> list[Ledger]:
    found = [run.ledger(Places(root)) for run in result_of(root).runs]
    assert None not in found
    return [ledger for ledger in found if ledger]


# ------------------------------------------------------------------------------------- which arms there are


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_study_of_the_paper_is_valid_in_every_size(name: str, scale: str) -> None:
    planned = plan(named_experiment(name, scale=scale))
    assert len(planned.arms) == len(SCALES[scale].seeds) * len(planned.names)
    assert len({arm.choice.config.name for arm in planned.arms}) == len(planned.arms)
    assert not [arm for arm in planned.arms if arm.also]
    assert {arm.choice.config.experiment for arm in planned.arms} == {f"{name}-{scale}".removesuffix("-")}


@pytest.mark.parametrize("scale", SCALES)
def test_single_and_iterative_train_for_equally_many_steps(scale: str) -> None:
    configs = [arm.choice.config for arm in plan(named_experiment("single_vs_iterative", scale=scale)).arms]
    assert len({config.iterations * config.steps for config in configs}) == 1
    assert {config.iterations for config in configs} == {1, 2, 3}
    assert all(config.reward_model and config.reward_model.retrain for config in configs)


def test_a_longer_arm_of_fig6_continues_the_shorter_ones() -> None:
    configs = [arm.choice.config for arm in plan(named_experiment("fig6")).arms[:4]]
    *iterations, long = configs
    assert [config.iterations for config in iterations] == [1, 2, 3]
    assert len({config.override({"iterations": 1, "name": "x"}).to_yaml() for config in iterations}) == 1
    assert long.iterations * long.steps == iterations[-1].iterations * iterations[-1].steps
    # Evaluations of a shorter arm's end are evaluations on a longer arm's way.
    assert configs[0].steps % configs[0].evaluation.every == 0


def test_fig7_estimates_every_k_of_the_paper_from_one_set_of_samples() -> None:
    evaluation = plan(named_experiment("fig7")).arms[0].choice.config.evaluation
    assert (evaluation.samples, evaluation.temperature) == (64, 0.7)
    assert evaluation.estimates.ks == (1, 4, 8, 16, 32, 64)


def test_fig5_has_the_four_curves_of_the_paper() -> None:
    arms = {arm.name: arm.choice.config for arm in plan(named_experiment("fig5")).arms}
    assert {name: config.data_source for name, config in arms.items()} == {
        "rft": "initial_policy",
        "online_rft": "policy",
        "grpo_os": "policy",
        "grpo_ps": "policy",
    }
    assert [arms[name].advantage.model_dump()["supervision"] for name in ("grpo_os", "grpo_ps")] == [
        "outcome",
        "process",
    ]


def test_fig5_of_the_papers_size_learns_rewards_for_grpo_only() -> None:
    arms = {arm.name: arm.choice.config for arm in plan(named_experiment("fig5", scale="paper")).arms}
    models = {
        name: arm.reward_model and [model.kind for model in arm.reward_model.models] for name, arm in arms.items()
    }
    assert models == {"rft": None, "online_rft": None, "grpo_os": ["outcome"], "grpo_ps": ["outcome", "process"]}
    assert arms["grpo_ps"].reward_model.step_labels.kind == "monte_carlo"  # type: ignore[union-attr]
    assert {(arm.rollout.G, arm.questions_per_step, arm.update.mu) for arm in arms.values()} == {(64, 16, 1)}


def test_what_an_arm_differs_in_leaves_out_what_comes_with_another_kind() -> None:
    planned = plan(named_experiment("methods"))
    differences = {arm.name: planned.differences(arm) for arm in planned.arms}
    assert differences["sft"] == {}
    assert differences["grpo"] == {
        "data_source": ("demonstrations", "policy"),
        "advantage.kind": ("one", "group"),
        "update.objective.kind": ("sft", "grpo"),
    }


def test_a_section_that_the_baseline_lacks_is_named_also_where_it_is_the_default() -> None:
    planned = plan(named_experiment("curriculum"))
    differences = {arm.name: planned.differences(arm) for arm in planned.arms}
    assert differences["band"] == {"curriculum": (None, "...")}
    assert differences["band_dynamic"] == {"curriculum": (None, "..."), "dynamic_sampling": (0, 3)}


def test_a_setting_that_fits_no_arm_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate(tmp_path, "--set", "update.objective.epps=0.1") == 2
    error = capsys.readouterr().err
    assert "arms usual, wide:" in error
    assert "update.objective.epps: unknown key; did you mean 'eps'?" in error
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--seeds", "0,1,0"], "seeds: 0 occurs 2 times"),
        (["--seeds", "x"], "--seeds x: expected how many (3), or which, with commas (0,1,2)"),
        (["--seeds", "0"], "--seeds 0: expected how many"),
        (["--set", "seed=3"], "--set seed: the seeds of an experiment are given by --seeds"),
        (["--arm", "wild"], "--arm: 'wild' is not an arm; did you mean 'wide'?"),
        (["--quick"], "tiny.yaml has one size"),
        (["--quick", "--paper"], "--quick and --paper are two sizes"),
    ],
)
def test_wrong_options_exit_with_2_and_say_what_is_expected(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate(tmp_path, *arguments) == 2
    assert complaint in capsys.readouterr().err


def test_an_unknown_experiment_exits_with_2_and_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["ablate", "fig8"]) == 2
    assert "fig8: neither an experiment nor a YAML file; did you mean 'fig7'?" in " ".join(
        capsys.readouterr().err.split()
    )


def test_seeds_are_counted_up_or_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, seeds in [("3", "0, 1, 2"), ("4,9", "4, 9"), ("4,", "4")]:
        assert ablate(tmp_path, "--dry-run", "--seeds", given) == 0
        assert f"runs, seeds {seeds};" in capsys.readouterr().out


def test_a_dry_run_shows_arms_and_differences_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = TINY["arms"] | {"same": {"update.objective.eps": 0.2}, "sft": {"method": "sft"}}
    assert ablate(tmp_path, "--dry-run", "--arm", "same", "--arm", "wide", arms=arms) == 0
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert rows["usual = same"][-1] == "-"
    assert rows["wide"][-4:] == ["update.objective.eps:", "0.2", "->", "0.4"]
    assert "sft  (not now)" in out
    assert "equal configurations, run once: usual = same" in out
    assert "4 runs, seeds 0, 1; 0 finished before" in out
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_experiments_are_listed_and_printed_as_yaml_that_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["experiments"]) == 0
    out = capsys.readouterr().out
    assert [name for name in EXPERIMENTS if name not in out] == []
    assert run_command(["experiments", "fig5", "--quick"]) == 0
    file = tmp_path / "mine.yaml"
    file.write_text(capsys.readouterr().out)
    assert named_experiment(str(file)) == named_experiment("fig5", scale="quick")


# ------------------------------------------------------------------------------------- running


@pytest.mark.slow
def test_what_arms_share_is_computed_once(first: Path) -> None:
    result = result_of(first)
    assert [(run.arm, run.seed, run.status) for run in result.runs] == [
        ("usual", 0, "finished"),
        ("wide", 0, "finished"),
        ("usual", 1, "finished"),
        ("wide", 1, "finished"),
    ]
    store = Store(first / "store")
    stages = [record["stage"] for record in store.actions()]
    # One supervised policy for four runs; a first step's outputs for each seed; an update for each run.
    assert [stages.count(stage) for stage in ("supervised_finetuning", "estimate_advantages", "update_policy")] == [
        1,
        2,
        4,
    ]
    assert sum(executed for executed, _ in last_attempts(first).values()) == len(stages) == result.sharing.distinct
    seconds = {record["key"]: record["seconds"] for record in store.actions()}
    assert result.sharing.seconds_together == pytest.approx(sum(seconds.values()))
    apart = [seconds[key] for ledger in ledgers(first) for key in ledger.calls]
    assert result.sharing.asked == len(apart)
    assert result.sharing.seconds_apart == pytest.approx(sum(apart))
    assert result.sharing.ratio == result.sharing.seconds_together / result.sharing.seconds_apart < 1


@pytest.mark.slow
def test_the_results_lead_to_differences_curves_and_artifacts(first: Path) -> None:
    result = result_of(first)
    assert {arm.name: arm.differences for arm in result.arms} == {
        "usual": {},
        "wide": {"update.objective.eps": (0.2, 0.4)},
    }
    for run, ledger in zip(result.runs, ledgers(first), strict=True):
        summary = run.summary(Places(first))
        assert summary is not None
        assert sorted(summary.curve) == [0, 1]
        assert run.final == summary.after
        assert set(ledger.steps[1]) >= {"rollout", "score", "estimate_advantages", "update_policy"}
        assert ledger.steps[1]["update_policy"] == run.policy
        sampled = [e for e in ledger.evaluations if (e.step, e.mode) == (1, "sampled")]
        keys = [key for key, call in ledger.calls.items() if call.digest == sampled[0].artifacts["evaluate"]]
        action = Store(first / "store").action(keys[-1])
        assert action["metrics"]["length_mean"] == run.final["in_domain"]["length_mean"]
    assert result.finals("wide", "in_domain", "accuracy") == [
        run.final["in_domain"]["accuracy"] for run in result.runs[1::2]
    ]
    assert "| wide | `update.objective.eps=0.4` |" in (first / "runs" / "tiny" / "tables.md").read_text()
    assert Experiment.from_yaml((first / "runs" / "tiny" / "experiment.yaml").read_text()) == result.experiment


@pytest.mark.slow
def test_mlflow_gets_arm_seed_parent_and_difference(first: Path) -> None:
    (run,) = [run for run in result_of(first).runs if (run.arm, run.seed) == ("wide", 1)]
    logged = records_of(first, f"runs/{run.folder}")[0]
    assert (logged["tags"]["arm"], logged["tags"]["seed"], logged["tags"]["cohort.parent_key"]) == ("wide", "1", "tiny")
    assert {key: value for key, value in logged["params"].items() if key.startswith("diff.")} == {
        "diff.update.objective.eps": "0.4"
    }
    parent = records_of(first, "tracking/tiny")
    assert [record["kind"] for record in parent] == ["run", "table", "alias", "figure", "figure", "tags"]
    assert parent[1]["columns"][:4] == ["arm", "seed", "run", "status"]


@pytest.mark.slow
def test_a_repeat_computes_nothing_and_imports_no_torch(first: Path) -> None:
    tables = (first / "runs" / "tiny" / "tables.md").read_text().splitlines()[5:]
    code = (
        "import sys; from flows.cli import run_command\n"
        f"code = run_command(['ablate', {str(first / 'tiny.yaml')!r}, '--engine', 'inline', '--root', {str(first)!r}])\n"
        "sys.exit(code or 10 * any(name in sys.modules for name in ('torch', 'transformers', 'mlflow', 'matplotlib')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = sum(executed + cached for executed, cached in last_attempts(first).values())
    assert f"stage calls: {calls} asked for, 0 computed, {calls} reused" in done.stdout
    assert (first / "runs" / "tiny" / "tables.md").read_text().splitlines()[5:] == tables


@pytest.mark.slow
def test_an_arm_that_is_added_computes_what_is_its_own(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = len(list(Store(first / "store").actions()))
    assert ablate(first, arms=TINY["arms"] | {"sharp": {"rollout.temperature": 0.5}}) == 0
    attempts = last_attempts(first)
    assert [attempts[f"tiny-{arm}-s{seed}"][0] for arm in ("usual", "wide") for seed in (0, 1)] == [0, 0, 0, 0]
    own = sum(attempts[f"tiny-sharp-s{seed}"][0] for seed in (0, 1))
    new = list(Store(first / "store").actions())[before:]
    assert own == len(new)
    assert "supervised_finetuning" not in [record["stage"] for record in new]
    assert "other settings" not in capsys.readouterr().out
    assert len(result_of(first).runs) == 6
    assert not list((first / "runs" / "tiny").glob("experiment-*.json"))


@pytest.mark.slow
def test_a_changed_base_names_the_stages_that_differ_and_keeps_results(
    first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate(first, "--set", "update.objective.beta=0.1", "--seeds", "1", "--arm", "usual") == 0
    out = capsys.readouterr().out
    assert "other settings than when these runs were last made: update.objective.beta: 0.04 -> 0.1" in out
    assert "  update_policy: config.objective.beta: 0.04 -> 0.1" in out
    statuses = {run.name: run.status for run in result_of(first).runs}
    assert statuses == {"tiny-usual-s0": "finished", "tiny-wide-s0": "not run"}
    (kept,) = (first / "runs" / "tiny").glob("experiment-*.json")
    assert json.loads(kept.read_text())["experiment"]["name"] == "tiny"


@pytest.mark.slow
def test_an_arm_that_fails_is_reported_and_the_others_go_on(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = {"strict": {"preflight.unreadable": 0.01}, "usual": {}}
    assert ablate(first, "--seeds", "1", arms=arms) == 1
    captured = capsys.readouterr()
    assert "1 of 2 runs failed" in " ".join(captured.err.split())
    statuses = {run.arm: run.status for run in result_of(first).runs}
    assert statuses == {"strict": "failed", "usual": "finished"}


def test_results_that_cannot_be_written_stop_the_experiment_before_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").write_text("in the way")
    assert ablate(tmp_path) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


# ------------------------------------------------------------------------------------- side by side


def started(root: Path, name: str) -> int:
    """The process of a run, once it has computed something."""

    def pids() -> list[int]:
        last = [record.attempts[-1] for record in read_records(Places(root)) if record.name == name]
        return [attempt.start.pid for attempt in last if attempt.status == "running"]

    return until(pids, 240)[0]


def command(root: Path, *arguments: str) -> subprocess.Popen[str]:
    (root / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    arguments = (
        "ablate",
        str(root / "tiny.yaml"),
        "--engine",
        "inline",
        "--root",
        str(root),
        "--parallel",
        "2",
        *arguments,
    )
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_child_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    process = command(tmp_path)
    os.kill(started(tmp_path, "tiny-usual-s0"), signal.SIGKILL)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "tiny-usual-s0  killed by SIGKILL" in out
    statuses = {run.name: run.status for run in result_of(tmp_path).runs}
    assert statuses == {
        "tiny-usual-s0": "killed",
        "tiny-wide-s0": "finished",
        "tiny-usual-s1": "finished",
        "tiny-wide-s1": "finished",
    }
    assert ablate(tmp_path) == 0
    records = list(Store(tmp_path / "store").actions())
    assert result_of(tmp_path).sharing.distinct == len(records)
    computed = sum(a.executed for r in read_records(Places(tmp_path)) for a in r.attempts if a.status == "finished")
    assert computed <= len(records)


@pytest.mark.slow
def test_an_interruption_stops_every_child_and_the_same_command_continues(tmp_path: Path) -> None:
    process = command(tmp_path)
    children = [started(tmp_path, name) for name in ("tiny-usual-s0", "tiny-wide-s0")]
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    (ended,) = read_events(tmp_path / "tracking" / "tiny" / LOG, kinds=(RunEnded,))
    assert isinstance(ended, RunEnded)
    assert ended.status == "interrupted"
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert "tiny-usual-s1" not in [record.name for record in read_records(Places(tmp_path))]
    assert ablate(tmp_path) == 0
    assert {run.status for run in result_of(tmp_path).runs} == {"finished"}
