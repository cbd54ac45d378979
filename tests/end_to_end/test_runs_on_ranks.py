"""Whole runs whose training is on two ranks: they end, resume and stop as those on one."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.config.recipes import arithmetic_smoke
from pipeline.config import parse_settings
from pipeline.derivation.materialise import materialise
from pipeline.progress import listen
from pipeline.residency import evict
from pipeline.store import Store, use_store
from pipeline.workers.group import WorkerError
from stages.update import MismatchError
from tests.flows.short_runs import executed_by, smoke
from tests.stages.training.groups import gone, rank_processes

pytestmark = pytest.mark.engines

REPOSITORY = Path(__file__).parents[2]
SETTINGS = [
    f"{part}.training.engine.{setting}"
    for part in ("sft", "update")
    for setting in ("kind=deepspeed", "ranks=2", "zero_stage=2")
] + [
    "sft.training.optimizer.kind=adamw",  # ZeRO flattens the matrices that muon works on
    "update.micro_batch_tokens=200",  # several micro-batches to share
    *("iterations=2", "steps=1", "update.mu=2", "sft.max_steps=6", "sft.decay_steps=2", "evaluation.every=0"),
]


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that fail leave their logs, which errors name: here, also those that a command starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def run(settings: Sequence[str] = (), *, kill: tuple[str, int, int] | None = None) -> tuple[str, list[str]]:
    """Content of the final policy and executed stages; `kill`: topic, at which report of it, rank."""
    reports = 0

    def note(topic: str, values: dict[str, Any]) -> None:
        nonlocal reports
        if kill and topic == kill[0]:
            reports += 1
            if reports == kill[1]:
                rank_processes()[kill[2]].kill()

    with listen(note):
        return executed_by(arithmetic_smoke().override(parse_settings([*SETTINGS, *settings])))


def test_a_run_that_loses_a_rank_twice_ends_as_an_undisturbed_one(store: Store, tmp_path: Path) -> None:
    golden, executed = run()
    ranks = rank_processes()
    assert len(ranks) == 2, "one group, which is still there for what may come"
    assert executed.count("update_policy") == 2
    assert run() == (golden, []), "a second run executes nothing"
    assert all(process.is_running() for process in ranks.values())

    with use_store(Store(tmp_path / "disturbed")) as disturbed:
        for rank, topic, reports in ((1, "sft", 5), (0, "update_policy", 3)):
            with pytest.raises(WorkerError, match=rf"training, rank {rank} of 2 was killed \(signal 9") as raised:
                run(kill=(topic, reports, rank))
            assert (raised.value.rank, raised.value.exit_code) == (rank, -9)
            assert not rank_processes()
        done = len(list(disturbed.actions()))
        content, rest = run()
    assert content == golden
    assert len(rest) == len(executed) - done, "nothing was computed again"


def test_a_rank_that_is_killed_between_checkpoints_costs_a_replay(store: Store, tmp_path: Path) -> None:
    several = ["iterations=1", "steps=6", "update.mu=1", "checkpoint.every=5"]
    golden, executed = run(several)
    evict()
    with use_store(Store(tmp_path / "disturbed")) as disturbed:
        disturbed.replay = functools.partial(materialise, disturbed)
        with pytest.raises(WorkerError, match="was killed"):
            run(several, kill=("update_policy", 4, 1))
        done = len(disturbed.actions())
        assert not any(record.get("content") for record in disturbed.actions() if record["stage"] == "update_policy"), (
            "no policy was written yet"
        )
        with pytest.warns(UserWarning, match="is not there .* replaying 3 x update_policy"):
            content, rest = run(several)
    assert content == golden
    assert len(rest) == len(executed) - done, "nothing was sampled, scored or trained twice but for the replay"


def test_a_run_whose_engine_and_trainer_disagree_stops_before_that_step(store: Store, tmp_path: Path) -> None:
    """The limit lies between what the two steps have, so that the other one passes it."""
    settings = ["iterations=1", "steps=2", "update.training.precision=bf16"]
    _, executed = run(settings)
    records = [record for record in store.actions() if record["stage"] == "update_policy"]
    found = [
        record["metrics"]["rollout/mismatch_mean"] for record in sorted(records, key=lambda record: record["created"])
    ]
    assert found[0] != found[1]
    step, limit = 1 + found.index(max(found)), sum(found) / 2
    with use_store(Store(tmp_path / "stopped")) as stopped:
        with pytest.raises(MismatchError, match=rf"^step {step}: the trainer does not find .*max_mean=") as raised:
            run([*settings, f"update.mismatch.max_mean={limit}"])
        assert isinstance(raised.value.__cause__, ValueError)
        done = sorted(record["stage"] for record in stopped.actions())
        updates = [place for place, name in enumerate(executed) if name == "update_policy"]
        assert done == sorted(executed[: updates[step - 1]]), "it stopped before the step and lost nothing"
        assert not rank_processes()


def test_ctrl_c_ends_command_and_ranks_and_the_same_command_resumes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flows.cli", *smoke(tmp_path, *SETTINGS)]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=dict(os.environ), stdout=output, stderr=output)
    ranks = _ranks_at_work(process, tmp_path)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, log.read_text()
    assert gone(ranks)
    assert not list(tmp_path.glob("cohort-*")), "logs of no failure"
    resumed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert not list(tmp_path.glob("cohort-*"))


def _ranks_at_work(process: subprocess.Popen[bytes], root: Path) -> dict[int, psutil.Process]:
    """The ranks of a run, once they have finished a first stage of it."""
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        trained = [record for record in Store(root / "store").actions() if record["stage"] == "supervised_finetuning"]
        if trained:
            return rank_processes(psutil.Process(process.pid))
        time.sleep(0.2)
    raise AssertionError(f"no stage was trained; the run ended with {process.poll()}")
