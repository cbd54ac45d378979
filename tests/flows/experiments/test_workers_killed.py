"""Two workers and one store: a shared stage is computed once, and killing either at random loses nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from flows.cli import run_command
from pipeline.store import Store
from tests.flows.experiments.shared_prefix import MARK, TINY, marked

ROOT = Path(__file__).parents[3]
KILLS = 20


def executions(root: Path) -> dict[str, list[tuple[int, bool]]]:
    """By key: which processes began the stage, in order, and whether each reported its end."""
    begun: dict[str, list[tuple[int, bool]]] = defaultdict(list)
    for line in (root / "stages.log").read_text().splitlines():
        pid, outcome, key, _ = line.split()
        if outcome == "started":
            begun[key].append((int(pid), False))
        else:
            (place,) = [n for n, (who, ended) in enumerate(begun[key]) if who == int(pid) and not ended]
            begun[key][place] = (int(pid), True)
    return begun


@pytest.mark.scale
def test_twenty_kills_of_two_workers_repeat_only_what_was_in_flight(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    script = [sys.executable, str(Path(__file__).with_name("killing_workers.py")), str(file), str(tmp_path), str(KILLS)]
    environment = os.environ | {MARK: str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])

    assert len(found["killed"]) == KILLS
    assert found["digests"]["disturbed"] == found["digests"]["golden"] == found["digests"]["again"]
    assert len(set(found["digests"]["golden"].values())) == 3

    begun, calls = executions(tmp_path / "disturbed"), found["calls"]
    assert begun.keys() == {record["key"] for record in Store(tmp_path / "golden" / "store").actions()}
    repeated = [who for attempts in begun.values() for who, _ in attempts[:-1]]
    in_flight = [who for attempts in begun.values() for who, ended in attempts if not ended]
    assert set(repeated) <= set(in_flight) <= set(found["killed"])
    assert len(in_flight) == len(set(in_flight))  # a process has one stage in flight
    assert sum(map(len, begun.values())) <= calls + KILLS
    undisturbed = executions(tmp_path / "again")
    assert [attempts for attempts in undisturbed.values() if len(attempts) > 1] == []

    assert run_command(["verify", "--root", str(tmp_path / "disturbed")]) == 0
    store = Store(tmp_path / "disturbed" / "store")
    assert sorted(store.digests()) == sorted(Store(tmp_path / "golden" / "store").digests())
    assert [folder.name for folder in store.root.iterdir() if any(folder.iterdir())] in (
        ["objects", "actions"],
        ["actions", "objects"],
    )
    assert marked(str(tmp_path)) == []
