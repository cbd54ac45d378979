"""A run that is interrupted ends at once, says so in its record and by its exit code, and continues where it was."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.cli import run_command
from flows.runs.paths import Places
from flows.runs.record import read_records
from flows.tracking.fold import MlflowFold
from pipeline.progress import listen
from pipeline.store import Store, use_store
from tests.flows.short_runs import smoke

REPOSITORY = Path(__file__).parents[2]


def interrupt(number: int) -> None:
    os.kill(os.getpid(), number)
    for _ in range(1000):
        pass


def plainly(number: int) -> None:
    interrupt(number)


def swallowed(number: int) -> None:
    class Finalised:
        def __del__(self) -> None:
            interrupt(number)

    Finalised()


def ignored(number: int) -> None:
    with contextlib.suppress(BaseException):
        interrupt(number)


def turned_into_an_error(number: int) -> None:
    try:
        interrupt(number)
    except KeyboardInterrupt:
        raise SystemError("a C extension returned a result with an exception set") from None


@pytest.mark.claim("Ctrl-C that is swallowed")
@pytest.mark.parametrize(
    ("way", "number", "code"),
    [
        (plainly, signal.SIGTERM, 130),
        (swallowed, signal.SIGINT, 130),
        (ignored, signal.SIGHUP, 129),
        (turned_into_an_error, signal.SIGHUP, 129),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_that_is_interrupted_anyhow_is_recorded_as_interrupted(
    way: Callable[[int], None], number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COHORT_DEBUG", "0")
    began: list[str] = []

    def during_training(topic: str, values: dict[str, Any]) -> None:
        if topic == "sft" and not began:
            began.append(topic)
            way(number)

    with listen(during_training):
        assert run_command(smoke(tmp_path)) == code
    (record,) = read_records(Places(tmp_path))
    assert began
    assert (record.attempts[-1].status, record.steps) == ("interrupted", 0)
    fold = MlflowFold(record.folder)
    with use_store(Store(tmp_path / "store")):
        fold.read()
    assert fold.status == "KILLED"


@pytest.mark.claim("Ctrl-C that is swallowed")
@pytest.mark.slow
def test_none_of_many_interrupts_at_random_instants_is_lost(tmp_path: Path) -> None:
    count = 24  # a hundred and more by hand: `python -m tests.end_to_end.interrupting FOLDER 110 SEED`
    command = [sys.executable, "-m", "tests.end_to_end.interrupting", str(tmp_path), str(count)]
    single = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=REPOSITORY, env=single, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]
    trials = json.loads(done.stdout.splitlines()[-1])["trials"]
    # A late instant may find the run over: then it finished, and says so.
    caught = [trial for trial in trials if (trial["code"], trial["status"]) != (0, "finished")]
    assert len(caught) >= 0.7 * count
    for trial in caught:
        expected = 129 if trial["signal"] == signal.SIGHUP else 130
        assert (trial["code"], trial["status"]) == (expected, "interrupted"), trial
        assert trial["seconds"] < 20, trial


@pytest.mark.slow
def test_a_terminal_that_is_closed_interrupts_the_run(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *smoke(tmp_path)],
        cwd=REPOSITORY,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    while not list((tmp_path / "store" / "actions").glob("*/*.json")):
        assert process.poll() is None
        with contextlib.suppress(OSError):
            os.read(ours, 4096)
    os.close(ours)
    assert process.wait(timeout=60) == 129
    (record,) = read_records(Places(tmp_path))
    assert record.attempts[-1].status == "interrupted"
