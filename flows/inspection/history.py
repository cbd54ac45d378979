"""Find what a run did, call by call, and its curves: folds of its log."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import TypeAdapter

from flows.config import IterativeRLConfig
from flows.runs.curve import Points as MeasuredPoints
from flows.runs.ledger import Call, Ledger, read_ledger
from flows.runs.paths import Places
from flows.runs.record import RunRecord, read_records
from flows.storage.gc import Records, replayed_from
from flows.wording import at_k
from pipeline.event_log import LOG, read_events
from pipeline.store import Store, StoreError

BETWEEN_STEPS: Final = "between steps"
"""The place of a call that is neither a step's own nor an evaluation's."""
_EVALUATED: Final = ("rollout", "score", "count_votes", "evaluate")

Points = dict[int, dict[str, float]]
Curve = dict[int, dict[str, float]]
"""Step -> metric -> value, on one held-out set."""
_POINTS: Final = TypeAdapter(dict[int, dict[str, float | None]])


@dataclass(frozen=True)
class History:
    """A run with its calls."""

    record: RunRecord
    config: IterativeRLConfig
    ledger: Ledger
    points: Points
    """Step -> evaluations, rewards and what else its summary keeps."""
    note: str
    """Why the ledger may not have all of the run; empty where it has."""


@dataclass(frozen=True)
class PlacedCall:
    """A stage call and what it was made for."""

    step: int
    """Steps count from 1; 0: before the first."""
    where: str
    """Empty: the step itself. Else the evaluation after the step (`in_domain/sampled`), or `BETWEEN_STEPS`: what was called
    between the step before and this one (data, supervised fine-tuning, a reward model's training)."""
    stage: str
    key: str
    digest: str


def find_run(places: Places, what: str) -> RunRecord | None:
    """Return the run of a folder's name, or the latest of a configuration's name."""
    return next((run for run in reversed(list(read_records(places))) if what in (run.folder.name, run.name)), None)


def history_of(places: Places, store: Store, record: RunRecord) -> History:
    """Read what a run did; raise ConfigError where its configuration is not one of this version of Cohort."""
    file = record.folder / "config.yaml"
    config = IterativeRLConfig.from_yaml(file.read_text(encoding="utf-8"), source=str(file))
    ledger = read_ledger(record.folder, complete=False) or Ledger()
    note = "" if record.finished else f"it has not ended well: its calls are known up to step {len(ledger.steps)}"
    return History(record, config, ledger, _summarised(record) or _measured(store, record), note)


def _step_names(places: Places, digest: str) -> dict[str, str]:
    """Return digest -> `step N` of everything that the steps of a run made, of the first run whose step made `digest`."""
    for record in read_records(places):
        ledger = read_ledger(record.folder, complete=False) or Ledger()
        found = {made: f"step {step}" for step, parts in ledger.steps.items() for made in parts.values()}
        if digest in found:
            return found
    return {}


def ways_back(places: Places, store: Store, digests: Iterable[str]) -> dict[str, str]:
    """Return digest -> how it comes back, in words, of those that are trained state and were not written.

    Checkpoints have the names of steps, of the first run whose step made the first of `digests`; others their digest.
    """

    @functools.cache
    def is_unwritten(name: str) -> bool:
        with contextlib.suppress(StoreError):
            return bool(store.manifest(name).get("unwritten"))
        return False

    @functools.cache
    def is_there(name: str) -> bool:
        with contextlib.suppress(StoreError):
            return not is_unwritten(name) and not store.freed(name)
        return False

    listed = list(digests)
    unwritten = [digest for digest in listed if is_unwritten(digest)]
    if not unwritten:  # as most often: no record and no log is read for it
        return {}
    records, names = Records(store.actions()), _step_names(places, listed[0])

    def said(digest: str) -> str:
        start, calls = replayed_from(records, digest, is_there)
        again = "" if is_there(start) else ", which is made again first"
        count = f"{calls:,} update{'' if calls == 1 else 's'}"
        return f"not written; replayed from {names.get(start, start[:12])} ({count}){again}"

    return {digest: said(digest) for digest in unwritten}


def placed_calls(ledger: Ledger) -> list[PlacedCall]:
    """Return every call of a run, in order, with its place."""
    places: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for step, made in ledger.steps.items():
        for stage, digest in made.items():
            places.setdefault((stage, digest), []).append((step, ""))
    for part in ledger.evaluations:
        for stage in _EVALUATED:
            if stage in part.artifacts:
                places.setdefault((stage, part.artifacts[stage]), []).append((part.step, f"{part.set}/{part.mode}"))
    found: list[PlacedCall] = []
    waiting: list[tuple[str, Call]] = []
    for key, call in ledger.calls.items():
        here = places.get((call.stage, call.digest))
        if not here:
            waiting.append((key, call))
            continue
        step, where = here.pop(0)  # calls of equal content come in the order of their steps
        found += [PlacedCall(step, BETWEEN_STEPS, other.stage, name, other.digest) for name, other in waiting]
        found.append(PlacedCall(step, where, call.stage, key, call.digest))
        waiting = []
    last = max(ledger.steps, default=0)
    return found + [PlacedCall(last, BETWEEN_STEPS, call.stage, key, call.digest) for key, call in waiting]


def _summarised(record: RunRecord) -> Points:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        curve = json.loads((record.folder / "summary.json").read_text(encoding="utf-8"))["curve"]
        points = _POINTS.validate_python(curve)
        return {
            step: {name: value for name, value in part.items() if value is not None} for step, part in points.items()
        }
    return {}


def _measured(store: Store, record: RunRecord) -> Points:
    """Return the metrics of calls that are recorded, for a run without a summary; forgotten calls are left out."""

    def find(key: str) -> Mapping[str, Any]:
        with contextlib.suppress(StoreError):
            return store.action(key)
        return {}

    points = MeasuredPoints(find)
    for event in read_events(record.folder / LOG):
        with contextlib.suppress(KeyError):
            points.take(event)
    return points.by_step


def evaluations(points: Mapping[int, Mapping[str, float]]) -> dict[str, Curve]:
    """Return held-out set -> its curve, from metrics named `eval/<set>/<metric>`."""
    curves: dict[str, Curve] = {}
    for step in sorted(points):
        for key, value in points[step].items():
            if key.startswith("eval/"):
                _, name, metric = key.split("/", 2)
                curves.setdefault(name, {}).setdefault(step, {})[metric] = value
    return curves


def best(curve: Curve) -> tuple[int, float] | None:
    """Return the first step that reached the highest accuracy (of samples if there are any, else greedy), and it."""
    found = {step: metrics.get("accuracy", metrics.get("greedy_accuracy")) for step, metrics in curve.items()}
    known = {step: accuracy for step, accuracy in found.items() if accuracy is not None}
    step = max(known, key=lambda step: (known[step], -step), default=None)
    return None if step is None else (step, known[step])


def measures(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return label -> metric of what an evaluation has: greedy, samples, then Pass@K and Maj@K by K."""
    named = {"greedy": "greedy_accuracy", "sampled": "accuracy"}
    return {label: name for label, name in named.items() if name in metrics} | at_k(metrics)
