"""MLflow as a projection, against a real sqlite database and real sending processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.runs.record import read_record
from flows.tracking import delivery
from flows.tracking.delivery import tracked_study
from flows.tracking.sender import Sender, start_sender, sync
from pipeline.event_log import LOG, EventLog, read_events
from pipeline.events import Logged, RunStarted
from pipeline.tracking.database import adopt, connect, tracking_uri
from pipeline.tracking.records import Record, Sent, alias, dataset, figure, model, note, point, table
from tests.flows.logs import records_of
from tests.pipeline.processes import until

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow
"""A database that MLflow makes, and processes that import it: half a minute."""
CONFIG = {"rollout": {"G": 8, "stops": [1, 2]}, "lr": 3e-4, "name": "demo"}


@pytest.fixture(scope="module")
def home(sender: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One database and, by a run that lives as long as the module, one sending process: each costs seconds to start."""
    folder = tmp_path_factory.mktemp("artifacts")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with tracked(folder, "anchor"):
            yield folder


@pytest.fixture(autouse=True)
def _own_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def steps(log: Callable[[Record], None], *numbers: int) -> None:
    for number in numbers:
        log(point(number, {"reward/mean": number / 10, "policy/kl": 0.5}))


def run_of(home: Path, key: str) -> Any:
    """The one run of a key, once everything in its log has arrived."""
    folder = home / "tracking" / key
    until(lambda: Sent.read(folder).size >= (folder / LOG).stat().st_size, 120)
    client = connect(tracking_uri(home))
    found = client.get_experiment_by_name("study")
    runs = client.search_runs([found.experiment_id], filter_string=f"tags.`cohort.run_key` = '{key}'")
    assert len(runs) == 1
    return runs[0]


def points(home: Path, key: str, metric: str) -> list[tuple[int, float]]:
    client = connect(tracking_uri(home))
    history = client.get_metric_history(run_of(home, key).info.run_id, metric)
    return sorted((point.step, point.value) for point in history)


def tracked(home: Path, key: str, config: dict[str, Any] = CONFIG) -> Any:
    return tracked_study(home, experiment="study", name="grpo-s0", key=key, config=config)


def test_a_finished_run_has_its_points_parameters_note_table_and_status(home: Path, tmp_path: Path) -> None:
    picture = tmp_path / "curve.png"
    picture.write_bytes(b"png")
    before = time.time()
    with tracked(home, "whole") as log:
        began = time.time()
        steps(log, 1, 2, 3)
        log(point(3, {"eval/greedy": 0.5, "odd": float("inf"), "nan": float("nan"), "none": None}))
        log(table("samples", [{"question": "1+1", "reward": float("nan")}, {"question": "1+2", "reward": 1.0}]))
        log(figure(picture))
        log(note("# What happened"))
        log(point(3, {"final/greedy": 0.5}))
    run = run_of(home, "whole")
    assert int(before * 1000) <= run.info.start_time <= int(began * 1000)  # not when it was sent
    assert run.info.end_time >= run.info.start_time
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "grpo-s0"
    assert run.data.params == {"rollout.G": "8", "rollout.stops": "[1, 2]", "lr": "0.0003", "name": "demo"}
    assert run.data.metrics == {"reward/mean": 0.3, "policy/kl": 0.5, "eval/greedy": 0.5, "final/greedy": 0.5}
    assert run.data.tags["mlflow.note.content"] == "# What happened"
    assert points(home, "whole", "reward/mean") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert points(home, "whole", "final/greedy") == [(3, 0.5)]
    folder = home / "mlruns" / run.info.run_id / "artifacts"
    assert (folder / "figures" / "curve.png").read_bytes() == b"png"
    assert json.loads((folder / "samples.json").read_text()) == {
        "columns": ["question", "reward"],
        "data": [["1+1", None], ["1+2", 1.0]],
    }


def test_runs_of_an_experiment_are_not_nested(home: Path) -> None:
    """MLflow shows one row and no chart of runs that stand under another until somebody unfolds them."""
    with tracked_study(home, experiment="study", name="arm", key="arm", config={}, tags={"cohort.parent_key": "all"}):
        pass
    tags = run_of(home, "arm").data.tags
    assert tags["cohort.parent_key"] == "all"
    assert "mlflow.parentRunId" not in tags


# ------------------------------------------------------------------------------------- models and data by digest


def policy(digest: str, **tags: str) -> Record:
    return model("policy", digest * 32, 4, {"run": "grpo-s0", "seed": "0", **tags})


def versions(home: Path, digest: str) -> list[Any]:
    found = connect(tracking_uri(home)).search_model_versions(f"name = 'policy' and tags.digest = '{digest * 32}'")
    return [connect(tracking_uri(home)).get_model_version("policy", version.version) for version in found]


def outputs(home: Path, key: str) -> list[tuple[str, int]]:
    run = connect(tracking_uri(home)).get_run(run_of(home, key).info.run_id)
    return [(output.model_id, output.step) for output in run.outputs.model_outputs]


def test_a_model_of_two_runs_is_one_version_and_an_output_of_both(home: Path) -> None:
    for key in ("one", "two", "one"):
        with tracked(home, key) as log:
            log(policy("ab", arm="usual"))
        run_of(home, key)  # sent
    (version,) = versions(home, "ab")
    assert version.source == f"cohort:///objects/ab/{'ab' * 32}"
    assert version.run_id == run_of(home, "one").info.run_id
    assert {name: version.tags[name] for name in ("arm", "seed", "step")} == {"arm": "usual", "seed": "0", "step": "4"}
    assert outputs(home, "one") == outputs(home, "two") == [(version.tags["cohort.logged_model"], 4)]
    (logged,) = [record for record in records_of(home, "tracking/one") if record["kind"] == "model"]
    assert logged.items() >= policy("ab", arm="usual").items()
    assert list((home / "mlruns").rglob("*.pkl")) == []


def test_an_alias_names_the_version_also_where_it_is_sent_before_the_run(home: Path) -> None:
    with tracked(home, "all") as log:
        log(alias("best-x.y", policy("c1"), run="arm-c1", run_name="arm-c1", began=1.5))
    run_of(home, "all")
    with tracked(home, "arm-c1") as log:
        log(policy("c1"))
    run = run_of(home, "arm-c1")
    (version,) = versions(home, "c1")
    assert version.aliases == ["best-x-y"]  # a dot is not MLflow's
    assert version.run_id == run.info.run_id
    assert run.info.start_time == 1500


def test_a_rebuilt_run_has_its_model_once_with_the_alias_that_a_person_gave(home: Path) -> None:
    with tracked(home, "rebuilt") as log:
        log(policy("de"))
    run_of(home, "rebuilt")
    (old,) = versions(home, "de")
    client = connect(tracking_uri(home))
    client.set_registered_model_alias("policy", "champion", old.version)
    sender = Sender(home, tracking_uri(home))
    sender.delete(home / "tracking" / "rebuilt")
    assert sender.project(home / "tracking" / "rebuilt") == ""
    (version,) = versions(home, "de")
    assert version.version != old.version
    assert version.aliases == ["champion"]
    assert outputs(home, "rebuilt") == [(version.tags["cohort.logged_model"], 4)]


def test_data_sets_are_inputs_of_a_run_once_by_digest(home: Path) -> None:
    with tracked(home, "data") as log:
        log(dataset("in_domain", "ef" * 32, context="evaluation", rows=256))
    run_of(home, "data")
    (home / "tracking" / "data" / ".mlflow.json").unlink()
    assert Sender(home, tracking_uri(home)).project(home / "tracking" / "data") == ""
    run = connect(tracking_uri(home)).get_run(run_of(home, "data").info.run_id)
    (held_out,) = run.inputs.dataset_inputs
    assert (held_out.dataset.name, held_out.dataset.digest) == ("in_domain", "ef" * 18)
    assert json.loads(held_out.dataset.source) == {"uri": f"cohort:///objects/ef/{'ef' * 32}"}
    assert json.loads(held_out.dataset.profile) == {"num_rows": 256}
    assert [(tag.key, tag.value) for tag in held_out.tags] == [("mlflow.data.context", "evaluation")]


@pytest.mark.claim("MLflow that stops training")
def test_a_resumed_run_continues_the_same_run_without_a_repeated_point(home: Path) -> None:
    def fail_after_two_steps() -> None:
        with tracked(home, "resumed") as log:
            steps(log, 1, 2)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail_after_two_steps()
    first = run_of(home, "resumed")
    assert first.info.status == "FAILED"
    assert first.data.tags["cohort.status_reason"] == "RuntimeError: out of memory"
    with tracked(home, "resumed") as log:
        steps(log, 1, 2, 3)
    assert run_of(home, "resumed").info.run_id == first.info.run_id
    assert run_of(home, "resumed").info.status == "FINISHED"
    assert points(home, "resumed", "reward/mean") == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_points_sent_but_not_noted_as_sent_are_not_sent_twice(home: Path) -> None:
    with tracked(home, "forgotten") as log:
        steps(log, 1, 2)
    (home / "tracking" / "forgotten" / ".mlflow.json").unlink()
    report = sync(home)
    assert report.errors == {}
    assert points(home, "forgotten", "policy/kl") == [(1, 0.5), (2, 0.5)]


def test_a_fully_repeated_run_sends_nothing_and_starts_no_process(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(text: str) -> list[str]:
        with tracked(home, "cached") as log:
            steps(log, 1, 2)
            log(note(text))
        return [type(event).__name__ for event in read_events(home / "tracking" / "cached" / LOG)]

    written = once("note")
    assert written == ["RunStarted", "Logged", "Logged", "Logged", "RunEnded"]
    run_of(home, "cached")  # sent
    started: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(delivery, "start_sender", started.append)
        assert once("note") == [*written, "RunStarted", "RunEnded"]
    assert started == []
    assert once("another note")[7:] == ["RunStarted", "Logged", "RunEnded"]
    assert run_of(home, "cached").info.status == "FINISHED"
    assert run_of(home, "cached").data.tags["mlflow.note.content"] == "another note"


def senders(home: Path) -> set[int]:
    """Processes of this one that send for a project."""
    own = psutil.Process().children()
    return {child.pid for child in own if child.status() != psutil.STATUS_ZOMBIE and str(home) in child.cmdline()}


def test_a_sender_that_lives_is_not_started_again_and_a_dead_one_is(home: Path) -> None:
    with tracked(home, "first") as log:
        steps(log, 1)
        living = senders(home)
        start_sender(home)
        assert len(living) == 1
        assert senders(home) == living
        (process,) = (psutil.Process(pid) for pid in living)
        process.kill()
        process.wait()
        steps(log, 2)
    assert points(home, "first", "policy/kl") == [(1, 0.5), (2, 0.5)]
    assert len(senders(home) - living) == 1


def test_changed_parameters_are_reported_and_the_first_ones_kept(home: Path) -> None:
    with tracked(home, "drift"):
        pass
    with (
        pytest.warns(UserWarning, match="rollout.G: 8 -> 16"),
        tracked(home, "drift", {"rollout": {"G": 16}, "new": 1}),
    ):
        pass
    run = run_of(home, "drift")
    assert run.data.params["rollout.G"] == "8"
    assert run.data.params["new"] == "1"
    assert run.data.tags["cohort.drift"] == "rollout.G: 8 -> 16"


def test_a_killed_process_leaves_a_killed_run_with_its_points(home: Path) -> None:
    code = f"""
        import time; from pathlib import Path
        from flows.tracking.delivery import tracked_study; from pipeline.tracking.records import point
        with tracked_study(Path({str(home)!r}), experiment="study", name="r", key="killed", config={{}}) as log:
            log(point(1, {{"a": 1.0}})); print("ready", flush=True); time.sleep(60)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    folder = home / "tracking" / "killed"
    record = read_record(folder)
    assert record is not None
    assert record.lives
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not record.lives
    until(lambda: Sent.read(folder).status == "KILLED", 60)
    assert run_of(home, "killed").info.status == "KILLED"
    assert points(home, "killed", "a") == [(1, 1.0)]


def test_ctrl_c_marks_the_run_killed(home: Path) -> None:
    with pytest.raises(KeyboardInterrupt), tracked(home, "stopped"):
        raise KeyboardInterrupt
    assert run_of(home, "stopped").info.status == "KILLED"


@pytest.mark.claim("MLflow that stops training")
@pytest.mark.slow
def test_an_unreachable_server_does_not_raise_and_sync_sends_all_later(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    run = tracked(home, "unreachable")
    log = run.__enter__()
    for number in range(100):
        log(point(number, {f"key/{i}": 1.0 for i in range(40)}))
    with pytest.warns(UserWarning, match=r"Nothing is lost.*cohort mlflow sync"):
        run.__exit__(None, None, None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert sync(home).errors == {}
    assert len(points(home, "unreachable", "key/39")) == 100
    assert run_of(home, "unreachable").info.status == "FINISHED"


def test_sync_makes_a_run_from_a_log_alone_and_again_for_another_database(home: Path) -> None:
    folder = home / "tracking" / "alone"
    folder.mkdir()
    log = EventLog(folder)
    log.append(RunStarted("r", "study", 0, 0, "", "", socket.gethostname(), 2**30, "gone"))
    for step in (1, 2):
        log.append(Logged("step", str(step), {"step": step, "metrics": {"reward/mean": step / 10}}))
    for _ in range(2):
        assert sync(home).errors == {}
        assert points(home, "alone", "reward/mean") == [(1, 0.1), (2, 0.2)]
        assert run_of(home, "alone").info.status == "KILLED"  # it has no end and no living process
        sent = Sent.read(folder)
        assert (sent.number, sent.size) == (3, log.file.stat().st_size)
        dataclasses.replace(sent, database=sent.database + 1).write(folder)


def test_a_copied_project_keeps_its_tables_in_its_own_folder(home: Path, tmp_path: Path) -> None:
    with tracked(home, "copied") as log:
        steps(log, 1)
        log(table("completions", [{"answer": "7"}]))
    run = run_of(home, "copied").info
    copy = tmp_path / "copy of it"
    shutil.copytree(home, copy, ignore=shutil.ignore_patterns("*.lock", "*-wal", "*-shm"))
    before = {file: file.stat().st_mtime_ns for file in (home / "mlruns").rglob("*") if file.is_file()}
    with tracked(copy, "copied") as log:
        log(table("completions", [{"answer": "8"}]))
    assert sync(copy).errors == {}
    found = connect(tracking_uri(copy)).get_run(run.run_id).info
    assert found.artifact_uri == f"{(copy / 'mlruns').as_uri()}/{run.run_id}/artifacts"
    assert "8" in (copy / "mlruns" / run.run_id / "artifacts" / "completions.json").read_text()
    assert {file: file.stat().st_mtime_ns for file in before} == before, "the original's were written"
    assert connect(tracking_uri(home)).get_run(run.run_id).info.artifact_uri == run.artifact_uri


def test_a_database_whose_artifacts_lie_elsewhere_on_purpose_is_unchanged(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE experiments (artifact_location TEXT)")
        connection.execute("CREATE TABLE runs (run_uuid TEXT, artifact_uri TEXT)")
        connection.execute("INSERT INTO experiments VALUES ('file:///shared/mlruns')")
        connection.execute("INSERT INTO runs VALUES ('ab', 'file:///shared/mlruns/ab/artifacts')")
    assert adopt(database, tmp_path) == 0
    assert adopt(tmp_path / "another.db", tmp_path) == 0


@pytest.fixture(autouse=True)
def _no_unexpected_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(is left out|did not take).*")
        yield
