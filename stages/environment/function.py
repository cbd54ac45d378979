"""Environments in worker processes that are killed at the deadline: a user's function, those of the package `verifiers`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Final, get_args

from pipeline.config import ConfigError
from pipeline.residency import evict, kept, resident
from pipeline.workers.functions import SourceChangedError, call_plainly, find_source, load_function, require_callable
from pipeline.workers.pool import KillablePool, Outcome
from stages.environment.answers import Answer, Dialogue, Status, cut, plain
from stages.environment.config import FunctionConfig, VerifiersConfig
from stages.environment.verifiers_worker import Stepped, load, objection_to, step

_SIDE_BY_SIDE: Final = 8
_LONGEST: Final = 2**20
"""Characters of a recorded `input` or `output`, at most."""
_START: Final = 120.0
"""Seconds in which an environment of `verifiers` must be there, its data included."""
_ARGUMENTS: Final = ("question", "turns", "calls")
_TYPES: Final = {"observation": str, "status": str, "done": bool, "input": str, "output": str}
_EXPECTED: Final = (
    "a text, or a mapping with the text `observation` and, where needed, `done` (true or false), `input` and `output` (texts), "
    f"`status` ({', '.join(get_args(Status))})"
)


class Function:
    """Implement `Environment`: what the function answers, or what became of its call."""

    def __init__(self, config: FunctionConfig) -> None:
        """Take the settings; raise ConfigError as `find_source`."""
        self._config, self._source = config, find_source(config.function)

    def answer(self, dialogues: Sequence[Dialogue]) -> list[Answer]:
        """Answer the last call of each, eight side by side.

        Raises:
            ConfigError: a function that cannot be called, or answers with something else.
            RuntimeError: workers that are lost.
        """
        config, source = self._config, self._source
        prepare, workers = functools.partial(load_function, source), min(len(dialogues), _SIDE_BY_SIDE)
        pool = workers_for("environment function", source, workers, config.memory_mb, prepare)
        require_callable(source, _ARGUMENTS, pool, "it gets these by name")
        tasks = [
            (source, {"question": each.question, "turns": list(each.turns), "calls": list(each.calls)})
            for each in dialogues
        ]
        outcomes = pool.run(call_plainly, tasks, deadline_s=config.deadline)
        return [self._answer(dialogue, outcome) for dialogue, outcome in zip(dialogues, outcomes, strict=True)]

    def _answer(self, dialogue: Dialogue, outcome: Outcome) -> Answer:
        found = None if outcome.fault else self._found(*outcome.value)
        return answer_of(dialogue, outcome, found, self._config, tool=self._source.name)

    def _found(self, fits: bool, answer: str) -> dict[str, Any]:
        """Return what the function answered as a mapping, without its fields of None."""
        found = json.loads(answer) if fits else None
        if isinstance(found, str):
            return {"observation": found}
        fields = {name: value for name, value in found.items() if value is not None} if isinstance(found, dict) else {}
        objection = _objection_to(fields) if isinstance(found, dict) else type(found).__name__ if fits else answer
        if objection is not None:
            where = f"{self._config.function!r} in {self._source.file}"
            raise ConfigError(f"environment.function {where}: expected {_EXPECTED}; found {objection}")
        return fields


def workers_for(
    slot: str, subject: Hashable, workers: int, memory_mb: int, prepare: Callable[[], object]
) -> KillablePool:
    """Return the processes in `slot` that were made ready for `subject`, where they are enough; else new ones."""
    key = (subject, memory_mb)
    there: KillablePool | None = kept(slot, key)
    if there is not None and there.workers >= workers:
        return there
    evict(slot)
    make = functools.partial(
        KillablePool, workers=workers, memory_mb=memory_mb, preload=(load_function.__module__,), prepare=prepare
    )
    return resident(slot, key, make)


def answer_of(
    dialogue: Dialogue,
    outcome: Outcome,
    found: dict[str, Any] | None,
    config: FunctionConfig | VerifiersConfig,
    *,
    tool: str,
) -> Answer:
    """Return what a call came to: what was `found`, or the fault that took it.

    Raises:
        ConfigError: the source has changed while calls were answered.
        RuntimeError: workers that are lost.
    """
    match outcome.fault:
        case None:
            assert found is not None
        case "timeout":
            found = {"status": "timeout", "observation": f"timeout: not done after {config.deadline:g} s"}
        case "memory":
            found = {"status": "memory", "observation": f"memory: more than {config.memory_mb} MiB"}
        case "error" if outcome.detail.startswith(SourceChangedError.__name__):
            raise ConfigError(f"environment: {tool!r}: {outcome.detail}")
        case "error" | "crash":
            found = {"status": "error", "observation": f"error: {outcome.detail}"}
        case "lost":
            raise RuntimeError(f"environment: the worker processes of {tool!r} are lost: {outcome.detail}")
    said, last = found["observation"], dialogue.turns[-1]
    ended = next((end for end in config.call_ends if last.endswith(end)), "")
    return Answer(
        tool=tool,
        input=plain(found.get("input", last.removesuffix(ended)))[:_LONGEST],
        output=plain(found.get("output", said))[:_LONGEST],
        observation=f"{config.before_answer}{cut(plain(said), config.max_observation)}{config.after_answer}",
        status=found.get("status", "ok"),
        done=found.get("done", False),
    )


class Verifiers:
    """Implement `Environment`: what the package's environment says after a turn."""

    def __init__(self, config: VerifiersConfig) -> None:
        """Take the settings; raise ConfigError without the package or the environment's module."""
        self._config = config
        arguments, names = (
            json.dumps(config.arguments),
            config.model_dump(include={"name", "opens", "closes", "replay"}),
        )
        self._stepped = Stepped(source=config.source(), arguments=arguments, **names)

    def answer(self, dialogues: Sequence[Dialogue]) -> list[Answer]:
        """Answer the last call of each.

        Raises:
            ConfigError: an environment that does not load, or cannot answer calls within outputs.
            RuntimeError: workers that are lost.
        """
        config, stepped = self._config, self._stepped
        prepare, workers = functools.partial(load, stepped), min(len(dialogues), config.workers)
        pool = workers_for("environment verifiers", stepped, workers, config.memory_mb, prepare)
        (loaded,) = pool.run(objection_to, [(stepped,)], deadline_s=_START)
        self._refuse(f"{loaded.fault}: {loaded.detail}" if loaded.fault else loaded.value)
        tasks = [(stepped, dict(each.question), list(each.turns), list(each.calls)) for each in dialogues]
        answers = []
        for dialogue, outcome in zip(dialogues, pool.run(step, tasks, deadline_s=config.deadline), strict=True):
            fits, answer = (True, "null") if outcome.fault else outcome.value
            self._refuse(None if fits else f"question {dialogue.question.get('question_id')!r}: {answer}")
            answers.append(answer_of(dialogue, outcome, json.loads(answer), config, tool=config.name))
        return answers

    def _refuse(self, objection: str | None) -> None:
        if objection is not None:
            raise ConfigError(f"environment.name {self._config.name!r}: {objection}")


def _objection_to(found: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a mapping, or None."""
    for name, value in found.items():
        if name not in _TYPES:
            return f"a mapping with {name!r}"
        if not isinstance(value, _TYPES[name]):
            return f"{type(value).__name__} as {name}"
    if "observation" not in found:
        return "a mapping without `observation`"
    status = found.get("status", "ok")
    return None if status in get_args(Status) else f"{status!r:.100} as status"
