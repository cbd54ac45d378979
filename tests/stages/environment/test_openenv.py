"""A real server of OpenEnv, asked by its own client: state by replay, refusals, and a server that is not there."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.config.recipes import arithmetic_smoke
from pipeline.config import ConfigError
from pipeline.residency import evict
from pipeline.store import Store, use_store
from stages.environment import OpenEnvConfig
from stages.environment.answers import Answer, Dialogue
from stages.environment.openenv import OpenEnv
from stages.tables import ToolCalls
from tests.flows.short_runs import executed_by

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(importlib.util.find_spec("openenv") is None, reason="the package openenv-core is not installed"),
]

SERVER = """
import os
import time
from openenv.core.env_server import Action, Environment, Observation, State, create_app


class Say(Action):
    say: str


class Heard(Observation):
    text: str = ""
    count: int = 0


class Echo(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, answer="", question="", **more):
        self.count, self.seed, self.answer, self.more = 0, seed, answer, more
        return Heard()

    def step(self, action, timeout_s=None, **more):
        self.count += 1
        if action.say == "raise":
            raise ValueError("no such move")
        if action.say in ("hang", "wait"):
            time.sleep(30 if action.say == "hang" else 0.5)
        chance = os.urandom(4).hex() if action.say == "random" else ""
        text = f"{self.count}. {action.say} {self.seed} {sorted(self.more)}{chance}"
        return Heard(text=text, count=self.count, done=action.say == self.answer, reward=1.0)

    @property
    def state(self):
        return State(step_count=self.count)


app = create_app(Echo, Say, Heard, env_name="echo", max_concurrent_envs=4)
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "echo.py").write_text(SERVER)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "echo:app", "--port", str(port), "--log-level", "error"]
    process = subprocess.Popen(command, cwd=folder)
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            with socket.socket() as asking:
                if asking.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def asked(config: OpenEnvConfig, *turns: str, calls: tuple[Answer, ...] = ()) -> Answer:
    """Answer one output, of which all turns but the last were answered by `calls`."""
    question = {"question_id": "q", "question": "Say it.", "answer": "it", "solution": None}
    rows = [{"turn": place, **vars(call)} for place, call in enumerate(calls)]
    (answer,) = OpenEnv(config).answer([Dialogue(question, [f"<tool_call>{turn}</tool_call>" for turn in turns], rows)])
    return answer


def test_an_action_is_json_or_the_field_that_is_named(url: str) -> None:
    whole = asked(OpenEnvConfig(url=url), '{"say": "hello"}')
    named = asked(OpenEnvConfig(url=url, action="say", observation="text"), "hello")
    assert (whole.tool, whole.status, named.status, named.done) == ("openenv", "ok", "ok", False)
    assert whole.output == named.output
    assert f"\n{whole.output}\n" in whole.observation
    assert '"text": "1. hello ' in whole.output
    assert named.observation.startswith("\n<tool_response>\n1. hello ")
    assert named.observation.endswith("['question_id']\n</tool_response>\n")


def test_a_state_is_made_anew_by_the_earlier_calls_and_done_ends_it(url: str) -> None:
    config = OpenEnvConfig(url=url, action="say", observation="text")
    first = asked(config, "a")
    failed = asked(config, "a", "raise", calls=(first,))
    third = asked(config, "a", "raise", "b", calls=(first, failed))
    assert '"count": 2' in third.output
    assert asked(config, "a", "raise", "b", "it", calls=(first, failed, third)).done
    alone = config.override({"replay": False})
    assert '"count": 1' in asked(alone, "a", "b", calls=(first,)).output


@pytest.mark.parametrize(
    ("call", "status", "said"),
    [
        ("say it", "refused", "a JSON object"),
        ('["say"]', "refused", "a JSON object"),
        ('{"sing": "it"}', "refused", "Invalid message"),
        ('{"say": "raise"}', "error", "no such move"),
        ('{"say": "hang"}', "timeout", "not done after 1 s"),
    ],
)
def test_what_a_call_comes_to_is_its_status(url: str, call: str, status: str, said: str) -> None:
    answer = asked(OpenEnvConfig(url=url, deadline=1.0), call)
    assert (answer.status, answer.done) == (status, False)
    assert said in answer.observation


def test_a_replay_that_is_observed_otherwise_ends_the_run(url: str) -> None:
    config = OpenEnvConfig(url=url, action="say")
    first = asked(config, "random")
    with pytest.raises(ConfigError, match=r"question 'q', turn 0.*environment.replay"):
        asked(config, "random", "b", calls=(first,))


def test_an_observation_without_the_field_ends_the_run(url: str) -> None:
    with pytest.raises(ConfigError, match=r"environment.observation: .*'words'.* count"):
        asked(OpenEnvConfig(url=url, action="say", observation="words"), "a")


def test_no_server_and_no_session_left_stop_the_run_by_the_url(url: str) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        nothing = f"http://127.0.0.1:{listening.getsockname()[1]}"
    with pytest.raises(ConnectionError, match=nothing):
        asked(OpenEnvConfig(url=nothing), '{"say": "a"}')
    many = [Dialogue({"question_id": "q"}, ["<tool_call>wait</tool_call>"], [])] * 6
    with pytest.raises(ConnectionError, match=r"environment.sessions=6"):
        OpenEnv(OpenEnvConfig(url=url, action="say", sessions=6)).answer(many)
    assert len(OpenEnv(OpenEnvConfig(url=url, action="say", sessions=3)).answer(many)) == 6


def test_a_run_asks_a_server_for_each_answer_once(url: str, tmp_path: Path) -> None:
    server = {"kind": "openenv", "url": url, "action": "say", "opens": "C", "closes": "m", "after_answer": "="}
    config = arithmetic_smoke().override({"iterations": 1, "steps": 1, "evaluation.every": 0, "environment": server})
    with use_store(Store(tmp_path)) as store:
        content, executed = executed_by(config)
        assert {"answer_calls", "continue_dialogues"} <= set(executed)
        calls = [ToolCalls(action["result"]) for action in store.actions() if action["stage"] == "answer_calls"]
        assert {row["status"] for table in calls for row in table.rows()} == {"ok", "refused"}
        evict()
        assert executed_by(config) == (content, [])
