"""Thousands of steps cost what the first ones cost, and a million rollouts no more memory than a chunk of them.

Counted, not timed: calls and bytes of reading and writing, handles, memory. `benchmarks/scale.py` has the seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from benchmarks.scale import pool_threads
from benchmarks.scale_rollouts import GROUP, make_outputs, make_questions
from benchmarks.scale_worker import IO
from pipeline.store import Store
from stages.reward import RewardConfig, score
from stages.reward.stage import CHUNK_ROWS
from stages.tables import Rollouts

pytestmark = pytest.mark.scale

REPOSITORY = Path(__file__).parents[2]
ENDS = 100
"""Steps that are compared, at both ends."""
Line = Mapping[str, Any]


def worker(module: str, *arguments: str) -> list[Line]:
    """What a worker of the benchmark says, a line each."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    single = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=single, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def require_flat(steps: list[Line], *, kib_a_step: float) -> None:
    """Every count of the last steps is at most 1.2 of that of the first; nothing is held that grows with the steps."""
    for count in IO:
        first, last = (mean(line[count] for line in part) for part in (steps[1 : ENDS + 1], steps[-ENDS:]))
        assert last <= 1.2 * first + 2, (count, first, last)
    looks = [line for line in steps if "handles" in line][1:]  # the first is before the tenth step
    assert looks[-1]["handles"] <= looks[0]["handles"] + 1
    assert looks[-1]["threads"] <= looks[0]["threads"] + pool_threads()
    grown_kib = 2**10 * (looks[-1]["rss_mib"] - looks[0]["rss_mib"])
    assert grown_kib / (looks[-1]["step"] - looks[0]["step"]) < kib_a_step


def test_two_thousand_steps_and_their_rerun_cost_the_same_to_the_end(
    tmp_path: Path,
) -> None:
    *steps, end = worker("scale_worker", str(tmp_path), "2000", "inline")
    assert [line["step"] for line in steps] == list(range(1, 2001))
    require_flat(steps, kib_a_step=16)
    *again, second = worker("scale_worker", str(tmp_path), "2000", "inline")
    assert second["executed"] == 0
    assert second["policy"] == end["policy"]
    require_flat(again, kib_a_step=16)
    assert max(line["write_chars"] for line in again) < 100_000  # of a record that is rewritten now and then, no more


def test_steps_through_prefect_hold_the_same_to_the_end(tmp_path: Path) -> None:
    *steps, end = worker("scale_worker", str(tmp_path), "250", "prefect")
    assert end["executed"] > 5 * 250
    require_flat(steps, kib_a_step=64)


def test_a_million_rollouts_are_scored_and_estimated_within_a_gibibyte(tmp_path: Path) -> None:
    lines = worker("scale_rollouts", str(tmp_path), "1000000")
    assert [line["stage"] for line in lines] == ["write", "score", "advantages"]
    for line in lines:
        assert 0 < line["own_mib"] + line["mapped_mib"] < 1024, line


def test_outputs_are_graded_equally_one_by_one_and_in_chunks(store: Store) -> None:
    questions = make_questions(2 * CHUNK_ROWS // GROUP + 1)
    outputs = make_outputs(questions)
    config = RewardConfig.model_validate({"components": [{"kind": "accuracy", "verifier": "exact"}]})
    whole = score(outputs, questions, config).rows()
    assert len(whole) > 2 * CHUNK_ROWS
    some = Rollouts.write(outputs.read().slice(CHUNK_ROWS - GROUP, 2 * GROUP))
    assert score(some, questions, config).rows() == whole[CHUNK_ROWS - GROUP : CHUNK_ROWS + GROUP]
    assert sum(row["reward"] for row in whole) / len(whole) == score(outputs, questions, config).metrics["reward/mean"]
