"""How a worker process steps an environment of the package `verifiers`: made anew for each call, its earlier turns replayed."""

from __future__ import annotations

import functools
import json
import random
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pipeline.workers.functions import FunctionSource, event_loop, load_function

Message = dict[str, Any]
LONGEST: Final = 2**20
"""Characters of an answer's messages, at most: they are recorded whole."""


@dataclass(frozen=True)
class Stepped:
    """What a worker needs to know of an environment: its settings, and the source of its `load_environment`."""

    source: FunctionSource
    name: str
    arguments: str
    """JSON."""
    opens: str
    closes: str
    replay: bool


class UnfitEnvironmentError(Exception):
    """An environment that cannot answer calls within outputs; says why."""


@functools.lru_cache(maxsize=1)
def load(stepped: Stepped) -> Any:
    """Return the environment.

    Raises:
        UnfitEnvironmentError: one without turns, or that reads no chat messages.
        Whatever `load_environment` raises.
    """
    load_function(stepped.source)
    import datasets
    import verifiers

    datasets.disable_progress_bars()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    environment = verifiers.load_environment(stepped.name, **json.loads(stepped.arguments))
    for number, handler in handlers.items():
        signal.signal(number, handler)  # the package's own would hold up the end of a worker
    if not isinstance(environment, verifiers.MultiTurnEnv) or environment.message_type != "chat":
        raise UnfitEnvironmentError(f"expected a MultiTurnEnv of chat messages, found {type(environment).__name__}")
    return environment


def objection_to(stepped: Stepped) -> str | None:
    """Return why the environment cannot be used, or None."""
    try:
        load(stepped)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def step(
    stepped: Stepped, question: Mapping[str, Any], turns: Sequence[str], calls: Sequence[Mapping[str, Any]]
) -> tuple[bool, str]:
    """Return True and the answer as JSON (`stages/environment/function.py`), or False and why there cannot be one.

    Raises:
        Whatever the environment raises, but for the package's own errors, which end the output.
    """
    try:
        return True, json.dumps(event_loop().run(_step(stepped, question, turns, calls)))
    except UnfitEnvironmentError as error:
        return False, str(error)


async def _step(
    stepped: Stepped, question: Mapping[str, Any], turns: Sequence[str], calls: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    import verifiers

    environment = load(stepped)
    asked = _input(stepped, question)
    random.seed(str(question.get("question_id")))
    state = await environment.init_state(asked, None, "", None)
    messages: list[Message] = []
    written, status = turns[-1].removesuffix(stepped.closes), "ok"
    try:
        state = await environment.setup_state(state)
        messages = list(state["prompt"])
        for place, call in enumerate(calls):
            await _write(stepped, environment, state, messages, turns[place], place)
            messages = await _earlier(stepped, environment, state, call, place)
        written, status = await _write(stepped, environment, state, messages, turns[-1], len(calls))
        if await environment.is_completed(state):
            return {"observation": "", "output": "[]", "input": written, "status": status, "done": True}
        said = await _response(environment, state)
    except verifiers.Error as error:
        observation = f"error: {type(error).__name__}: {error.__cause__ or error}"
        return {"observation": observation, "input": written, "status": "error", "done": True}
    finally:
        if not state["is_completed"]:  # else it has been cleaned up
            await environment._cleanup(state)
    done = state.get("final_env_response") is not None
    return {"observation": _text(said), "output": json.dumps(said), "input": written, "status": status, "done": done}


async def _earlier(
    stepped: Stepped, environment: Any, state: Any, call: Mapping[str, Any], place: int
) -> list[Message]:
    """Return the messages after an earlier turn, with what it was answered."""
    before = _so_far(state)
    if call["status"] not in ("ok", "refused"):  # what timed out or failed changed nothing: the state is made anew
        return [*before, {"role": "user", "content": call["observation"]}]
    recorded: list[Message] = json.loads(call["output"])
    if stepped.replay:
        found = None if await environment.is_completed(state) else await _response(environment, state)
        if found != recorded:
            raise UnfitEnvironmentError(
                f"turn {place} was answered {recorded!r:.200}, and replayed is {found!r:.200}: its answers depend on more than "
                "the question and the turns. If they depend on messages alone, set environment.replay=false"
            )
    return [*before, *recorded]


async def _write(
    stepped: Stepped, environment: Any, state: Any, messages: list[Message], turn: str, place: int
) -> tuple[str, str]:
    """Add a turn of the policy to the state; return what it calls with, and whether that is a call."""
    text = turn.removesuffix(stepped.closes)
    before, opened, written = text.rpartition(stepped.opens)
    message: Message = {"role": "assistant", "content": turn}
    status = "ok"
    if environment.oai_tools and opened:
        function, status = _called(written)
        message = {"role": "assistant", "content": before}
        message["tool_calls"] = [{"id": f"call_{place}", "type": "function", "function": function}]
    said = {"prompt": messages, "completion": [message], "trajectory_id": state["trajectory_id"], "is_truncated": False}
    unknown: dict[str, Any] = {
        "response": None,
        "tokens": None,
        "reward": None,
        "advantage": None,
        "is_truncated": False,
        "extras": {},
    }
    await environment.add_trajectory_step(state, said | unknown)
    return (written if opened else text), status


def _called(written: str) -> tuple[dict[str, str], str]:
    """Return the function's name and its arguments as JSON; what is no call goes to the environment as it is, `refused`."""
    try:
        call = json.loads(written, strict=False)  # a model writes the newlines of a program as they are
        return {"name": str(call["name"]), "arguments": json.dumps(call["arguments"])}, "ok"
    except (ValueError, TypeError, KeyError, RecursionError):
        return {"name": "", "arguments": written}, "refused"


def _so_far(state: Any) -> list[Message]:
    last = state["trajectory"][-1]
    return [*last["prompt"], *last["completion"]]


async def _response(environment: Any, state: Any) -> list[Message]:
    """Return what the environment says after the last turn.

    Raises:
        UnfitEnvironmentError: it rewrites what was said before, or says something that is no text.
    """
    before = _so_far(state)
    messages = await environment.get_prompt_messages(state)
    said: Any = state.get("final_env_response")
    if said is None:
        if messages[: len(before)] != before:
            raise UnfitEnvironmentError("it rewrites earlier messages; ids of an output are appended, and never change")
        said = messages[len(before) :]
    written = json.dumps(said)
    if not isinstance(said, list) or len(written) > LONGEST:
        raise UnfitEnvironmentError(f"expected messages of at most {LONGEST} characters, found {written!r:.200}")
    return list(json.loads(written))


def _text(messages: Sequence[Message]) -> str:
    parts = []
    for message in messages:
        content = message.get("content") or ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part.get("type") != "text":
                raise UnfitEnvironmentError(f"expected messages of text, found a part of type {part.get('type')!r}")
            parts.append(part["text"])
    return "\n".join(parts)


def _input(stepped: Stepped, question: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of the environment's own data that asks this question; else one made of the question."""
    environment = load(stepped)
    text = question.get("question", "")
    if (row := _rows(stepped).get(text)) is not None:
        return dict(row)
    system = [{"role": "system", "content": environment.system_prompt}] if environment.system_prompt else []
    prompt = [*system, {"role": "user", "content": text}]
    return {"prompt": prompt, "answer": question.get("answer", ""), "info": {}, "task": stepped.name, "example_id": 0}


@functools.lru_cache(maxsize=1)
def _rows(stepped: Stepped) -> dict[str, Mapping[str, Any]]:
    """Return the rows of the environment's data by the text of their last message; the first, where several have the same."""
    environment = load(stepped)
    found: dict[str, Mapping[str, Any]] = {}
    for data in (environment.build_dataset(), environment.build_eval_dataset()):
        for row in data if data is not None else ():
            found.setdefault(str(row["prompt"][-1].get("content")), row)
    return found
