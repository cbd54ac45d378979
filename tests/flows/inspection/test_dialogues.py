"""Outputs of several turns, as they are shown."""

from __future__ import annotations

from rich.console import Console

from flows.inspection.artifact_view import show_groups
from flows.inspection.groups import Part, groups_of
from pipeline.store import Store
from stages.tables import Rollouts, ToolCalls
from tests.stages.rows import output_row

CALL = {"tool": "calculator", "output": "6", "observation": "=6\n", "status": "ok", "done": False}


def test_a_dialogue_has_its_turns_calls_and_answers_in_order(store: Store) -> None:
    turns = [{"start": 0, "end": 5}, {"start": 8, "end": 11}]  # of [2*3]=6\n6. and the end of sequence
    outputs = Rollouts.write([output_row("q", 0, "[2*3]=6\n6.", turns=turns), output_row("q", 1, "5", turns=None)])
    calls = ToolCalls.write([CALL | {"question_id": "q", "sample": 0, "turn": 0, "input": "2*3"}])
    made = {"result": outputs.digest, "type": "Rollouts", "arguments": {"calls": {"artifact": calls.digest}}}
    groups = list(groups_of(store, outputs.digest, [made]) or ())
    first, second = groups[0].outputs
    assert first.turns == (Part(True, "[2*3]", "calculator '2*3': ok"), Part(False, "=6\n"), Part(True, "6."))
    assert (first.tokens, second.tokens) == (8, 2)
    assert second.turns == ()
    console = Console(record=True, width=100)
    show_groups(groups, console, limit=None, question="q")
    said = [line.split() for line in console.export_text().splitlines()]
    parts = [["policy", "[2*3]"], ["call", "calculator", "'2*3':", "ok"], ["environment", "=6"], ["policy", "6."]]
    assert [line for line in said if line in parts] == parts
