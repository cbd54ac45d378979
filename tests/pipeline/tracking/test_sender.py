"""MLflow as a projection, against a real sqlite database and real sending processes."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking import Tracker, sync, track, tracked_models
from pipeline.tracking.database import adopt, connect, tracking_uri
from pipeline.tracking.journal import Journal, Sent, is_live, read_records
from pipeline.tracking.registry import TrackedModel
from pipeline.tracking.sender import Sender

ROOT = Path(__file__).parents[3]
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


def steps(tracker: Tracker, *numbers: int) -> None:
    for number in numbers:
        tracker.log_step(number, {"reward/mean": number / 10, "policy/kl": 0.5})


def run_of(home: Path, key: str) -> Any:
    """The one run of a key, once everything in its journal has arrived."""
    journal = home / "tracking" / "study" / f"{key}.jsonl"
    deadline = time.monotonic() + 120
    while Sent.read(journal).offset < journal.stat().st_size and time.monotonic() < deadline:
        time.sleep(0.05)
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
    return track(home, experiment="study", run_name="grpo-s0", run_key=key, config=config)


def test_a_finished_run_has_its_points_parameters_note_table_and_status(home: Path, tmp_path: Path) -> None:
    picture = tmp_path / "curve.png"
    picture.write_bytes(b"png")
    with tracked(home, "whole") as tracker:
        steps(tracker, 1, 2, 3)
        tracker.log_step(3, {"eval/greedy": 0.5, "odd": float("inf"), "nan": float("nan"), "none": None})
        tracker.log_table("samples", [{"question": "1+1", "reward": float("nan")}, {"question": "1+2", "reward": 1.0}])
        tracker.log_figure(picture)
        tracker.set_note("# What happened")
        tracker.log_summary({"final/greedy": 0.5})
    run = run_of(home, "whole")
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


def test_a_run_began_when_its_process_told_of_it_not_when_it_was_sent(home: Path) -> None:
    before = time.time()
    with tracked(home, "began"):
        began = time.time()
    info = run_of(home, "began").info
    assert int(before * 1000) <= info.start_time <= int(began * 1000)
    assert info.end_time >= info.start_time


def test_runs_of_an_experiment_stand_side_by_side(home: Path) -> None:
    """MLflow shows one row and no chart of runs that stand under another until somebody unfolds them."""
    with track(home, experiment="study", run_name="arm", run_key="arm", config={}, tags={"cohort.parent_key": "all"}):
        pass
    tags = run_of(home, "arm").data.tags
    assert tags["cohort.parent_key"] == "all"
    assert "mlflow.parentRunId" not in tags


# ------------------------------------------------------------------------------------- models and data by digest


def model(digest: str, **tags: str) -> TrackedModel:
    return TrackedModel("policy", digest * 32, 4, {"run": "grpo-s0", "seed": "0", **tags})


def versions(home: Path, digest: str) -> list[Any]:
    found = connect(tracking_uri(home)).search_model_versions(f"name = 'policy' and tags.digest = '{digest * 32}'")
    return [connect(tracking_uri(home)).get_model_version("policy", version.version) for version in found]


def outputs(home: Path, key: str) -> list[tuple[str, int]]:
    run = connect(tracking_uri(home)).get_run(run_of(home, key).info.run_id)
    return [(output.model_id, output.step) for output in run.outputs.model_outputs]


def test_a_model_of_two_runs_is_one_version_that_refers_to_the_store_and_an_output_of_both(home: Path) -> None:
    for key in ("one", "two", "one"):
        with tracked(home, key) as tracker:
            tracker.log_model(model("ab", arm="usual"))
        run_of(home, key)  # sent
    (version,) = versions(home, "ab")
    assert version.source == f"cohort:///objects/ab/{'ab' * 32}"
    assert version.run_id == run_of(home, "one").info.run_id
    assert {name: version.tags[name] for name in ("arm", "seed", "step")} == {"arm": "usual", "seed": "0", "step": "4"}
    assert outputs(home, "one") == outputs(home, "two") == [(version.tags["cohort.logged_model"], 4)]
    assert tracked_models(home, "study", "one") == [model("ab", arm="usual")]
    assert list((home / "mlruns").rglob("*.pkl")) == []


def test_an_alias_names_the_version_also_where_its_journal_is_sent_before_that_of_the_run(home: Path) -> None:
    with tracked(home, "all") as tracker:
        tracker.set_alias("best-x.y", model("c1"), run_name="arm-c1", run_key="arm-c1")
    run_of(home, "all")
    with tracked(home, "arm-c1") as tracker:
        tracker.log_model(model("c1"))
    run = run_of(home, "arm-c1")
    (version,) = versions(home, "c1")
    assert version.aliases == ["best-x-y"]  # a dot is not MLflow's
    assert version.run_id == run.info.run_id


def test_a_rebuilt_run_has_its_model_once_with_the_alias_that_a_person_gave(home: Path) -> None:
    with tracked(home, "rebuilt") as tracker:
        tracker.log_model(model("de"))
    run_of(home, "rebuilt")
    (old,) = versions(home, "de")
    client = connect(tracking_uri(home))
    client.set_registered_model_alias("policy", "champion", old.version)
    journal = home / "tracking" / "study" / "rebuilt.jsonl"
    sender = Sender(home, tracking_uri(home))
    sender.delete(journal)
    assert sender.project(journal) == ""
    (version,) = versions(home, "de")
    assert version.version != old.version
    assert version.aliases == ["champion"]
    assert outputs(home, "rebuilt") == [(version.tags["cohort.logged_model"], 4)]


def test_data_sets_are_inputs_of_a_run_once_by_digest(home: Path) -> None:
    with tracked(home, "data") as tracker:
        tracker.log_dataset("in_domain", "ef" * 32, context="evaluation", rows=256)
    run_of(home, "data")
    journal = home / "tracking" / "study" / "data.jsonl"
    journal.with_suffix(".sent.json").unlink()
    assert Sender(home, tracking_uri(home)).project(journal) == ""
    run = connect(tracking_uri(home)).get_run(run_of(home, "data").info.run_id)
    (held_out,) = run.inputs.dataset_inputs
    assert (held_out.dataset.name, held_out.dataset.digest) == ("in_domain", "ef" * 18)
    assert json.loads(held_out.dataset.source) == {"uri": f"cohort:///objects/ef/{'ef' * 32}"}
    assert json.loads(held_out.dataset.profile) == {"num_rows": 256}
    assert [(tag.key, tag.value) for tag in held_out.tags] == [("mlflow.data.context", "evaluation")]


@pytest.mark.claim("MLflow that stops training")
def test_a_resumed_run_continues_the_same_run_without_a_repeated_point(home: Path) -> None:
    def fail_after_two_steps() -> None:
        with tracked(home, "resumed") as tracker:
            steps(tracker, 1, 2)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail_after_two_steps()
    first = run_of(home, "resumed")
    assert first.info.status == "FAILED"
    assert first.data.tags["cohort.status_reason"] == "RuntimeError: out of memory"
    with tracked(home, "resumed") as tracker:
        steps(tracker, 1, 2, 3)
    assert run_of(home, "resumed").info.run_id == first.info.run_id
    assert run_of(home, "resumed").info.status == "FINISHED"
    assert points(home, "resumed", "reward/mean") == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_points_sent_but_not_noted_as_sent_are_not_sent_twice(home: Path) -> None:
    with tracked(home, "forgotten") as tracker:
        steps(tracker, 1, 2)
    journal = home / "tracking" / "study" / "forgotten.jsonl"
    journal.with_suffix(".sent.json").unlink()
    report = sync(home)
    assert report.errors == {}
    assert points(home, "forgotten", "policy/kl") == [(1, 0.5), (2, 0.5)]


def test_a_fully_repeated_run_writes_nothing_and_starts_no_process(home: Path) -> None:
    for repetition in range(2):
        with tracked(home, "cached") as tracker:
            steps(tracker, 1, 2)
            tracker.log_summary({"final/greedy": 1.0})
            tracker.set_note("note")
            assert tracker._wrote == (repetition == 0)
    journal = home / "tracking" / "study" / "cached.jsonl"
    written = "run start step step step tags end"
    assert [record["kind"] for record in read_records(journal, 0)[0]] == written.split()
    with tracked(home, "cached") as tracker:
        tracker.set_note("another note")
    assert [record["kind"] for record in read_records(journal, 0)[0]] == [*written.split(), "tags"]
    assert run_of(home, "cached").info.status == "FINISHED"
    assert run_of(home, "cached").data.tags["mlflow.note.content"] == "another note"


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
        import time; from pathlib import Path; from pipeline.tracking import track
        with track(Path({str(home)!r}), experiment="study", run_name="r", run_key="killed", config={{}}) as tracker:
            tracker.log_step(1, {{"a": 1.0}}); print("ready", flush=True); time.sleep(60)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    journal = home / "tracking" / "study" / "killed.jsonl"
    assert is_live(journal)
    with pytest.warns(UserWarning, match="another living process records this run"), tracked(home, "killed") as second:
        second.log_step(2, {"a": 2.0})
    child.send_signal(signal.SIGKILL)
    child.communicate()
    deadline = time.monotonic() + 60
    while Sent.read(journal).status != "KILLED" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert run_of(home, "killed").info.status == "KILLED"
    assert points(home, "killed", "a") == [(1, 1.0)]


def test_ctrl_c_marks_the_run_killed(home: Path) -> None:
    with pytest.raises(KeyboardInterrupt), tracked(home, "stopped"):
        raise KeyboardInterrupt
    assert run_of(home, "stopped").info.status == "KILLED"


@pytest.mark.claim("MLflow that stops training")
@pytest.mark.slow
def test_an_unreachable_server_neither_raises_nor_delays_and_sync_sends_all_later(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    run = tracked(home, "unreachable")
    tracker = run.__enter__()
    started = time.perf_counter()
    for number in range(100):
        tracker.log_step(number, {f"key/{i}": 1.0 for i in range(40)})
    assert time.perf_counter() - started < 1.5
    with pytest.warns(UserWarning, match=r"Nothing is lost.*cohort mlflow sync"):
        run.__exit__(None, None, None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert sync(home).errors == {}
    assert len(points(home, "unreachable", "key/39")) == 100
    assert run_of(home, "unreachable").info.status == "FINISHED"


def test_sync_makes_a_run_from_a_journal_alone_and_again_for_another_database(home: Path) -> None:
    path = home / "tracking" / "study" / "alone.jsonl"
    journal = Journal(path)
    journal.append({"kind": "run", "experiment": "study", "name": "r", "key": "alone", "params": {}, "tags": {}})
    for step in (1, 2):
        journal.append({"kind": "step", "step": step, "time": 1.0, "metrics": {"reward/mean": step / 10}})
    journal.close()
    for _ in range(2):
        assert sync(home).errors == {}
        assert points(home, "alone", "reward/mean") == [(1, 0.1), (2, 0.2)]
        assert run_of(home, "alone").info.status == "KILLED"  # it has no end and no living process
        sent = Sent.read(path)
        assert sent.offset == path.stat().st_size
        Sent(sent.uri, database=sent.database + 1, offset=sent.offset, status="KILLED").write(path)


def test_a_copied_project_keeps_its_tables_in_its_own_folder(home: Path, tmp_path: Path) -> None:
    with tracked(home, "copied") as tracker:
        steps(tracker, 1)
        tracker.log_table("completions", [{"answer": "7"}])
    run = run_of(home, "copied").info
    copy = tmp_path / "copy of it"
    shutil.copytree(home, copy, ignore=shutil.ignore_patterns("*.lock", "*-wal", "*-shm"))
    before = {file: file.stat().st_mtime_ns for file in (home / "mlruns").rglob("*") if file.is_file()}
    with tracked(copy, "copied") as tracker:
        tracker.log_table("completions", [{"answer": "8"}])
    assert sync(copy).errors == {}
    found = connect(tracking_uri(copy)).get_run(run.run_id).info
    assert found.artifact_uri == f"{(copy / 'mlruns').as_uri()}/{run.run_id}/artifacts"
    assert "8" in (copy / "mlruns" / run.run_id / "artifacts" / "completions.json").read_text()
    assert {file: file.stat().st_mtime_ns for file in before} == before, "the original's were written"
    assert connect(tracking_uri(home)).get_run(run.run_id).info.artifact_uri == run.artifact_uri


def test_a_database_whose_artifacts_lie_elsewhere_by_intention_is_left_alone(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE experiments (artifact_location TEXT)")
        connection.execute("CREATE TABLE runs (run_uuid TEXT, artifact_uri TEXT)")
        connection.execute("INSERT INTO experiments VALUES ('file:///shared/mlruns')")
        connection.execute("INSERT INTO runs VALUES ('ab', 'file:///shared/mlruns/ab/artifacts')")
    assert adopt(database, tmp_path) == 0
    assert adopt(tmp_path / "another.db", tmp_path) == 0


def test_a_torn_last_line_is_cut_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "study" / "torn.jsonl"
    journal = Journal(path)
    journal.append({"kind": "step", "step": 1, "time": 1.0, "metrics": {"a": 1.0}})
    journal.close()
    with open(path, "ab") as file:
        file.write(b'{"kind": "step", "st')
    journal = Journal(path)
    assert journal.last_step == {"a": 1}
    assert journal.append({"kind": "step", "step": 2, "time": 2.0, "metrics": {"a": 2.0}})
    journal.close()
    assert [record["kind"] for record in read_records(path, 0)[0]] == ["start", "step", "step"]


def test_a_metric_name_that_mlflow_refuses_is_left_out_with_a_warning(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "study" / "names.jsonl")
    tracker = Tracker(tmp_path, journal)
    tracker._wrote = True
    with pytest.warns(UserWarning, match="pass@1"):
        tracker.log_step(1, {"pass@1": 0.5, "pass_at_1": 0.5})
    assert journal.last_step == {"pass_at_1": 1}
    journal.close()


def test_importing_tracking_imports_no_mlflow_and_takes_milliseconds() -> None:
    code = "import sys, pipeline.tracking; print([m for m in ('mlflow', 'prefect', 'torch', 'sqlalchemy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(autouse=True)
def _no_unexpected_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(not tracked|did not take).*")
        yield
