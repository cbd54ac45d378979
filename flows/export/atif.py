"""An output as a trajectory in ATIF, the Agent Trajectory Interchange Format (RFC 0001 of Harbor), version 1.7."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pipeline.store.context import package_versions
from stages.environment import parts_of
from stages.join import turns_of

Record = Mapping[str, Any]
VERSION: Final = "ATIF-v1.7"
"""The first with identities of trajectories, and with `extra` at calls and results."""
_ELSEWHERE: Final = ("run", "policy", "prompt", "messages", "completion", "prompt_tokens", "completion_tokens")
"""What a trajectory has under names of ATIF's own; all else that is known of an output is its `extra`."""


def trajectory(line: Record, output: Record, calls: Sequence[Record]) -> dict[str, Any]:
    """Return an output as a trajectory.

    The dialogue before the output is steps of `system` and `user`; without a chat template the prompt's text is the user's.
    Every turn is a step of `agent` with the ids that the policy read and wrote, their log-probabilities, its call, and as
    `observation` what the environment answered. Nothing is null: what is not known is left out.

    Args:
        line: of the output, as `export_completions` writes it.
        output: its row of `Rollouts`.
        calls: its rows of `ToolCalls`.
    """
    asked = [message for message in line["messages"] or () if message["role"] in ("system", "user")]
    asked = asked or [{"role": "user", "content": line["prompt"]}]
    first = [{"source": message["role"], "message": message["content"]} for message in asked]
    turns = _turns(output, {call["turn"]: call for call in calls})
    steps = [{"step_id": number, **step} for number, step in enumerate([*first, *turns], 1)]
    metrics = [turn["metrics"] for turn in turns]
    return _known(
        schema_version=VERSION,
        session_id=line["run"],
        trajectory_id=f"{line['run']}/{line['step']}/{line['question_id']}/{line['sample']}",
        agent=_known(name="cohort", version=package_versions().get("cohort-rl", "unknown"), model_name=line["policy"]),
        steps=steps,
        final_metrics={
            "total_prompt_tokens": sum(part["prompt_tokens"] for part in metrics),
            "total_completion_tokens": sum(part["completion_tokens"] for part in metrics),
            "total_steps": len(steps),
        },
        extra=_known(**{name: value for name, value in line.items() if name not in _ELSEWHERE}),
    )


def _turns(output: Record, calls: Mapping[int, Record]) -> list[dict[str, Any]]:
    ids, logprobs = output["output_ids"], output["logprobs"]
    parts = parts_of(output)
    texts, answers = [text for own, text in parts if own], [text for own, text in parts if not own]
    turns = []
    for number, ((start, end), text, answer) in enumerate(itertools.zip_longest(turns_of(output), texts, answers)):
        metrics = {
            "prompt_tokens": len(output["prompt_ids"]) + start,
            "completion_tokens": end - start,
            "prompt_token_ids": [*output["prompt_ids"], *ids[:start]],
            "completion_token_ids": ids[start:end],
        }
        sampled = {"logprobs": logprobs[start:end]} if logprobs else {}
        turns.append(
            {"source": "agent", "message": text, **_call(number, calls.get(number), answer)}
            | {"metrics": metrics | sampled, **({"llm_call_count": 1} if logprobs else {})}
        )
    return turns


def _call(turn: int, call: Record | None, answer: str | None) -> dict[str, Any]:
    """Return the call of a turn and what came of it; of a call that no table has, the answer alone."""
    if call is None:
        return {} if answer is None else {"observation": {"results": [{"content": answer}]}}
    name = f"call-{turn}"
    made = {"tool_call_id": name, "function_name": call["tool"], "arguments": {"input": call["input"]}}
    about = {"status": call["status"], "output": call["output"]}
    result = {"source_call_id": name, "content": call["observation"], "extra": about}
    return {"tool_calls": [made], "observation": {"results": [result]}}


def _known(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
