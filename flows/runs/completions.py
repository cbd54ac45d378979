"""What policies answered to the same questions, read by the digests that the ledger of a run has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from flows.inspection.groups import Group, groups_of
from flows.runs.ledger import EvaluationCalls, Ledger
from pipeline.store import Store, StoreError, use_store

_SHOWN: Final = ("estimate_advantages", "score", "rollout")
"""Stages whose tables lead to groups, the one that leads to most first."""


def completion_rows(store: Store, ledger: Ledger, count: int = 16) -> list[dict[str, Any]]:
    """The final policy's answers to the first `count` questions of the first held-out set, a row each.

    Greedy ones where the run has them, else the first sample of each question. Runs of one experiment have equal questions in
    equal order.

    Raises:
        StoreError: a table of the evaluation is gone or pruned.
    """
    evaluation = last_evaluation(ledger)
    groups = groups_made(store, ledger, evaluation.artifacts) if evaluation else []
    return [
        {
            # MLflow lines runs up by the first column and shows the second: these two need no click.
            "question": group.question,
            "completion": group.outputs[0].text,
            "status": group.outputs[0].status,
            "reward": group.outputs[0].reward,
            "answer": group.answer,
            "question_id": group.question_id,
        }
        for group in groups[:count]
    ]


def last_evaluation(ledger: Ledger) -> EvaluationCalls | None:
    """The last evaluation on the first held-out set: greedy where there is one; None where nothing was evaluated."""
    if not ledger.evaluations:
        return None
    held_out, step = ledger.evaluations[0].set, max(part.step for part in ledger.evaluations)
    found = [part for part in ledger.evaluations if (part.set, part.step) == (held_out, step)]
    return min(found, key=lambda part: part.mode != "greedy", default=None)


def groups_made(store: Store, ledger: Ledger, artifacts: Mapping[str, str]) -> list[Group]:
    """The groups of one step or one evaluation, with rewards and advantages where it has them.

    Joined by the calls of this run alone: another run may have estimated other advantages from the same outputs.

    Args:
        artifacts: stage -> digest, as the ledger has them.

    Raises:
        StoreError: the outputs are gone or pruned.
    """
    shown = next((artifacts[stage] for stage in _SHOWN if stage in artifacts), None)
    if shown is None:
        return []
    made = set(artifacts.values())
    calls = [_action(store, key) for key, call in ledger.calls.items() if call.digest in made]
    with use_store(store):
        return list(groups_of(store, shown, [call for call in calls if call and _is_about(call, made)]) or ())


def _is_about(call: Mapping[str, Any], made: set[str]) -> bool:
    """Whether a call took these outputs, or none: rewards of other outputs may have the same content."""
    given = call["arguments"].get("outputs")
    return not isinstance(given, Mapping) or given.get("artifact") in made


def _action(store: Store, key: str) -> dict[str, Any] | None:
    try:
        return store.action(key)
    except StoreError:
        return None
