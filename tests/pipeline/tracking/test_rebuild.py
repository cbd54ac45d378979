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

from pipeline.tracking import track
from pipeline.tracking.registry import TrackedModel

ROOT = Path(__file__).parents[3]
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
    home, picture = tmp_path / "artifacts", tmp_path / "curve.png"
    picture.write_bytes(b"png")
    policy = TrackedModel("policy", "ab" * 32, 2, {"run": "grpo-s0", "arm": "usual"})
    config = {"lr": 3e-4, "rollout": {"G": 8}, "diff.lr": 3e-4}
    with track(
        home, experiment="study", run_name="grpo-s0", run_key="grpo-s0-1", config=config, tags={"arm": "usual"}
    ) as tracker:
        tracker.log_dataset("in_domain", "ef" * 32, context="evaluation", rows=256)
        for step in (1, 2):
            tracker.log_step(step, {"reward/mean": step / 10, "policy/kl": 0.5})
        tracker.log_summary({"final/in_domain/accuracy": 0.75})
        tracker.log_table("completions", [{"question": "1+1", "answer": "2"}])
        tracker.log_figure(picture)
        tracker.log_model(policy)
        tracker.set_note("# What happened")
    with track(home, experiment="study", run_name="all", run_key="all", config={}) as tracker:
        tracker.set_alias("best-study", policy, run_name="grpo-s0", run_key="grpo-s0-1")
    sync(home)
    before = contents(home / "mlflow.db")
    counts = {table: len(before[table]) for table in ("runs", "params", "metrics", "datasets", "model_versions")}
    assert counts == {"runs": 2, "params": 3, "metrics": 5, "datasets": 1, "model_versions": 1}
    assert len(before["registered_model_aliases"]) == 1

    (home / "mlflow.db").unlink()
    shutil.rmtree(home / "mlruns")
    sync(home)
    assert contents(home / "mlflow.db") == before
    assert [file.read_bytes() for file in (home / "mlruns").rglob("curve.png")] == [b"png"]
    (table,) = (home / "mlruns").rglob("completions.json")
    assert json.loads(table.read_text()) == {"columns": ["question", "answer"], "data": [["1+1", "2"]]}
    sync(home)  # nothing twice
    assert contents(home / "mlflow.db") == before
