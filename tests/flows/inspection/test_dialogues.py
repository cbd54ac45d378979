"""Outputs of several turns, as they are shown."""

from __future__ import annotations

from rich.console import Console

from flows.inspection.artifact_view import show_groups
from flows.inspection.groups import Part, completion_rows, groups_of
from flows.runs.ledger import Call, EvaluationCalls, Ledger
from pipeline.store import Store
from stages.environment import CalculatorConfig, answer_calls
from stages.selection import keep_calls
from stages.tables import Questions, Rollouts, ToolCalls
from tests.stages.rows import output_row

CALL = {"tool": "calculator", "output": "6", "observation": "=6\n", "status": "ok", "done": False}


def test_a_dialogue_has_its_turns_calls_and_answers_in_order(store: Store) -> None:
    turns = [{"start": 0, "end": 5}, {"start": 8, "end": 11}]  # of [2*3]=6\n6. and the end of sequence
    outputs = Rollouts.write([output_row("q", 0, "[2*3]=6\n6.", turns=turns), output_row("q", 1, "5", turns=None)])
    calls = ToolCalls.write([CALL | {"question_id": "q", "sample": 0, "turn": 0, "input": "2*3"}])
    made = {"result": outputs.digest, "type": "Rollouts", "arguments": {"calls": {"artifact": calls.digest}}}
    groups = list(groups_of(store, outputs.digest, [made]) or ())
    first, second = groups[0].outputs
    assert first.turns == (Part(True, "[2*3]", "calculator", "2*3", "ok"), Part(False, "=6\n"), Part(True, "6."))
    assert (first.tokens, second.tokens) == (8, 2)
    assert second.turns == ()
    console = Console(record=True, width=100)
    show_groups(groups, console, limit=None, question="q")
    said = [line.split() for line in console.export_text().splitlines()]
    parts = [["policy", "[2*3]"], ["call", "calculator", "'2*3':", "ok"], ["environment", "=6"], ["policy", "6."]]
    assert [line for line in said if line in parts] == parts


def test_a_dialogue_says_who_wrote_what_and_how_calls_ended(store: Store) -> None:
    asked = [{"question_id": name, "question": f"{name}?", "answer": "6", "solution": None} for name in ("q", "r")]
    waiting = Rollouts.write([output_row("q", 0, "[2*3]", cut=True, finish_reason="call"), output_row("r", 0, "6")])
    calls = answer_calls(waiting, Questions.write(asked), None, CalculatorConfig())
    said = "[2*3]=6\n»6« environment «7»."
    turns = [{"start": 0, "end": 5}, {"start": 8, "end": len(said)}]
    outputs = Rollouts.write([output_row("q", 0, said, cut=True, turns=turns), output_row("r", 0, "6", turns=None)])
    kept = keep_calls(outputs, [waiting], [calls])
    made = {"rollout": outputs.digest, "keep_calls": kept.digest}
    ledger = Ledger(
        {str(call.action): Call("s", call.digest, 0.0) for call in (kept, calls)},
        evaluations=[EvaluationCalls(1, "in", "greedy", made)],
    )
    first, second = completion_rows(store, ledger)
    assert first["completion"] == (
        "policy «[2*3]»\ncall of calculator: ok\nenvironment «=6»\npolicy «»»6« environment «7»».»"
    )
    assert second["completion"] == "6"
