"""A lost MLflow database is made again from what runs recorded, with everything that it had."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import run_command
from flows.tracking.delivery import tracked_study
from pipeline.residency import evict
from pipeline.tracking.records import alias, figure
from tests.flows.logs import records_of
from tests.flows.short_runs import smoke

ROOT = Path(__file__).parents[3]
TINY = ["iterations=1", "steps=2", "sft.max_steps=2", "sft.decay_steps=1"]
_OF_THE_DATABASE = {"alembic_version", "experiments", "experiment_tags"}
"""Tables that hold the same in every database with one experiment."""
_MADE = re.compile(
    r"creation|created|last_updat|_uuid$|^(?:input|output|model|dataset)_id$|^(?:source|destination)_id$"
)
"""Columns with ids, and with the times at which MLflow made a row."""


def contents(database: Path) -> dict[str, list[str]]:
    """Return the rows of each table, as sorted JSON, with run keys and names of models in the place of ids."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.row_factory = sqlite3.Row
        names = dict(connection.execute("SELECT run_uuid, value FROM tags WHERE key = 'cohort.run_key'").fetchall())
        names |= dict(connection.execute("SELECT model_id, name FROM logged_models").fetchall())
        found: dict[str, list[str]] = {}
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in sorted(set(tables) - _OF_THE_DATABASE):
            rows = [dict(row) for row in connection.execute(f"SELECT * FROM {table}")]
            kept = [
                {name: _named(value, names) for name, value in row.items() if _keeps(name, value, names)}
                for row in rows
            ]
            found[table] = sorted(json.dumps(row, sort_keys=True) for row in kept)
    return found


def _keeps(column: str, value: object, names: dict[str, str]) -> bool:
    return value in names or not _MADE.search(column)


def _named(value: object, names: dict[str, str]) -> object:
    for made, name in names.items():
        value = value.replace(made, name) if isinstance(value, str) else value
    return value


def sync(home: Path) -> None:
    """Send in a process of its own: MLflow keeps the files of a database open for the life of a process."""
    command = [sys.executable, "-m", "flows.cli", "mlflow", "sync", "--root", str(home)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 runs complete in MLflow" in done.stdout


@pytest.mark.slow
def test_a_deleted_database_and_its_artifacts_come_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = tmp_path / "artifacts"
    changes = [*TINY, "evaluation.every=1", "name=grpo-s0", "experiment=study"]
    assert run_command(smoke(home, *changes)) == 0
    evict()
    (run,) = (home / "runs").iterdir()
    logged = records_of(home, f"runs/{run.name}")
    policy = next(record for record in logged if record["kind"] == "model")
    with tracked_study(home, experiment="study", name="all", key="all", config={}) as log:
        log(alias("best-study", policy, run=run.name, run_name="grpo-s0", began=logged[0]["time"]))
        log(figure(run / "learning_curve.png"))
    sync(home)
    before = contents(home / "mlflow.db")
    points = {(key, record["step"]) for record in logged if record["kind"] == "step" for key in record["metrics"]}
    counts = {table: len(before[table]) for table in ("runs", "metrics", "datasets", "registered_model_aliases")}
    assert counts == {"runs": 2, "metrics": len(points), "datasets": 3, "registered_model_aliases": 1}
    assert len(points) > 80

    (home / "mlflow.db").unlink()
    shutil.rmtree(home / "mlruns")
    sync(home)
    assert contents(home / "mlflow.db") == before
    pictures = [file.read_bytes() for file in (home / "mlruns").rglob("learning_curve.png")]
    assert pictures == [(run / "learning_curve.png").read_bytes()] * 2
    (table,) = (home / "mlruns").rglob("completions.json")
    assert json.loads(table.read_text()) == json.loads((run / "completions.json").read_text())
    sync(home)  # nothing twice
    assert contents(home / "mlflow.db") == before
