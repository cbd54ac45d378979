"""Whole runs with Prefect and MLflow in a real PostgreSQL, addressed by URL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from flows.runs.paths import Places
from flows.runs.record import read_records
from pipeline.orchestration.server import stop_server
from pipeline.tracking.database import connect
from tests.flows.short_runs import options
from tests.pipeline.postgres import PASSWORD, Postgres, gives_away, postgres

ROOT = Path(__file__).parents[2]
TINY = ["iterations=1", "steps=1", "sft.max_steps=2", "sft.decay_steps=1", "evaluation.every=0", "evaluation.samples=0"]
OURS = ("PREFECT", "COHORT", "MLFLOW")


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres() as running:
        running.create("prefect")
        running.create("mlflow")
        yield running


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    yield folder
    stop_server(folder / "prefect")


def settings(database: Postgres, root: Path) -> dict[str, str]:
    """The environment of a command that keeps everything in PostgreSQL."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return kept | {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database.url("prefect", driver="postgresql+asyncpg"),
        "MLFLOW_TRACKING_URI": database.url("mlflow"),
        "PREFECT_HOME": str(root / "none"),
        "OMP_NUM_THREADS": "1",
    }


def start(root: Path, environment: Mapping[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments, "--root", str(root)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(root: Path, environment: Mapping[str, str], seed: int) -> subprocess.Popen[str]:
    overrides = options([*TINY, f"seed={seed}", f"name=s{seed}"])
    return start(root, environment, "run", "arithmetic_smoke", *overrides)


def ended(process: subprocess.Popen[str]) -> str:
    try:
        out, _ = process.communicate(timeout=500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return out


@pytest.mark.scale
def test_runs_are_in_both_databases_and_no_file_has_the_password(database: Postgres, root: Path) -> None:
    environment = settings(database, root)
    said = [ended(run(root, environment, 0))]
    said += [ended(process) for process in [run(root, environment, 1), run(root, environment, 2)]]
    assert [record.attempts[-1].status for record in read_records(Places(root))] == ["finished"] * 3, "\n".join(said)

    assert sorted(database.run("SELECT state_type, count(*) FROM flow_run GROUP BY 1", "prefect")) == [("COMPLETED", 3)]
    assert not (root / "prefect" / "prefect.db").exists()
    assert not (root / "mlflow.db").exists()
    synced = start(root, environment, "mlflow", "sync")
    assert "3 runs complete in MLflow" in ended(synced)
    client = connect(database.url("mlflow"))
    (study,) = [one for one in client.search_experiments() if one.name != "Default"]
    found = client.search_runs([study.experiment_id])
    assert sorted((one.info.run_name, one.info.status) for one in found) == [(f"s{n}", "FINISHED") for n in range(3)]
    assert gives_away(root) == []
    assert [text for text in said if PASSWORD in text] == []


@pytest.mark.scale
def test_the_user_interface_of_a_database_has_no_password_in_its_arguments(database: Postgres, root: Path) -> None:
    environment, said = settings(database, root), list[str]()
    process = start(root, environment, "ui", "--port", "0")
    assert process.stdout
    while "Ctrl-C" not in (line := process.stdout.readline()):
        said.append(line)
        assert line, "".join(said)
    assert any("http://127.0.0.1:" in line for line in said if "MLflow" in line), "".join(said)
    # Not by `ps`: it cuts a line at COLUMNS, and a password behind the cut would not be seen.
    arguments = "\n".join(" ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"]))
    assert "guarded_server.py mlflow" in arguments
    assert PASSWORD not in arguments
    process.send_signal(signal.SIGINT)
    assert PASSWORD not in "".join(said) + ended(process)


@pytest.mark.scale
def test_a_wrong_database_password_is_an_error_and_the_right_one_continues(database: Postgres, root: Path) -> None:
    environment, wrong = settings(database, root), "Wr0ng-Pa55"
    stop_server(root / "prefect")
    url = database.url("prefect", driver="postgresql+asyncpg", password=wrong)
    out = ended(run(root, environment | {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url}, 3))
    assert "the local Prefect server does not start" in out
    assert "password authentication failed" in out
    assert wrong not in out
    assert ended(run(root, environment, 3))
    assert [record.attempts[-1].status for record in read_records(Places(root)) if record.name == "s3"] == ["finished"]


@pytest.mark.scale
def test_databases_that_go_away_in_the_middle_lose_nothing(database: Postgres, root: Path) -> None:
    environment = settings(database, root)
    process = run(root, environment, 4)
    actions = root / "store" / "actions"
    before, deadline = len(list(actions.glob("*/*.json"))), time.monotonic() + 300
    while len(list(actions.glob("*/*.json"))) == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    database.stop()
    out = ended(process)
    database.start()
    if process.returncode != 0:  # a flow that ends while its server has no database cannot say so
        assert "the same command continues" in " ".join(out.split())
    assert ended(run(root, environment, 4))
    (record,) = [record for record in read_records(Places(root)) if record.name == "s4"]
    assert record.finished
    assert "runs complete in MLflow" in ended(start(root, environment, "mlflow", "sync"))
    client = connect(database.url("mlflow"))
    (study,) = [one for one in client.search_experiments() if one.name != "Default"]
    (found,) = client.search_runs([study.experiment_id], filter_string="attributes.run_name = 's4'")
    assert found.info.status == "FINISHED"
    assert gives_away(root) == []
