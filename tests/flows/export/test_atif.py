"""ATIF: an output as a trajectory, with the fields that Harbor's RFC 0001 requires and no others than it knows."""

from __future__ import annotations

from typing import Any

from flows.export.atif import trajectory
from tests.stages.rows import output_row

REQUIRED = {
    "trajectory": {"schema_version", "agent", "steps"},
    "agent": {"name", "version"},
    "step": {"step_id", "source", "message"},
    "tool_call": {"tool_call_id", "function_name", "arguments"},
    "observation": {"results"},
    "result": set[str](),
    "metrics": set[str](),
    "final_metrics": set[str](),
}
"""By object, of RFC 0001, "Schema"."""
OPTIONAL = {
    "trajectory": {"session_id", "trajectory_id", "notes", "final_metrics", "continued_trajectory_ref", "extra"},
    "agent": {"model_name", "tool_definitions", "extra"},
    "step": {"timestamp", "llm_call_count", "extra", "observation"},
    "tool_call": {"extra"},
    "observation": set[str](),
    "result": {"source_call_id", "content", "subagent_trajectory_ref", "extra"},
    "metrics": {
        *("prompt_tokens", "completion_tokens", "cached_tokens", "cost_usd", "extra"),
        *("prompt_token_ids", "completion_token_ids", "logprobs"),
    },
    "final_metrics": {f"total_{name}" for name in ("prompt_tokens", "completion_tokens", "cached_tokens", "cost_usd")}
    | {"total_steps", "extra"},
}
OF_AGENTS = {"model_name", "reasoning_effort", "reasoning_content", "tool_calls", "metrics"}

LINE = {
    **{"run": "r-1", "step": 2, "policy": "p" * 64, "question_id": "q", "sample": 0, "question": "2*3?", "answer": "6"},
    **{"prompt": "Compute 2*3?", "messages": None, "completion": "[2*3]=6\n6.", "prompt_tokens": 1},
    **{"completion_tokens": 7, "truncated": False, "reward": 1.0, "status": "ok", "extracted": "6"},
    **{"components": {"accuracy": 1.0}, "step_rewards": None, "advantage": 0.5, "token_advantages": None},
}
CALL = {"turn": 0, "tool": "calculator", "input": "2*3", "output": "6", "observation": "=6\n", "status": "ok"}


def check(made: dict[str, Any]) -> None:
    """Compare the fields of every object with those of the RFC."""

    def fields(kind: str, found: dict[str, Any]) -> None:
        assert REQUIRED[kind] <= found.keys() <= REQUIRED[kind] | OPTIONAL[kind], (kind, found.keys())

    fields("trajectory", made)
    fields("agent", made["agent"])
    fields("final_metrics", made["final_metrics"])
    assert [step["step_id"] for step in made["steps"]] == list(range(1, len(made["steps"]) + 1))
    for step in made["steps"]:
        assert step["source"] in ("system", "user", "agent")
        fields("step", {name: value for name, value in step.items() if name not in OF_AGENTS})
        assert step["source"] == "agent" or not OF_AGENTS & step.keys()
        fields("metrics", step.get("metrics", {}))
        for call in step.get("tool_calls", ()):
            fields("tool_call", call)
        for result in step.get("observation", {"results": ()})["results"]:
            fields("result", result)
            assert result.get("source_call_id") in [
                None,
                *(call["tool_call_id"] for call in step.get("tool_calls", ())),
            ]


def dialogue(**changes: Any) -> dict[str, Any]:
    """Return `[2*3]`, the answer `=6` and a line, `6.` and the end of sequence."""
    turns = [{"start": 0, "end": 5}, {"start": 8, "end": 11}]
    logprobs = [-0.5] * 5 + [None] * 3 + [-0.25] * 3
    return output_row("q", 0, "[2*3]=6\n6.", turns=turns) | {"logprobs": logprobs} | changes


def test_a_dialogue_is_a_step_for_each_turn_with_its_ids_call_and_answer() -> None:
    made = trajectory(LINE, dialogue(), [CALL])
    check(made)
    assert made["schema_version"] == "ATIF-v1.7"
    assert (made["session_id"], made["trajectory_id"]) == ("r-1", "r-1/2/q/0")
    assert (made["agent"]["name"], made["agent"]["model_name"]) == ("cohort", "p" * 64)
    asked, first, second = made["steps"]
    assert asked == {"step_id": 1, "source": "user", "message": "Compute 2*3?"}
    assert first["message"] == "[2*3]"
    call = {"tool_call_id": "call-0", "function_name": "calculator", "arguments": {"input": "2*3"}}
    assert first["tool_calls"] == [call]
    about = {"status": "ok", "output": "6"}
    assert first["observation"]["results"] == [{"source_call_id": "call-0", "content": "=6\n", "extra": about}]
    assert first["metrics"] == {
        "prompt_tokens": 1,
        "completion_tokens": 5,
        "prompt_token_ids": [1],
        "completion_token_ids": [2, 3, 4, 5, 6],
        "logprobs": [-0.5] * 5,
    }
    # What the policy read before its second turn: the prompt, the first turn, and the answer.
    assert second["metrics"]["prompt_token_ids"] == [1, *range(2, 10)]
    assert second["metrics"]["completion_token_ids"] == [10, 11, 12]
    assert (second["message"], second["metrics"]["logprobs"]) == ("6.", [-0.25] * 3)
    assert made["final_metrics"] == {"total_prompt_tokens": 10, "total_completion_tokens": 8, "total_steps": 3}
    known = {"step", "question_id", "sample", "question", "answer", "truncated", "reward", "status", "extracted"}
    assert made["extra"].keys() == known | {"components", "advantage"}


def test_messages_of_the_chat_before_the_output_are_steps_of_their_own() -> None:
    roles = ("system", "user", "assistant", "tool", "assistant")
    made = trajectory(LINE | {"messages": [{"role": role, "content": role} for role in roles]}, dialogue(), [CALL])
    check(made)
    assert [(step["source"], step["message"]) for step in made["steps"]] == [
        ("system", "system"),
        ("user", "user"),
        ("agent", "[2*3]"),
        ("agent", "6."),
    ]


def test_an_answer_without_room_is_that_of_the_last_turn() -> None:
    row = output_row("q", 0, "[2*3]", cut=True, turns=None)
    made = trajectory(LINE, row, [CALL])
    check(made)
    assert made["steps"][-1]["observation"]["results"][0]["content"] == "=6\n"


def test_an_answer_of_an_unknown_call_has_no_call() -> None:
    made = trajectory(LINE, dialogue(), [])
    check(made)
    assert "tool_calls" not in made["steps"][1]
    assert made["steps"][1]["observation"] == {"results": [{"content": "=6\n"}]}


def test_a_demonstration_has_no_model_and_no_log_probabilities() -> None:
    made = trajectory(LINE | {"policy": None}, output_row("q", 0, "6", turns=None) | {"logprobs": None}, [])
    check(made)
    assert "model_name" not in made["agent"]
    assert made["steps"][-1].keys() == {"step_id", "source", "message", "metrics"}
    assert "logprobs" not in made["steps"][-1]["metrics"]
