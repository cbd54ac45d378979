"""Join groups of outputs for reading: a question, its G outputs, their rewards and advantages.

Given any table of a step (rollouts, rewards or advantages), the recorded stage calls lead to the others.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from flows.runs.ledger import EvaluationCalls, Ledger
from pipeline.artifact import Table
from pipeline.store import Store, StoreError, use_store
from stages.environment import parts_of
from stages.join import KEY, align, group_rows, written_lengths
from stages.tables import Advantages, Demonstrations, Questions, Rewards, Rollouts, ToolCalls

Record = dict[str, Any]
_SHOWN: Final = ("estimate_advantages", "score", "rollout")
"""Stages whose tables lead to groups, the one that leads to most first."""


class Part(NamedTuple):
    """Hold a turn of an output, or the answer to it."""

    own: bool
    """Whether the policy wrote it."""
    text: str
    tool: str = ""
    """What a turn called; empty where no call is known."""
    given: str = ""
    """Its input."""
    status: str = ""
    """How the call ended."""


@dataclass(frozen=True)
class Output:
    """One output, or several equal ones of a group."""

    text: str
    tokens: int
    """Those that the policy wrote."""
    finish_reason: str
    reward: float | None
    status: str
    extracted: str | None
    advantage: float | None
    """Of its first token; None where the row is masked or there are no advantages."""
    turns: tuple[Part, ...] = ()
    """Who wrote what, in order, where an environment wrote some of it."""


@dataclass(frozen=True)
class Group:
    """A question and its outputs in the order they were sampled."""

    question_id: str
    question: str
    answer: str
    outputs: list[Output]

    def merged(self) -> list[tuple[int, Output]]:
        """Return equal outputs once, with their count."""
        return [(count, output) for output, count in Counter(self.outputs).items()]


def groups_of(store: Store, digest: str, calls: Sequence[Record] | None = None) -> Iterator[Group] | None:
    """Return the groups that a table of rollouts, rewards or advantages is about; None for anything else.

    Advantages are shown with the rewards they were estimated from. Tables that were never computed, or whose payload is gone,
    leave their columns empty.

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
    """Return the tables that belong to one of them; of several made from the same outputs or rewards the latest."""
    made = next((call for call in calls if call["result"] == digest), None)
    outputs = digest if kind == "Rollouts" else _artifact(made, "outputs")
    if outputs is None:
        return None
    related = [call for call in calls if _artifact(call, "outputs") == outputs]
    estimates = [call for call in related if call["type"] == "Advantages"]
    match kind:
        case "Advantages":
            return _Tables(outputs, _artifact(made, "rewards"), digest)
        case "Rewards":
            estimates = [call for call in estimates if _artifact(call, "rewards") == digest]
            return _Tables(outputs, digest, estimates[-1]["result"] if estimates else None)
    scored = [call["result"] for call in related if call["type"] == "Rewards"]
    rewards = _artifact(estimates[-1], "rewards") if estimates else None
    return _Tables(outputs, rewards or (scored or [None])[-1], estimates[-1]["result"] if estimates else None)


def _groups(tables: _Tables, calls: Sequence[Record]) -> Iterator[Group]:
    made = next((call for call in reversed(calls) if call["result"] == tables.outputs), None)
    related = [call for call in calls if _artifact(call, "outputs") == tables.outputs]
    # Outputs that were selected or demonstrated were not made from questions: take those they were scored with, or shown in.
    questions = next((found for call in [made, *related] if (found := _artifact(call, "questions"))), None)
    columns = ["text", "text_ends", "output_ids", "turns", "finish_reason"]
    outputs = Rollouts(tables.outputs).read([*KEY, *columns])
    joined = pa.table(
        {
            "text": outputs["text"],
            "tokens": written_lengths(outputs),
            "finish_reason": outputs["finish_reason"],
            **_columns(outputs, Rewards, tables.rewards, "reward", "status", "extracted"),
            **_columns(outputs, Advantages, tables.advantages, "advantage"),
        }
    )
    names, group_N = group_rows(outputs["question_id"])
    about = _about(names, _read(Questions, questions), _read(Demonstrations, _artifact(made, "demonstrations")))
    answered = next((call["result"] for call in related if call.get("stage") == "keep_calls"), _artifact(made, "calls"))
    turns = _turns(outputs, _read(ToolCalls, answered))
    places = np.split(np.argsort(group_N, kind="stable"), np.cumsum(np.bincount(group_N))[:-1])
    for name, asked, rows in zip(names, about, places, strict=False):
        yield Group(
            name,
            *asked,
            [
                _output(row, turns.get(at, ()))
                for at, row in zip(rows.tolist(), joined.take(rows).to_pylist(), strict=True)
            ],
        )


def _columns(outputs: pa.Table, kind: type[Table], digest: str | None, *names: str) -> dict[str, pa.ChunkedArray]:
    """Return columns of a table in the order of the outputs; null where the table has no row, or is gone."""
    found = align(outputs, _read(kind, digest).select([*KEY, *names]), kind.__name__, extra=True, missing=True)
    return {name: found[name] for name in names}


def _output(row: Record, turns: tuple[Part, ...]) -> Output:
    advantage = row["advantage"]
    named = {"status": row["status"] or "", "advantage": advantage[0] if advantage else None, "turns": turns}
    return Output(**row | named)


def _turns(outputs: pa.Table, calls: pa.Table) -> dict[int, tuple[Part, ...]]:
    """Return by row the parts of outputs that an environment wrote some of; turns with their calls where these are known."""
    keys = ("question_id", "sample", "turn")
    known = {tuple(row[name] for name in keys): row for row in calls.to_pylist()}
    found: dict[int, tuple[Part, ...]] = {}
    for at in np.flatnonzero(outputs["turns"].is_valid()).tolist():
        row = outputs.slice(at, 1).to_pylist()[0]
        parts, turn = list[Part](), 0
        for own, text in parts_of(row):
            call = known.get((row["question_id"], row["sample"], turn)) if own else None
            parts.append(Part(own, text, *(call[name] for name in ("tool", "input", "status") if call)))
            turn += own
        found[at] = tuple(parts)
    return found


def _about(names: Sequence[str], questions: pa.Table, demonstrations: pa.Table) -> list[tuple[str, str]]:
    """Return text and gold answer of each question, as far as they are known."""
    table = questions if questions.num_rows else demonstrations
    known, known_N = group_rows(table["question_id"])
    last_Q = np.zeros(len(known), dtype=np.int64)
    last_Q[known_N] = np.arange(len(known_N))  # a question may have several demonstrations
    wanted = pa.table({"question_id": pa.array(names, pa.string())})
    found = align(wanted, table.take(last_Q), "questions", by=["question_id"], extra=True, missing=True).to_pylist()
    return [
        ("(the questions are not in the store)", "")
        if row["question"] is None
        else (row["question"], row.get("answer", ""))
        for row in found
    ]


def _artifact(call: Mapping[str, Any] | None, parameter: str) -> str | None:
    """Return the digest of the artifact that a recorded call was given."""
    given = (call or {}).get("arguments", {}).get(parameter)
    return given.get("artifact") if isinstance(given, Mapping) else None


def _read(table: type[Table], digest: str | None) -> pa.Table:
    """Read a table; without rows where there is none, or its payload is gone."""
    if digest is not None:
        with contextlib.suppress(StoreError):
            return table(digest).read()
    return table.schema.empty_table()


def completion_rows(store: Store, ledger: Ledger, count: int = 16) -> list[dict[str, Any]]:
    """The final policy's answers to the first `count` questions of the first held-out set, a row each.

    Greedy ones where the run has them, else the first sample of each question. Runs of one experiment have equal questions in
    equal order. Of outputs that an environment answered, the completion names who wrote what.

    Raises:
        StoreError: a table of the evaluation is gone or pruned.
    """
    evaluation = last_evaluation(ledger)
    groups = groups_made(store, ledger, evaluation.artifacts) if evaluation else []
    return [
        {
            # MLflow lines runs up by the first column and shows the second: these two need no click.
            "question": group.question,
            "completion": _said(group.outputs[0]),
            "status": group.outputs[0].status,
            "reward": group.outputs[0].reward,
            "answer": group.answer,
            "question_id": group.question_id,
        }
        for group in groups[:count]
    ]


def _said(output: Output) -> str:
    """Return the text; of a dialogue who wrote what, in quotes, and how calls ended.

    MLflow's table shows lines as one: quotes within a text are doubled, so that nothing written reads as a turn.
    """
    if not output.turns:
        return output.text
    lines = []
    for part in output.turns:
        lines.append(f"{'policy' if part.own else 'environment'} «{part.text.strip().replace('»', '»»')}»")
        lines += [f"call of {part.tool}: {part.status}"] if part.tool else []
    return "\n".join(lines)


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
    """Whether a call made outputs, took these, or none: rewards of other outputs may have the same content."""
    if call["type"] == "Rollouts":
        return True
    given = call["arguments"].get("outputs")
    return not isinstance(given, Mapping) or given.get("artifact") in made


def _action(store: Store, key: str) -> dict[str, Any] | None:
    try:
        return store.action(key)
    except StoreError:
        return None
