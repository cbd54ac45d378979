"""One run of thousands of steps with stand-ins for what computes, in a process of its own; JSON lines on standard output.

    python -m benchmarks.scale_worker FOLDER STEPS inline|prefect

All of `cohort run` is real: store, stages, display, record, ledger, log, the sender and MLflow's database, summary, and
on request Prefect with its server. A line a step: seconds by part; every `PROBE` steps also what the process holds.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TextIO, cast

import psutil
from rich.console import Console

from benchmarks.scale_fakes import take_the_place_of_models
from benchmarks.timing import Clock, cpu_seconds
from flows.config import IterativeRLConfig
from flows.config.recipes import arithmetic_smoke
from flows.config.resolve import Choice
from flows.runs.paths import Places
from flows.runs.session import run_flow
from pipeline.events import Event, StepDone, recording
from pipeline.store.context import Engine

__all__ = ["IO", "scale_config"]

PROBE: Final = 50
"""Steps between two looks at memory, handles and files."""

IO: Final = ("read_count", "write_count", "read_chars", "write_chars")
"""Calls and bytes of a step, whether they reach the disk or not: what is rewritten as a run grows shows here."""

_SHORT: Final = {"count": 512, "shortest": 3, "longest": 3}

_WATCHED: Final = {
    "store": [
        f"pipeline.store.store:Store.{name}" for name in ("publish", "find", "record", "path", "manifest", "action")
    ],
    "tables": ["pipeline.artifact:Table.read", "pipeline.artifact:Table.write"],
    "MLflow": [f"flows.tracking.delivery:Delivery.{name}" for name in ("take", "close")],
    "log": ["pipeline.event_log:EventLog.take"],
    "ledger, record": ["flows.runs.ledger:Ledger.take", "flows.runs.record:RunRecord.end"],
    "display": ["flows.runs.display:Display.take"],
    "points": ["flows.runs.curve:Points.take"],
    "Prefect": ["pipeline.stage:run_as_task"],
}
"""What is timed, by part; a stage's body is booked under `stages`, the rest of a step under `flow`."""


def scale_config(steps: int) -> IterativeRLConfig:
    """Four questions of four outputs a step, evaluated every hundred steps."""
    return arithmetic_smoke().override(
        {
            "name": "scale",
            "sft": None,
            "data.train": _SHORT,
            "data.demonstrations.chains": _SHORT,
            "data.evaluation": {"held_out": {**_SHORT, "count": 16}},
            "iterations": 1,
            "steps": steps,
            "questions_per_step": 4,
            "rollout.G": 4,
            "reward.components": [{"kind": "accuracy", "verifier": "exact"}],
            "evaluation": {"every": 100, "samples": 0, "greedy": True, "estimates": {"ks": [1]}},
        }
    )


class Probe:
    """Notes each step as it ends; `take` is a fold."""

    def __init__(self, root: Path, clock: Clock, out: TextIO) -> None:
        self._root, self._clock, self._out = root, clock, out
        self._process = psutil.Process()
        self._started, self._cpu, self._io = time.perf_counter(), cpu_seconds(), self._process.io_counters()

    def take(self, event: Event) -> None:
        """Note one event."""
        if not isinstance(event, StepDone):
            return
        seconds, cpu = time.perf_counter() - self._started, cpu_seconds() - self._cpu
        parts, io = self._clock.take(), self._process.io_counters()
        line = {"step": event.step, "seconds": seconds, "cpu_seconds": cpu, "parts": parts}
        line |= {name: getattr(io, name) - getattr(self._io, name) for name in IO}
        if event.step % PROBE == 0 or event.step == 1:
            line |= self._held()
        self._out.write(json.dumps(line) + "\n")
        self._started, self._cpu, self._io = time.perf_counter(), cpu_seconds(), self._process.io_counters()

    def _held(self) -> dict[str, float]:
        records = sum(path.stat().st_size for path in self._root.glob("runs/*/*.json*"))
        return {
            "rss_mib": self._process.memory_info().rss / 2**20,
            "handles": self._process.num_fds(),
            "threads": self._process.num_threads(),
            "records_kib": records / 2**10,
        }


def main() -> None:
    root, steps, engine = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    take_the_place_of_models()
    places, config = Places(root), scale_config(steps)
    with recording(Probe(root, watch(), out).take), _servers(engine, places) as server:
        begun, cpu = time.perf_counter(), cpu_seconds()
        summary = run_flow(
            Choice(config, config),
            places,
            engine=cast("Engine", engine),
            console=Console(file=io.StringIO()),
            command=f"scale {steps}",
        )
        end = {"seconds": time.perf_counter() - begun, "cpu_seconds": cpu_seconds() - cpu, "policy": summary.policy}
        calls = {name: sum(part[name] for part in summary.time.values()) for name in ("executed", "cached")}
        out.write(json.dumps(end | calls | {"server": server()}) + "\n")


def watch() -> Clock:
    """A clock on all of `_WATCHED`, and on the stages' bodies."""
    import pipeline.stage

    clock = Clock()
    for part, paths in _WATCHED.items():
        for path in paths:
            clock.watch_path(part, path)
    clock.watch("stages", pipeline.stage, "_execute")
    return clock


@contextlib.contextmanager
def _servers(engine: str, places: Places) -> Iterator[Any]:
    """What the Prefect server has cost so far; it is stopped behind the block."""
    if engine == "inline":
        yield dict
        return
    from pipeline.orchestration.server import ensure_server, server_status, stop_server

    ensure_server(places.prefect)
    process = psutil.Process(server_status(places.prefect).pid)

    def cost() -> dict[str, float]:
        times = process.cpu_times()
        database = (places.prefect / "prefect.db").stat().st_size
        used = times.user + times.system
        return {"cpu_seconds": used, "rss_mib": process.memory_info().rss / 2**20, "database_mib": database / 2**20}

    try:
        yield cost
    finally:
        stop_server(places.prefect)


if __name__ == "__main__":
    main()
