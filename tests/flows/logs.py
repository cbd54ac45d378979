"""Logs of runs that were not run: what steps and evaluations made, as events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path

from flows.runs.ledger import EvaluationCalls
from flows.tracking.fold import MlflowFold
from pipeline.event_log import EventLog
from pipeline.events import EvaluationDone, RunEnded, RunStarted, StageDone, StepDone
from pipeline.store import Store, use_store
from pipeline.tracking.records import Record

START = RunStarted("made up", "study", 4, 1, "cohort run", "inline", "elsewhere", 1, "0")


def records_of(root: Path, log: str) -> list[Record]:
    """Return what MLflow gets of a run (`runs/<key>`) or of a study (`tracking/<key>`)."""
    fold = MlflowFold(root / log)
    with use_store(Store(root / "store")):
        fold.read()
    return fold.records


def write_log(
    folder: Path,
    steps: Mapping[int, Mapping[str, str]],
    evaluations: Iterable[EvaluationCalls] = (),
    *,
    whole: bool = True,
) -> EventLog:
    """Append an attempt in which stages made these digests: step -> stage -> digest; `whole`: with its start and end."""
    log = EventLog(folder)
    if whole:
        log.append(START)

    def called(where: str, made: Mapping[str, str]) -> tuple[str, ...]:
        keys = {stage: sha256(f"{where}/{stage}/{digest}".encode()).hexdigest() for stage, digest in made.items()}
        for stage, digest in made.items():
            log.append(StageDone(stage, keys[stage], digest, 1.0, cached=False))
        return tuple(keys.values())

    for step, made in steps.items():
        keys = called(f"step {step}", made)
        log.append(StepDone(step, 0, {}, keys))
    for part in evaluations:
        keys = called(f"{part.where}", part.artifacts)
        log.append(EvaluationDone(part.step, part.set, part.mode, {}, keys))
    if whole:
        log.append(RunEnded("finished", 1.0))
    return log
