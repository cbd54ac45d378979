"""Deployments on a real Prefect server with real process workers, on loopback: by hand, by schedule, killed, refused.

What is trained is the smallest run there is; what an undisturbed run comes to is computed in this process, in another store.
"""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.config import IterativeRLConfig
from flows.config.resolve import Choice, choose
from flows.deploying.deployment import Deployed, deploy
from flows.deploying.pool import VERSIONS, cancel, ensure_pool, submit
from flows.iterative_rl import iterative_rl
from flows.runs.paths import Places
from flows.runs.record import run_folder
from pipeline.config import ConfigError
from pipeline.orchestration.server import ServerError
from pipeline.residency import evict
from pipeline.store import Store, use_store
from pipeline.store.context import package_versions
from tests.flows.deploying.project import Project, flow_run_processes, listened_on
from tests.flows.short_runs import BASE
from tests.pipeline.processes import until

pytestmark = pytest.mark.scale
"""A server, workers and processes of runs: four minutes on two quiet cores."""

CONFIG: IterativeRLConfig = BASE.override({"name": "by-hand", "steps": 2, "sft.max_steps": 299})
SLOW: IterativeRLConfig = BASE.override({"name": "killed", "steps": 2, "seed": 1, "sft.max_steps": 600})
"""Long enough in supervised fine-tuning to be killed there."""


@pytest.fixture(scope="module")
def deployed(project: Project) -> Deployed:
    return deploy(Choice(CONFIG, BASE), project.places, name="short", restarts=5)


def undisturbed(config: IterativeRLConfig, root: Path) -> str:
    """The content of the final policy of a run that nothing happened to."""
    with use_store(Store(root / "undisturbed")):
        content = iterative_rl(config).content
    evict()
    return content


def stages_in(places: Places) -> list[str]:
    return [record["stage"] for record in places.open_store().actions()]


def test_a_run_killed_twice_and_stopped_repeats_only_the_stage_in_flight(
    project: Project, deployed: Deployed, tmp_path: Path
) -> None:
    expected = undisturbed(SLOW, tmp_path)
    run, log = submit(deployed.name, SLOW), tmp_path / "worker.log"

    with project.worker(log) as worker:
        until(lambda: training(project, 1), 480)
        held = len(stages_in(project.places))
        for process in [psutil.Process(worker.pid), *flow_run_processes(run)]:  # as when the host dies
            process.kill()
        worker.wait(timeout=30)
    with project.worker(log) as worker:
        until(lambda: training(project, 2), 480)
        worker.kill()  # the worker alone: its run notices and ends by itself
        worker.wait(timeout=30)
        until(lambda: not flow_run_processes(run), 60)
    with project.worker(log) as worker:
        until(lambda: training(project, 3), 480)
        started = psutil.Process(worker.pid).children(recursive=True)
        worker.send_signal(signal.SIGINT)
        assert worker.wait(timeout=90) in (0, 130)
        assert started
        assert not psutil.wait_procs(started, timeout=5.0)[1], "left behind"
    with project.worker(log):
        until(lambda: project.states(run)[-1] == "COMPLETED", 480)
    record = project.record(SLOW)
    assert project.places.open_store().manifest(record.policy)["digest"] == expected
    assert [attempt.outcome() for attempt in record.attempts] == ["killed", "interrupted", "interrupted", "finished"]
    left = len(stages_in(project.places)) - held  # the stage in flight at the first kill, and those after it
    assert (record.attempts[-1].cached, record.attempts[-1].executed) == (15 - left, left)
    assert project.states(run).count("CRASHED") == 3


def training(project: Project, attempt: int) -> bool:
    """Whether the `attempt`-th attempt of the slow run is in a stage that takes long, which only its fine-tuning does."""
    folder = run_folder(project.places, SLOW)
    if not (folder / "events.jsonl").exists() or len(project.record(SLOW).attempts) < attempt:
        return False
    held = set((project.places.store / "locks").iterdir())
    time.sleep(1.5)
    return bool(held & set((project.places.store / "locks").iterdir()))


@pytest.fixture(scope="module")
def worker(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One worker for all tests that do not end it, after those that do."""
    with project.worker(tmp_path_factory.mktemp("worker") / "worker.log"):
        yield


@pytest.mark.usefixtures("worker")
def test_a_run_by_hand_has_a_record_and_tasks_and_is_cached_the_next_time(
    project: Project, deployed: Deployed, tmp_path: Path
) -> None:
    expected, before = undisturbed(CONFIG, tmp_path), stages_in(project.places)
    asked = choose("arithmetic_smoke", settings=["sft.max_steps=299"]).asked
    first = submit(deployed.name, CONFIG, tags={"arm": "usual"}, asked=asked)
    until(lambda: project.states(first)[-1] == "RUNNING", 480)
    assert listened_on() == {"127.0.0.1"}
    assert project.ended(first) == ("COMPLETED", "")
    again = submit(deployed.name, CONFIG)
    assert project.ended(again)[0] == "COMPLETED"
    record = project.record(CONFIG)
    assert project.places.open_store().manifest(record.policy)["digest"] == expected
    computed = Counter(stages_in(project.places)) - Counter(before)
    assert [attempt.executed for attempt in record.attempts] == [computed.total(), 0]
    assert Counter(name for name, state in project.tasks(first, 15) if state == "Completed") == computed
    assert computed["supervised_finetuning"] == 1
    kept = [(each["setting"], each["value"], each["source"]) for each in record.attempts[0].start.overrides]
    assert (record.attempts[0].start.recipe, kept[0]) == ("arithmetic_smoke", ("sft.max_steps", 299, "--set"))
    assert ("name", "by-hand", "the run's parameters") in kept[1:]
    assert {state for _, state in project.tasks(again, 15)} == {"Cached"}
    run = project.ask(f"flow_runs/{first}")
    assert "arm:usual" in run["tags"]
    assert project.ask("flow_runs/filter", flow_runs={"parent_flow_run_id": {"any_": [str(first)]}}) == []
    noted = json.loads((run_folder(project.places, CONFIG) / "flow_runs.json").read_text())
    assert set(noted) == {str(first), str(again)}
    assert noted[str(first)]["deployer_packages"] == noted[str(first)]["worker_packages"] == package_versions()


@pytest.mark.usefixtures("worker")
def test_all_that_is_wrong_in_the_form_is_the_message_of_a_failed_run(project: Project, deployed: Deployed) -> None:
    values = CONFIG.model_dump(mode="json")
    create = f"deployments/{deployed.id}/create_flow_run"
    with pytest.raises(urllib.error.HTTPError, match="409"):
        project.ask(create, parameters={"config": values | {"steps": "many"}})
    values["update"]["temperature"] = 0.5
    values["advantage"] = {"kind": "gae"}
    run = project.ask(create, parameters={"config": values})["id"]
    state, message = project.ended(run)
    assert state == "FAILED"
    for part in (
        "ConfigError",
        "advantage.kind: grpo takes",
        "critic: advantage.kind gae (PPO) needs one",
        "update.temperature: 0.5 differs from",
    ):
        assert part in message


@pytest.mark.usefixtures("worker")
def test_a_worker_with_other_packages_is_named_and_refused_where_asked(project: Project) -> None:
    env = {VERSIONS: json.dumps(package_versions() | {"numpy": "0.1"})}
    config = CONFIG.override({"name": "versions"})
    lenient = deploy(Choice(config, BASE), project.places, name="lenient", env=env)
    strict = deploy(Choice(config, BASE), project.places, name="strict", env=env, require_versions=True)
    taken, refused = submit(lenient.name, config), submit(strict.name, config)
    assert project.ended(taken)[0] == "COMPLETED"
    state, message = project.ended(refused)
    difference = f"numpy: expected 0.1, found {package_versions()['numpy']}"
    assert state == "FAILED"
    assert "VersionsError" in message
    assert difference in message
    noted = json.loads((run_folder(project.places, config) / "flow_runs.json").read_text())
    assert noted[str(taken)]["differences"] == [difference]
    assert str(refused) not in noted


@pytest.mark.usefixtures("worker")
def test_a_command_in_the_job_variables_of_a_run_is_not_started(
    project: Project, deployed: Deployed, tmp_path: Path
) -> None:
    from prefect.client.orchestration import get_client

    mark = tmp_path / "evil"
    variables = {"command": f"touch {mark}", "working_dir": str(tmp_path), "env": {"PYTHONPATH": str(tmp_path)}}
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(
            deployed.id, parameters={"config": CONFIG.model_dump(mode="json")}, job_variables=variables
        )
    assert project.ended(run.id)[0] == "COMPLETED"
    assert not mark.exists()


@pytest.mark.usefixtures("worker")
def test_a_run_that_is_cancelled_ends_and_is_not_started_again(project: Project, deployed: Deployed) -> None:
    config = SLOW.override({"name": "cancelled", "seed": 2})
    run = submit(deployed.name, config)
    until(lambda: project.states(run)[-1] == "RUNNING" and flow_run_processes(run), 480)
    cancel(run)
    until(lambda: project.states(run)[-1] == "CANCELLED" and not flow_run_processes(run), 240)
    time.sleep(8.0)  # longer than a worker's round
    assert project.states(run)[-1] == "CANCELLED"
    assert project.states(run).count("RUNNING") == 1


@pytest.mark.usefixtures("worker")
def test_a_run_by_schedule_starts_by_itself(project: Project) -> None:
    made = deploy(Choice(CONFIG, BASE), project.places, name="nightly", schedule="* * * * *")
    wanted = {"deployments": {"id": {"any_": [str(made.id)]}}}

    def completed() -> list[str]:
        found = project.ask("flow_runs/filter", **wanted)
        return [run["id"] for run in found if run["auto_scheduled"] and run["state_type"] == "COMPLETED"]

    assert until(completed, 480)
    deploy(Choice(CONFIG, BASE), project.places, name="nightly")
    assert project.ask(f"deployments/{made.id}")["schedules"] == [], "deployed again without one"


def test_another_type_of_pool_no_deployment_and_no_server_are_errors(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.ask("work_pools/", name="pods", type="kubernetes")
    with pytest.raises(
        ConfigError, match=r"--pool pods: expected a work pool of type process, found kubernetes; .*yaml"
    ):
        deploy(Choice(CONFIG, BASE), project.places, name="short", pool="pods")
    with pytest.raises(ConfigError, match="train/absent: no such deployment"):
        submit("train/absent", CONFIG)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:9/api does not answer"):
        deploy(Choice(CONFIG, BASE), Places.under(tmp_path), name="short")


def test_prefect_yaml_is_deployed_by_prefects_own_command(project: Project, tmp_path: Path) -> None:
    import subprocess
    import sys

    ensure_pool("cohort-local")
    project.ask("work_pools/", name="cohort-kubernetes", type="kubernetes")
    places = {
        "COHORT_ROOT": str(tmp_path),
        "COHORT_STORE": "s3://bucket/store",
        "COHORT_IMAGE": "registry.example/cohort:1",
    }
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[3], env=os.environ | places, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = project.ask("deployments/name/train/arithmetic-cpu-kubernetes")
    assert made["work_pool_name"] == "cohort-kubernetes"
    assert made["job_variables"]["image"] == "registry.example/cohort:1"
    assert made["job_variables"]["env"]["COHORT_STORE"] == "s3://bucket/store"
    assert project.ask("deployments/name/train/arithmetic-cpu")["parameters"]["config"]["rollout"]["G"] == 16
