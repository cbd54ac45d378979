"""Groups of outputs for reading: a question, its G outputs, their rewards and advantages, found and joined by key.

Given any table of a step (rollouts, rewards or advantages), the others are found through the recorded stage calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.artifact import Table
from pipeline.sealing import StoreError
from pipeline.store import Store
from stages.tables import Advantages, Demonstrations, Questions, Rewards, Rollouts

__all__ = ["Group", "Output", "groups_of"]


@dataclass(frozen=True)
class Output:
    """One output, or several equal ones of a group."""

    text: str
    tokens: int
    finish_reason: str
    reward: float | None
    status: str
    extracted: str | None
    advantage: float | None
    """Of its first token; None where the row is masked or there are no advantages."""


@dataclass(frozen=True)
class Group:
    """A question and its outputs in the order they were sampled."""

    question_id: str
    question: str
    answer: str
    outputs: list[Output]

    def merged(self) -> list[tuple[int, Output]]:
        """Equal outputs once, with their count."""
        counts: dict[Output, int] = {}
        for output in self.outputs:
            counts[output] = counts.get(output, 0) + 1
        return [(count, output) for output, count in counts.items()]


def groups_of(store: Store, digest: str) -> Iterator[Group] | None:
    """The groups that a table of rollouts, rewards or advantages is about; None for anything else.

    Tables that were never computed, or whose payload is gone, leave their columns empty.
    """
    outputs = _outputs_digest(store, digest)
    return None if outputs is None else _groups(store, digest, outputs)


def _groups(store: Store, digest: str, outputs: str) -> Iterator[Group]:
    calls = list(store.actions())
    made = next((call for call in reversed(calls) if call["result"] == outputs), None)
    beside = [call for call in calls if _artifact(call, "outputs") == outputs]
    # Outputs that were selected or demonstrated were not made from questions: take those they were scored with, or shown in.
    questions = next((found for call in [made, *beside] if (found := _artifact(call, "questions"))), None)
    asked = _read(Questions, questions) or _read(Demonstrations, _artifact(made, "demonstrations"))
    by_id = {row["question_id"]: row for row in asked}
    rewards = _by_key(_read(Rewards, _one_of(beside, "Rewards", digest)))
    advantages = _by_key(_read(Advantages, _one_of(beside, "Advantages", digest)))
    groups: dict[str, list[Output]] = {}
    for row in Rollouts(outputs).rows():
        key = (row["question_id"], row["sample"])
        reward, advantage = rewards.get(key, {}), advantages.get(key, {}).get("advantage")
        groups.setdefault(row["question_id"], []).append(
            Output(
                text=row["text"],
                tokens=len(row["output_ids"]),
                finish_reason=row["finish_reason"],
                reward=reward.get("reward"),
                status=reward.get("status", ""),
                extracted=reward.get("extracted"),
                advantage=advantage[0] if advantage else None,
            )
        )
    for name, members in groups.items():
        about = by_id.get(name, {"question": "(the questions are not in the store)"})
        yield Group(name, about["question"], about.get("answer", ""), members)


def _outputs_digest(store: Store, digest: str) -> str | None:
    """Digest of the rollouts that a table belongs to."""
    kind = store.manifest(digest).get("type")
    if kind == "Rollouts":
        return digest
    if kind not in ("Rewards", "Advantages"):
        return None
    made = next((call for call in store.actions() if call["result"] == digest), None)
    return _artifact(made, "outputs")


def _artifact(call: Mapping[str, Any] | None, parameter: str) -> str | None:
    """Digest of the artifact that a recorded call was given."""
    given = (call or {}).get("arguments", {}).get(parameter)
    return given.get("artifact") if isinstance(given, Mapping) else None


def _one_of(calls: list[dict[str, Any]], kind: str, wanted: str) -> str | None:
    """The table of a kind made from these outputs: the one asked for where it is among them, else the latest."""
    found = [call["result"] for call in calls if call["type"] == kind]
    return wanted if wanted in found else (found[-1] if found else None)


def _read(table: type[Table], digest: str | None) -> list[dict[str, Any]]:
    if digest is None:
        return []
    try:
        return table(digest).rows()
    except StoreError:
        return []


def _by_key(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["question_id"], row["sample"]): row for row in rows}
