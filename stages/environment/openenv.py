"""Servers of OpenEnv: a session for each call, in which the output's earlier calls are stepped again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pipeline.config import ConfigError
from stages.environment.answers import Answer, Dialogue, Status, cut, plain, side_by_side
from stages.environment.config import OpenEnvConfig

_REFUSED: Final = ("VALIDATION_ERROR", "INVALID_JSON")
_RAISED: Final = "EXECUTION_ERROR"
_GIVEN: Final = ("question_id", "question", "answer")


class OpenEnv:
    """Implement `Environment`: what the server observes after an action."""

    def __init__(self, config: OpenEnvConfig) -> None:
        """Take the settings; raise ConfigError without the package."""
        config.key()
        self._config = config

    def answer(self, dialogues: Sequence[Dialogue]) -> list[Answer]:
        """Answer the last call of each.

        Raises:
            ConfigError: a replayed step observes something else than recorded; an observation without the field.
            ConnectionError: no server, or none with a session left.
        """
        return side_by_side(self._answer, dialogues, most=self._config.sessions)

    def _answer(self, dialogue: Dialogue) -> Answer:
        config = self._config
        _, opened, call = dialogue.turns[-1].removesuffix(config.closes).rpartition(config.opens)
        action = self._action(call) if opened else None
        if action is None:
            expected = f"expected an action behind {config.opens}" + ("" if config.action else ", a JSON object")
            return self._said(call if opened else "", "", "refused", f"error: {expected}")
        try:
            observed, done = self._step(dialogue, action)
        except TimeoutError:
            return self._said(call, "", "timeout", f"timeout: not done after {config.deadline:g} s")
        except _ServerError as error:
            return self._said(call, "", "refused" if error.code in _REFUSED else "error", f"error: {error}")
        shown = observed if config.observation is None else observed.get(config.observation)
        if shown is None:
            raise ConfigError(
                f"environment.observation: expected {config.observation!r} among the fields of an observation, found "
                f"{', '.join(observed)}"
            )
        text = plain(shown) if isinstance(shown, str) else _json(shown)
        return self._said(call, _json(observed), "ok", text, done=done)

    def _action(self, call: str) -> dict[str, Any] | None:
        """Return the action that a call is; None where it is none."""
        if self._config.action is not None:
            return {self._config.action: call}
        try:
            found = json.loads(call, strict=False)
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def _step(self, dialogue: Dialogue, action: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Return what is observed after the action, and whether the episode is over."""
        from openenv.core import GenericEnvClient
        from websockets.exceptions import WebSocketException

        config, question = self._config, dialogue.question
        try:
            with GenericEnvClient(base_url=config.url, message_timeout_s=config.deadline) as client:
                given = {name: question[name] for name in _GIVEN if question.get(name) is not None}
                _sent(client.reset, seed=_seed(question), **given)
                for call in dialogue.calls if config.replay else ():
                    if call["status"] == "ok":
                        self._replay(client, call, str(question.get("question_id")))
                found = _sent(client.step, action)
                return dict(found.observation), bool(found.done)
        except (WebSocketException, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise ConnectionError(
                f"environment.url {config.url}: {error}. Nothing was recorded: once the server is there, with at least "
                f"environment.sessions={config.sessions} sessions, the same command goes on"
            ) from error

    def _replay(self, client: Any, call: Mapping[str, Any], question_id: str) -> None:
        observed = _json(_sent(client.step, self._action(call["input"])).observation)
        if observed != call["output"]:
            raise ConfigError(
                f"environment.url {self._config.url}: question {question_id!r}, turn {call['turn']}: {call['output']:.200} was "
                f"recorded, and {observed:.200} is observed now: its answers depend on more than question, seed and actions. "
                "If they depend on the action alone, set environment.replay=false"
            )

    def _said(self, call: str, output: str, status: Status, text: str, *, done: bool = False) -> Answer:
        config = self._config
        observation = f"{config.before_answer}{cut(text, config.max_observation)}{config.after_answer}"
        return Answer("openenv", call, output, observation, status, done)


class _ServerError(Exception):
    def __init__(self, said: str, code: str) -> None:
        super().__init__(said)
        self.code = code


def _sent(send: Any, *arguments: Any, **named: Any) -> Any:
    """Return the server's answer.

    Raises:
        _ServerError: the server does not take the action, or it raises there.
        ConnectionError: any other error of the server.
    """
    try:
        return send(*arguments, **named)
    except RuntimeError as error:
        found = re.fullmatch(r"Server error: (.*) \(code: (\w+)\)", str(error), re.DOTALL)
        if found and found[2] in (*_REFUSED, _RAISED):
            raise _ServerError(found[1], found[2]) from None
        raise ConnectionError(str(error)) from error


def _seed(question: Mapping[str, Any]) -> int:
    return int.from_bytes(hashlib.sha256(str(question.get("question_id")).encode()).digest()[:4], "big") >> 1


def _json(value: Any) -> str:
    return plain(json.dumps(value, sort_keys=True, ensure_ascii=False))
