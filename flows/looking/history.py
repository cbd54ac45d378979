"""What a run did, call by call: from its ledger, or, where it has none yet, by asking the store what the flow would find.

A run keeps a ledger when it ends well (`flows/ledger.py`). For one that is running or was stopped the flow itself is called on
a store that only finds and never computes: it passes through every call that is recorded and ends at the first that is not.
Calls of an earlier version of Cohort, whose keys nobody computes any more, are followed back from the final policy.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any, Final

from pydantic import TypeAdapter

from flows.config import IterativeRLConfig
from flows.ledger import Call, Ledger, read_ledger
from flows.observer import Observer, observing
from flows.places import Places
from flows.records import RunRecord, read_artifacts, read_records
from pipeline.progress import listen
from pipeline.store import MissingArtifactError, Store, use_store

__all__ = ["BESIDE", "History", "PlacedCall", "find_run", "history_of", "placed_calls"]

BESIDE: Final = "beside"
"""Where a call stands that is neither a step's own nor an evaluation's."""
_EVALUATED: Final = ("rollout", "score", "count_votes", "evaluate")

Points = dict[int, dict[str, float]]
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
    """Why the ledger may not hold all of the run; empty where it does."""


@dataclass(frozen=True)
class PlacedCall:
    """A stage call and what it was made for."""

    step: int
    """Steps count from 1; 0: before the first."""
    where: str
    """Empty: the step itself. Else the evaluation after the step (`in_domain/sampled`), or `BESIDE`: whatever else was asked
    for between the step before and this one (data, supervised fine-tuning, a reward model's training)."""
    stage: str
    key: str
    digest: str


class _Recorded(Store):
    """A store in which nothing is computed, nor verified: a call that is not recorded is an error."""

    def find(self, key: str, *, own: bool = False) -> dict[str, Any] | None:
        return self.action(key)


def find_run(places: Places, what: str) -> RunRecord | None:
    """The run of a folder's name, or the latest of a configuration's name."""
    return next((run for run in reversed(list(read_records(places))) if what in (run.folder.name, run.name)), None)


def history_of(places: Places, store: Store, record: RunRecord) -> History:
    """What a run did.

    Raises:
        ConfigError: its configuration is not one of this version of Cohort.
    """
    file = record.folder / "config.yaml"
    config = IterativeRLConfig.from_yaml(file.read_text(encoding="utf-8"), source=str(file))
    points = _summarised(record)
    ledger = read_ledger(record.folder)
    if ledger is not None:
        return History(record, config, ledger, points, "")
    ledger, found, missing = _walk(places, config)
    if len(ledger.steps) < record.steps and record.policy:
        ledger = _followed_back(store, record)
        note = "made by an earlier version: calls are those that its final policy leads to"
        return History(record, config, ledger, points, note)
    return History(record, config, ledger, points or found, missing)


def placed_calls(ledger: Ledger) -> list[PlacedCall]:
    """Every call of a run, in order, with its place."""
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
        found += [PlacedCall(step, BESIDE, other.stage, name, other.digest) for name, other in waiting]
        found.append(PlacedCall(step, where, call.stage, key, call.digest))
        waiting = []
    last = max(ledger.steps, default=0)
    return found + [PlacedCall(last, BESIDE, call.stage, key, call.digest) for key, call in waiting]


def _summarised(record: RunRecord) -> Points:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        curve = json.loads((record.folder / "summary.json").read_text(encoding="utf-8"))["curve"]
        points = _POINTS.validate_python(curve)
        return {
            step: {name: value for name, value in part.items() if value is not None} for step, part in points.items()
        }
    return {}


def _walk(places: Places, config: IterativeRLConfig) -> tuple[Ledger, Points, str]:
    """The calls that the flow finds in the store, the metrics they recorded, and why it found no more."""
    from flows.iterative_rl import iterative_rl

    ledger, observer, note = Ledger(), Observer(), ""
    try:
        with use_store(_Recorded(places.store)), listen(ledger.take), observing(observer):
            iterative_rl(config)
    except MissingArtifactError:
        note = f"after step {len(ledger.steps)} there is no call that a run would reuse now"
    except (ValueError, OSError) as error:  # a file of questions that is gone, outputs without a signal
        note = f"ends after step {len(ledger.steps)}: {str(error).splitlines()[0]}"
    return ledger, observer.points, note


def _followed_back(store: Store, record: RunRecord) -> Ledger:
    """Steps and calls of a finished run, from the updates that its final policy is the last of."""
    known = read_artifacts(record.folder)
    order = {digest: place for place, digest in enumerate(known)}
    # Calls of several runs may have come to equal content: those of this run's time win (they stand last), else the earliest.
    calls = [call for call in store.actions() if call["result"] in known]
    calls.sort(key=lambda call: (_is_of(record, call), -call["created"]))
    updates = {call["result"]: call for call in calls if call["stage"] == "update_policy"}
    chain: list[dict[str, Any]] = []
    policy = record.policy
    while policy in updates and all(_given(updates[policy], name) for name in ("policy", "outputs", "advantages")):
        chain.append(updates.pop(policy))  # popped: an update without a gradient returns the policy it was given
        policy = _given(chain[-1], "policy") or ""
    around = [_around(calls, update) for update in reversed(chain)]
    chosen = {(call["stage"], call["result"]): call for part in [calls, *around] for call in part}
    ledger = Ledger()
    for call in sorted(chosen.values(), key=lambda call: order[call["result"]]):
        ledger.calls[call["key"]] = Call(call["stage"], call["result"], call["seconds"])
    for step, part in enumerate(around, 1):
        ledger.steps[step] = {call["stage"]: call["result"] for call in part}
    return ledger


def _is_of(record: RunRecord, call: dict[str, Any]) -> bool:
    """Whether a call was computed while the run was running."""
    return any(0 <= call["created"] - attempt.started <= attempt.seconds for attempt in record.attempts)


def _around(calls: list[dict[str, Any]], update: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls that an update's outputs and advantages came from, and those that took the same outputs."""
    outputs, advantages = _given(update, "outputs"), _given(update, "advantages")
    made = [call for call in calls if call["result"] == outputs]
    questions = [call["arguments"]["questions"] for call in made if "questions" in call["arguments"]]
    asked = [call for call in calls if {"artifact": call["result"]} in questions]
    estimated = [call for call in calls if call["result"] == advantages and _given(call, "outputs") == outputs]
    taken = [call for call in calls if _given(call, "outputs") == outputs and call["type"] != "Advantages"]
    rest = [call for call in taken if call["stage"] != "update_policy"]
    return [*asked, *made, *rest, *estimated, update]


def _given(call: dict[str, Any], name: str) -> str | None:
    """Digest of the artifact that a call was given; None where it was given none, or is no call of ours."""
    given = call["arguments"].get(name)
    digest = given.get("artifact") if isinstance(given, dict) else None
    return digest if isinstance(digest, str) else None
