"""Run as a script: interrupts the smallest recipe at random instants of its run and prints how each ended.

One process runs it whole, which imports and warms everything, and then forks a child for each trial, so that a hundred of them
cost minutes and not a hundred imports of torch. Nothing is sent to MLflow.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from flows.cli import run_command
from flows.runs.paths import Places
from flows.runs.record import read_records
from flows.tracking import delivery
from tests.flows.short_runs import smoke

SIGNALS = (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def start(root: Path) -> int:
    """Fork a child that is `cohort run` in `root`."""
    child = os.fork()
    if child:
        return child
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(os.open(root.with_suffix(".log"), os.O_WRONLY | os.O_CREAT), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and what it starts as well
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    code = 70
    try:
        code = run_command(smoke(root))
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """The exit code of a child; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def trial(root: Path, number: int, delay: float) -> dict[str, Any]:
    """Start, wait, interrupt, and see how it ends; the record may not be there before the run began."""
    child = start(root)
    while not list(read_records(Places(root))):
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(child, number)
    sent = time.monotonic()
    code = ended(child)
    seconds = time.monotonic() - sent
    status = list(read_records(Places(root)))[-1].attempts[-1].status
    return {"signal": number, "delay": delay, "code": code, "seconds": seconds, "status": status}


def main(folder: Path, trials: int, seed: int) -> None:
    """Print one JSON object with one entry per trial."""
    delivery.start_sender = lambda home: None
    delivery.CLOSE_SECONDS = 0.0
    for name in ("cold", "warm"):
        began = time.monotonic()
        assert (ended(start(folder / name)) if name == "warm" else run_command(smoke(folder / name))) == 0
        whole = time.monotonic() - began
    chance = random.Random(seed)
    found = [
        trial(folder / f"trial-{n}", SIGNALS[n % len(SIGNALS)], chance.uniform(0.0, 0.9 * whole)) for n in range(trials)
    ]
    print(json.dumps({"seconds": whole, "trials": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
