"""Calls in JSON that name their tool: each is handed to that tool, and its result is returned without marks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Final

from stages.environment.answers import Answer, Dialogue, Environment
from stages.environment.config import CalculatorConfig, PythonConfig, ToolCallsConfig
from stages.text.chat_templates import TOOLS

_ARGUMENTS: Final = {name: tool["function"]["parameters"]["required"][0] for name, tool in TOOLS.items()}
"""What the prompt shows is what a call is read by."""


class NamedTools:
    """Implement `Environment`: parse the last call of a turn, and ask the tool that it names."""

    def __init__(self, config: ToolCallsConfig, make: Callable[[CalculatorConfig | PythonConfig], Environment]) -> None:
        """Make the tools; a tool sees a call between its own marks."""
        self._config = config
        self._tools: dict[str, tuple[CalculatorConfig | PythonConfig, Environment]] = {
            tool.kind: (tool, make(tool.override({"before_answer": "", "after_answer": ""}))) for tool in config.tools
        }

    def answer(self, dialogues: Sequence[Dialogue]) -> list[Answer]:
        """Answer the last call of each output; those of one tool together."""
        answers: dict[int, Answer] = {}
        asked: dict[str, list[tuple[int, Dialogue]]] = {name: [] for name in self._tools}
        for place, dialogue in enumerate(dialogues):
            try:
                name, program = self._parse(dialogue.turns[-1])
            except ValueError as error:
                answers[place] = Answer("", "", "", f"error: {error}", "refused")
                continue
            tool, _ = self._tools[name]
            earlier = [call for call in dialogue.calls if call["tool"] == name]
            turns = [*dialogue.turns[:-1], f"{tool.opens}{program}{tool.closes}"]
            asked[name].append((place, dataclasses.replace(dialogue, turns=turns, calls=earlier)))
        for name, mine in asked.items():
            made = self._tools[name][1].answer([dialogue for _, dialogue in mine]) if mine else []
            answers |= {place: answer for (place, _), answer in zip(mine, made, strict=True)}
        return [answers[place] for place in range(len(dialogues))]

    def _parse(self, text: str) -> tuple[str, str]:
        """Return the tool and its argument; raise ValueError saying what was expected and found."""
        _, opened, written = text.removesuffix(self._config.closes).rpartition(self._config.opens)
        if not opened:
            raise ValueError(f"no call: expected one behind {self._config.opens}")
        try:
            call = json.loads(written, strict=False)  # a model writes the newlines of a program as they are
        except (ValueError, RecursionError):
            raise ValueError("not JSON") from None
        if not isinstance(call, dict) or not isinstance(name := call.get("name"), str):
            raise ValueError('expected {"name": ..., "arguments": {...}}')
        if name not in self._tools:
            raise ValueError(f"no tool {name[:40]!r}; there is {', '.join(self._tools)}")
        argument, arguments = _ARGUMENTS[name], call.get("arguments")
        if not isinstance(arguments, dict) or not isinstance(program := arguments.get(argument), str):
            raise ValueError(f'{name}: expected {{"{argument}": "..."}} as arguments')
        return name, program
