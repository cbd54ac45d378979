"""Groups of outputs for reading: a question, its G outputs, their rewards and advantages, found and joined by key.

Given any table of a step (rollouts, rewards or advantages), the others are found through the recorded stage calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.artifact import Table
from pipeline.store import Store
from pipeline.store.files import StoreError
from stages.tables import Advantages, Demonstrations, Questions, Rewards, Rollouts

__all__ = ["Group", "Output", "groups_of"]

Record = dict[str, Any]


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


def groups_of(store: Store, digest: str, calls: Sequence[Record] | None = None) -> Iterator[Group] | None:
    """The groups that a table of rollouts, rewards or advantages is about; None for anything else.

    Rewards and advantages belong together: advantages are shown with the rewards they were estimated from. Tables that were
    never computed, or whose payload is gone, leave their columns empty.

    Args:
        calls: what `store.actions()` has, where that was read already.
    """
    kind = store.manifest(digest).get("type")
    if kind not in ("Rollouts", "Rewards", "Advantages"):
        return None
    calls = list(store.actions()) if calls is None else calls
    tables = _tables(kind, digest, calls)
    return None if tables is None else _groups(tables, calls)


@dataclass(frozen=True)
class _Tables:
    """Digests of tables that belong together."""

    outputs: str
    rewards: str | None
    advantages: str | None


def _tables(kind: str, digest: str, calls: Sequence[Record]) -> _Tables | None:
    """The tables that belong to one of them; of several made from the same outputs or rewards the latest."""
    made = next((call for call in calls if call["result"] == digest), None)
    outputs = digest if kind == "Rollouts" else _artifact(made, "outputs")
    if outputs is None:
        return None
    beside = [call for call in calls if _artifact(call, "outputs") == outputs]
    estimates = [call for call in beside if call["type"] == "Advantages"]
    match kind:
        case "Advantages":
            return _Tables(outputs, _artifact(made, "rewards"), digest)
        case "Rewards":
            estimates = [call for call in estimates if _artifact(call, "rewards") == digest]
            return _Tables(outputs, digest, estimates[-1]["result"] if estimates else None)
    scored = [call["result"] for call in beside if call["type"] == "Rewards"]
    rewards = _artifact(estimates[-1], "rewards") if estimates else None
    return _Tables(outputs, rewards or (scored or [None])[-1], estimates[-1]["result"] if estimates else None)


def _groups(tables: _Tables, calls: Sequence[Record]) -> Iterator[Group]:
    made = next((call for call in reversed(calls) if call["result"] == tables.outputs), None)
    beside = [call for call in calls if _artifact(call, "outputs") == tables.outputs]
    # Outputs that were selected or demonstrated were not made from questions: take those they were scored with, or shown in.
    questions = next((found for call in [made, *beside] if (found := _artifact(call, "questions"))), None)
    asked = _read(Questions, questions) or _read(Demonstrations, _artifact(made, "demonstrations"))
    by_id = {row["question_id"]: row for row in asked}
    rewards, advantages = _by_key(_read(Rewards, tables.rewards)), _by_key(_read(Advantages, tables.advantages))
    groups: dict[str, list[Output]] = {}
    for row in Rollouts(tables.outputs).rows():
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


def _artifact(call: Mapping[str, Any] | None, parameter: str) -> str | None:
    """Digest of the artifact that a recorded call was given."""
    given = (call or {}).get("arguments", {}).get(parameter)
    return given.get("artifact") if isinstance(given, Mapping) else None


def _read(table: type[Table], digest: str | None) -> list[dict[str, Any]]:
    if digest is None:
        return []
    try:
        return table(digest).rows()
    except StoreError:
        return []


def _by_key(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["question_id"], row["sample"]): row for row in rows}
