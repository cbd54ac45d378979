"""What a chat template writes around a question: rendered apart from it, within a deadline, and the same on every day.

The template sees a stand-in for the question, so that no user text runs through it. What comes out must have the stand-in once,
as it is; must not depend on the clock, on chance or on the question; and must hold the system message where there is one.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class PromptError(ValueError):
    """Text that cannot become a prompt; names the character, token or template at fault."""


RESERVED: Final = ("messages", "add_generation_prompt", "tools", "documents", "strftime_now", "raise_exception")
"""What a template is given by Cohort, or never is."""
_SECONDS: Final = 5
"""Of processor time; templates take milliseconds."""
_DEADLINE: Final = 60.0
"""Seconds on the clock, where the system does not limit processor time, or is very busy."""
_SCRIPT: Final = Path(__file__).with_name("template_rendering.py")
TOOLS: Final[dict[str, dict[str, Any]]] = {
    name: {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {argument: {"type": "string", "description": meaning}},
                "required": [argument],
            },
        },
    }
    for name, description, argument, meaning in (
        ("python", "Run a Python program; return what it prints.", "code", "The program."),
        ("calculator", "Return the value of an expression.", "expression", "Numbers, + - * / and parentheses."),
    )
}
"""What a template is shown of the built-in tools, as JSON schemas."""
_CLOCKS: Final = ("2001-02-03T04:05:06.000007", "2026-11-28T19:54:43.210000", "2034-07-16T11:30:59.999000")
"""No two alike in year, month, day, weekday, hour, half of the day, minute or second."""
_QUESTION: Final = "\ue000\ue001"
"""Private-use characters, which no template trims or tests for."""
_SYSTEM: Final = "\ue002\ue003"
_CALL: Final = "\ue004\ue005"
_OTHER: Final = "Is <b> & \"c\" or 'd' {e}, \\f? <|x|> [/INST] </think> z\n0"
"""Another question, of what templates escape, cut or look for."""
_ADDRESS: Final = re.compile(r"<[^<>]* at 0x[0-9a-f]+>", re.IGNORECASE)


class ChatTurn(NamedTuple):
    """The parts of a conversation before and after the question."""

    before: str
    after: str


def chat_turn(
    tokenizer: PreTrainedTokenizerFast,
    *,
    template: str | None,
    system: str | None,
    lead: str,
    tail: str,
    variables: Mapping[str, Any],
) -> ChatTurn:
    """Return what the template writes before the question and behind it, up to the answer of the assistant.

    Args:
        template: in Jinja; None: the tokenizer's own.
        system: the system message; None: none.
        lead, tail: text of the user's message before and behind the question.
        variables: further variables of the template.

    Raises:
        PromptError: no template; one that fails, takes too long, reads the clock, draws at random, or does not write what it is
            given; or a variable that it does not read.
    """

    def conversation(question: str, instruction: str | None) -> list[dict[str, str]]:
        first = [] if instruction is None else [{"role": "system", "content": instruction}]
        return [*first, {"role": "user", "content": lead + question + tail}]

    conversations = [conversation(_QUESTION, system), conversation(_OTHER, system)]
    conversations += [] if system is None else [conversation(_QUESTION, _SYSTEM)]
    made = _rendered(tokenizer, template, variables, conversations)
    if "error" in made:
        role = " with a system message (prompt.system)" if system is not None else ""
        raise PromptError(f"the chat template cannot be rendered{role}: {made['error']}")
    _require_read(variables, made["reads"])
    turn, other, *probe = [_steady(renderings) for renderings in made["rendered"]]
    before, found, after = turn.partition(_QUESTION)
    if not found or _QUESTION in after:
        raise PromptError("the chat template does not write the user's message exactly once, as it is")
    if other != before + _OTHER + after:
        raise PromptError(
            "the chat template changes the user's message, or writes something else around another one; a question must "
            "stand in the prompt as it is"
        )
    if probe and system is not None and (probe[0].count(_SYSTEM) != 1 or system.strip() not in turn):
        raise PromptError(
            "the chat template does not write the system message (prompt.system) exactly once, as it is, or has no system "
            "role; set prompt.system=null, or give a prompt.chat_template that has one"
        )
    return ChatTurn(before, after)


def answer_end(tokenizer: PreTrainedTokenizerFast, template: str | None, variables: Mapping[str, Any]) -> str:
    """Return what the template writes behind an answer of the assistant; empty where it does not render one as it is.

    Args:
        template, variables: as of `chat_turn`.
    """
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _CALL}]
    made = _rendered(tokenizer, template, variables, [turns])
    return "" if "error" in made else str(made["rendered"][0][0].partition(_CALL)[2])


def tool_turn(tokenizer: PreTrainedTokenizerFast, template: str | None, variables: Mapping[str, Any]) -> ChatTurn:
    """Return what the template writes between an assistant's call and the tool's answer, and behind it up to the next turn.

    Args:
        template, variables: as of `chat_turn`.

    Raises:
        PromptError: no template, or one that does not write a message of the role `tool` once, as it is; or a variable that it
            does not read.
    """
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _CALL}]
    made = _rendered(tokenizer, template, variables, [[*turns, {"role": "tool", "content": _SYSTEM}]])
    if "error" in made:
        raise PromptError(f"the chat template cannot render a message of the role tool: {made['error']}")
    _require_read(variables, made["reads"])
    _, called, behind = _steady(made["rendered"][0]).partition(_CALL)
    before, answered, after = behind.partition(_SYSTEM)
    if not called or not answered or _SYSTEM in after:
        raise PromptError(
            "the chat template does not write an answer of the assistant and a message of the role tool behind it, each once, "
            "as it is; give a prompt.chat_template that does, or take an environment whose calls stand between marks"
        )
    return ChatTurn(before, after)


def _rendered(
    tokenizer: PreTrainedTokenizerFast, template: str | None, variables: Mapping[str, Any], conversations: Sequence[Any]
) -> dict[str, Any]:
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return _render(json.dumps([template or _own(tokenizer), special | dict(variables), conversations]))


def _own(tokenizer: PreTrainedTokenizerFast) -> str:
    if not tokenizer.chat_template:
        raise PromptError(
            "chat is 'tokenizer', but this tokenizer has no chat template; set chat to another value, or chat_template"
        )
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise PromptError(f"this tokenizer names several chat templates, none of them the default: {error}") from None


def _steady(renderings: Sequence[str]) -> str:
    """Return the one text that is rendered whatever the time."""
    if found := _ADDRESS.search("".join(renderings)):
        raise PromptError(
            f"the chat template writes an address of memory, which every process has another of: {found[0]}"
        )
    if len(set(renderings)) > 1:
        raise PromptError(
            "the chat template reads the clock (strftime_now): the prompts of a run would change from day to day; give it the "
            "date by prompt.chat_template_kwargs (date_string, where it reads that), or set prompt.chat_template to one without"
        )
    return renderings[0]


def _require_read(variables: Mapping[str, Any], reads: Sequence[str]) -> None:
    unread = sorted(set(variables) - set(reads))
    if unread:
        known = sorted(set(reads) - set(RESERVED)) or ["nothing else"]
        raise PromptError(
            f"prompt.{'tools' if unread[0] == 'tools' else 'chat_template_kwargs'}: the chat template does not read "
            f"{unread[0]!r}; it reads {', '.join(known)}"
        )


@functools.lru_cache(maxsize=128)
def _render(given: str) -> dict[str, Any]:
    """Render a template with its variables and conversations (JSON) in the script; once a process."""
    template, variables, conversations = json.loads(given)
    spec = {"template": template, "variables": variables, "conversations": conversations, "clocks": _CLOCKS}
    command = [sys.executable, "-P", str(_SCRIPT), str(_SECONDS)]
    try:
        done = subprocess.run(
            command, input=json.dumps(spec), capture_output=True, text=True, encoding="utf-8", timeout=_DEADLINE
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it did not end within {_DEADLINE:g} s"}
    if done.returncode < 0:
        return {"error": f"it did not end within {_SECONDS} s of processor time (signal {-done.returncode})"}
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        return {"error": f"its process ended with code {done.returncode}: {last[:300]}"}
    return found
