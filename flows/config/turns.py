"""Name what environments and their tools do not go with."""

from __future__ import annotations

from collections.abc import Iterator

from flows.config.parts import RunSettings
from stages.environment import ToolCallsConfig


def turn_complaints(config: RunSettings) -> Iterator[str]:
    """Yield what is wrong with outputs of several turns: calls that end none, or that a part of the run cannot read."""
    yield from _of_shown_tools(config)
    if config.environment is None:
        return
    ends, strings, plan = config.environment.call_ends, config.rollout.stop_strings, config.reward_model
    if not config.rollout.stop:
        yield "rollout.stop: an output that does not stop makes no call; set rollout.stop=true, or environment=null"
    for end in ends:
        if other := next((string for string in strings if string in end or end in string), None):
            yield (
                f"rollout.stop_strings: {other!r} and the end of a call, {end!r}, are found in each other, so that one of them "
                "never ends a turn; remove it"
            )
    if plan is not None and plan.step_labels.kind == "monte_carlo":
        yield (
            "reward_model.step_labels: monte_carlo continues an output within its only turn, and with an environment outputs "
            "have several; set reward_model.step_labels.kind=rules, or environment=null"
        )


def _of_shown_tools(config: RunSettings) -> Iterator[str]:
    """Refuse calls in JSON without a chat template, and tools that the prompt shows and nothing answers."""
    environment, prompt = config.environment, config.prompt
    calls = environment if isinstance(environment, ToolCallsConfig) else None
    if calls and prompt.chat != "tokenizer":
        yield (
            "environment.kind: answers of tool_calls are messages of the chat template; set prompt.chat=tokenizer, or take "
            "another environment"
        )
    answered = {tool.kind for tool in calls.tools} if calls else set()
    if unknown := [name for name in prompt.tool_names if name not in answered]:
        yield (
            f"prompt.tools: {unknown[0]} is shown to the model, and no tool of the environment has that name; remove it, or "
            "set environment.kind=tool_calls with such a tool"
        )
