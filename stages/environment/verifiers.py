"""Environments of the package `verifiers`, in worker processes that are killed at the deadline."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Final

from pipeline.config import ConfigError
from stages.environment.answers import Answer, Dialogue
from stages.environment.config import VerifiersConfig
from stages.environment.function import answer_of, workers_for
from stages.environment.verifiers_worker import Stepped, load, objection_to, step

_START: Final = 120.0
"""Seconds in which an environment must be there, its data included."""


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
