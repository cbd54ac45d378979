"""An ablation on real workers of a real Prefect server: shared work, workers that are killed, no worker, an interruption."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
import pytest
import yaml
from rich.console import Console

from flows.cli import run_command
from flows.config import IterativeRLConfig
from flows.experiments.arms import plan
from flows.experiments.results import ExperimentResult, read_experiment
from flows.experiments.workers import _Board, _Submitted
from flows.runs.paths import Places
from flows.runs.record import read_records
from pipeline.experiment import Experiment
from pipeline.orchestration.server import stop_server
from pipeline.residency import evict
from pipeline.store import Store
from tests.flows.experiments.shared_prefix import MARK, TINY, marked
from tests.flows.logs import records_of
from tests.pipeline.processes import until

ROOT = Path(__file__).parents[3]
SMALL = TINY | {
    "arms": {"usual": {}, "faster": TINY["arms"]["faster"]},
    "common": TINY["common"] | {"iterations": 1, "steps": 4},
}
POOL = "h200"


class Machine:
    """One folder with store and server, and whatever processes a test starts on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file = root / "tiny.yaml"
        self.file.write_text(yaml.safe_dump(SMALL))
        self.mark = str(root)
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """A `cohort` command in a process group of its own."""
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *arguments, "--root", str(self.root)],
            cwd=ROOT,
            env=self.environment(),
            stdout=subprocess.PIPE if arguments[0] == "ablate" else subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def environment(self) -> dict[str, str]:
        """Without what this process, or the one that runs the tests, knows of Prefect and MLflow."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "COHORT", "MLFLOW"))
        }
        return kept | {
            MARK: self.mark,
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "PREFECT_HOME": str(self.root / "none"),
        }

    def worker(self) -> subprocess.Popen[str]:
        """A worker of the pool that takes one run at a time."""
        return self.start("worker", "--pool", POOL, "--limit", "1")

    def kill(self, process: subprocess.Popen[str], *, runs: bool = False) -> None:
        """The whole process group, at once; with `runs` whatever it started, in whichever group: as a host that dies."""
        started = psutil.Process(process.pid).children(recursive=True) if runs else []
        os.killpg(process.pid, signal.SIGKILL)
        for child in started:
            with contextlib.suppress(psutil.Error):
                child.kill()
        process.wait()

    def result(self) -> ExperimentResult:
        """Of the experiment."""
        result = read_experiment(self.root / "runs" / "tiny")
        assert result is not None
        return result

    def committed(self) -> int:
        """Stage calls in the store."""
        return len(list((self.root / "store" / "actions").glob("*/*.json")))

    def close(self) -> None:
        """End all that was started."""
        for process in self._started:
            if process.poll() is None:
                self.kill(process)
        stop_server(Places(self.root).prefect)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    place = Machine(tmp_path)
    yield place
    place.close()
    try:
        until(lambda: not marked(place.mark), 60)  # senders, and runs without their worker, end by themselves
    finally:
        for process in marked(place.mark):
            process.kill()


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """The experiment, run in this process."""
    place = Machine(tmp_path_factory.mktemp("golden"))
    assert run_command(["ablate", str(place.file), "--engine", "inline", "--root", str(place.root)]) == 0
    yield place
    evict()


def policies(result: ExperimentResult) -> dict[str, str]:
    return {run.name: run.policy for run in result.runs}


def contents(store: Store) -> dict[str, str]:
    """The content of every artifact by its name."""
    return {name: store.manifest(name)["digest"] for name in store.digests()}


def await_line(process: subprocess.Popen[str], text: str, seen: list[str]) -> None:
    """Read what a command prints until a line has `text`."""
    assert process.stdout
    while text not in (line := process.stdout.readline()):
        seen.append(line)
        assert line, "".join(seen)
    seen.append(line)


def await_commits(machine: Machine, count: int) -> None:
    until(lambda: machine.committed() >= count, 600)


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--workers", "h200", "--parallel", "2"], "--workers h200 and --parallel 2 are two ways"),
        (["--workers", "h200", "--engine", "inline"], "--workers needs Prefect's server"),
        (["--require-versions"], "--require-versions is asked of workers; give --workers POOL too"),
    ],
)
def test_options_that_contradict_workers_exit_with_2_and_write_nothing(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    assert run_command(["ablate", str(file), "--root", str(tmp_path), *arguments]) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


# ------------------------------------------------------------------------------------------------ what became of a run


class Server:
    """A Prefect server that answers each submission with the next of the states it is given."""

    def __init__(self, *states: tuple[str, str]) -> None:
        self.states = list(states)
        self.submitted: list[UUID] = []

    def submit(self, deployment: str, config: IterativeRLConfig, **_: Any) -> UUID:
        self.submitted.append(uuid4())
        return self.submitted[-1]

    def state_of(self, run: UUID) -> tuple[str, str]:
        assert run == self.submitted[-1]
        return self.states.pop(0)


def after(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch, *, submissions: int = 3) -> tuple[Any, str]:
    """One run, looked at until the server has said everything: the board, and what was printed."""
    for name in ("submit", "state_of"):
        monkeypatch.setattr(f"flows.experiments.workers.{name}", getattr(server, name))
    printed = io.StringIO()
    planned = plan(Experiment.parse(TINY, source="test"))
    board = _Board(planned, Places(root), POOL, Console(file=printed, width=300), submissions, "train/tiny")
    board.out.append(_Submitted(planned.chosen[0], board.submit(planned.chosen[0])))
    while server.states:
        board.look()
    return board, printed.getvalue()


def test_a_run_whose_worker_died_is_submitted_again_and_then_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(("RUNNING", ""), ("CRASHED", ""), ("RUNNING", ""), ("CRASHED", ""), ("CRASHED", "its host is gone"))
    board, printed = after(server, tmp_path, monkeypatch)
    assert len(server.submitted) == 3
    assert board.out == []
    assert board.errors == {"tiny-usual-s0": "crashed: its host is gone"}
    assert [line.split()[0] for line in printed.splitlines()] == ["started", "died", "started", "died", "failed"]
    assert "submitted again (3 of at most 3)" in printed


def test_a_run_that_fails_is_not_submitted_again_and_its_error_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(("RUNNING", ""), ("FAILED", "VersionsError: torch: expected 2.13.0, found 2.12.0"))
    board, printed = after(server, tmp_path, monkeypatch)
    assert len(server.submitted) == 1
    assert board.errors == {"tiny-usual-s0": "failed: VersionsError: torch: expected 2.13.0, found 2.12.0"}
    assert "expected 2.13.0, found 2.12.0" in printed


def test_a_run_finished_in_another_root_is_an_error_without_a_shared_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COHORT_STORE", raising=False)
    board, _ = after(Server(("COMPLETED", "")), tmp_path, monkeypatch)
    assert "under another root" in board.errors["tiny-usual-s0"]
    monkeypatch.setenv("COHORT_STORE", "s3://bucket/cohort")
    board, _ = after(Server(("COMPLETED", "")), tmp_path, monkeypatch)
    assert (board.errors, board.out) == ({}, [])


# ------------------------------------------------------------------------------------------------ workers


@pytest.mark.scale
def test_killed_workers_cost_the_stage_in_flight_and_results_stay_the_same(golden: Machine, machine: Machine) -> None:
    """A mistyped pool is refused and a pool without workers called out on the way."""
    chance, said, calls = random.Random(3), [], golden.committed()
    first = machine.worker()
    await_pool(machine)
    typo = machine.start("ablate", str(machine.file), "--workers", "h2OO")
    out, _ = typo.communicate(timeout=300)
    assert typo.returncode == 2, out
    assert "--workers h2OO: no such work pool" in " ".join(out.split())
    machine.kill(first)

    ablation = machine.start("ablate", str(machine.file), "--workers", POOL)
    await_line(ablation, f"no worker serves the pool {POOL}", said)
    await_line(ablation, f"cohort worker --pool {POOL} --root", said)
    workers = [machine.worker(), machine.worker()]
    for count in (3, calls // 2, calls - 5):
        await_commits(machine, count)
        time.sleep(chance.random() * 0.5)
        place = chance.randrange(2)
        machine.kill(workers[place], runs=count > 3)  # after the first, the run is killed with its worker
        workers[place] = machine.worker()
    rest, _ = ablation.communicate(timeout=600)
    out = "".join(said) + rest
    assert ablation.returncode == 0, out
    assert "submitted again (2 of at most" in out
    last = [record.attempts[-1] for record in read_records(Places(machine.root))]
    assert [(one.start.engine, one.executed) for one in last] == [("inline", 0)] * 2  # this command itself only read

    assert policies(machine.result()) == policies(golden.result())
    assert {run.status for run in machine.result().runs} == {"finished"}
    store = Store(machine.root / "store")
    assert contents(store) == contents(Store(golden.root / "store"))
    assert {record["key"] for record in store.actions()} == {r["key"] for r in Store(golden.root / "store").actions()}
    assert run_command(["verify", "--root", str(machine.root)]) == 0
    (run,) = [run for run in machine.result().runs if run.arm == "faster"]
    logged = records_of(machine.root, f"runs/{run.folder}")[0]
    assert (logged["tags"]["arm"], logged["tags"]["cohort.parent_key"]) == ("faster", "tiny")
    assert logged["params"]["diff.update.training.optimizer.learning_rate"] == "0.01"


@pytest.mark.scale
def test_an_interruption_cancels_the_runs_and_workers_go_on(machine: Machine) -> None:
    worker, said = machine.worker(), list[str]()
    await_pool(machine)
    ablation = machine.start("ablate", str(machine.file), "--workers", POOL)
    await_line(ablation, "started", said)
    await_commits(machine, 1)
    ablation.send_signal(signal.SIGINT)
    out, _ = ablation.communicate(timeout=120)
    assert ablation.returncode == 130, "".join(said) + out
    assert "cancelling" in out
    assert f"--workers {POOL}" in out  # the command that continues
    records = functools.partial(read_records, Places(machine.root))
    until(lambda: all(record.attempts[-1].outcome() != "running" for record in records()), 60)
    assert worker.poll() is None


def await_pool(machine: Machine) -> None:
    """Until the worker made the pool: a command that names it before is refused."""
    until((machine.root / "prefect" / "server.json").exists, 300)
    probe = [sys.executable, "-c", PROBE, str(machine.root), POOL]
    until(lambda: subprocess.run(probe, env=machine.environment(), cwd=ROOT, timeout=300).returncode == 0, 300)


PROBE = (
    "import sys; from pathlib import Path; from pipeline.orchestration.server import ensure_server"
    "; from flows.deploying.pool import *\n"
    "ensure_server(Path(sys.argv[1]) / 'prefect')\n"
    "try: require_pool(sys.argv[2])\n"
    "except Exception: sys.exit(1)\n"
)
