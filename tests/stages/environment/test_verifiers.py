"""Environments of the real package `verifiers`: state made anew by replay, the package's own ends and errors, refusals."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.config.recipes import arithmetic_smoke
from flows.config.resolve import choose
from pipeline.config import ConfigError
from pipeline.residency import evict
from pipeline.store import Store, use_store
from stages.environment import VerifiersConfig
from stages.environment.answers import Answer, Dialogue
from stages.environment.function import Verifiers
from stages.tables import ToolCalls
from tests.flows.short_runs import executed_by

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(importlib.util.find_spec("verifiers") is None, reason="the package verifiers is not installed"),
]

TOOLS = '''
from datasets import Dataset
import verifiers as vf

DATA = [{"question": "1+2?", "answer": "3", "info": {"unit": "apples"}}]


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def fail() -> str:
    """Fail."""
    raise RuntimeError("no such luck")


def hang() -> None:
    """Hang."""
    import time
    time.sleep(600)


def load_environment(**more):
    rubric = vf.Rubric(funcs=[], weights=[])
    return vf.ToolEnv(tools=[add, fail, hang], dataset=Dataset.from_list(DATA), rubric=rubric, **more)
'''
GUESS = '''
import os
import random
from datasets import Dataset
import verifiers as vf


class Guess(vf.MultiTurnEnv):
    """Counts guesses in its state, and says whether the last one was too high."""

    async def setup_state(self, state, **kwargs):
        state["guesses"], state["first"] = 0, random.randrange(10**6)
        return state

    async def env_response(self, messages, state, **kwargs):
        state["guesses"] += 1
        with open("asked", "a") as file:
            file.write("x")
        number = int(messages[-1]["content"].rpartition("<guess>")[2].removesuffix("</guess>"))
        secret = int(state["answer"])
        said = [{"role": "user", "content": f"{state['guesses']} of {state['info'].get('most')}, {state['first']}"}]
        if number == secret:
            state["final_env_response"] = [{"role": "user", "content": "found"}]
        if number == 99:
            raise vf.InfraError("the table is gone")
        if number == 98:
            said[0]["content"] += os.urandom(8).hex()
        return said

    @vf.stop
    async def gave_up(self, state):
        return "I give up" in state["trajectory"][-1]["completion"][-1]["content"] if state["trajectory"] else False


def load_environment(most):
    data = [{"question": "Guess.", "answer": "7", "info": {"most": most}}]
    return Guess(dataset=Dataset.from_list(data), rubric=vf.Rubric(funcs=[], weights=[]), system_prompt="Be brief.")
'''
GROUP = """
import verifiers as vf
from two_tools import load_environment as tools


def load_environment():
    return vf.EnvGroup(envs=[tools()])
"""


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("environments")
    for name, text in (
        ("two_tools", TOOLS),
        ("guess_it", GUESS),
        ("not_one", GROUP),
    ):
        (made / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        yield made
    evict("environment verifiers")


def asked(config: VerifiersConfig, *turns: str, calls: tuple[Answer, ...] = (), question: str = "Guess.") -> Answer:
    """Answer one output, of which all turns but the last were answered by `calls`."""
    row = {"question_id": "q", "question": question, "answer": "8"}
    (answer,) = Verifiers(config).answer([Dialogue(row, turns, [vars(call) for call in calls])])
    return answer


def call(name: str, arguments: str = "{}") -> str:
    return f'Let us see.\n<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


TOOL = VerifiersConfig(name="two-tools", deadline=2.0)


def test_a_tool_is_called_with_the_arguments_that_the_policy_wrote() -> None:
    answer = asked(TOOL, call("add", '{"a": 347, "b": 5}'))
    assert (answer.tool, answer.status, answer.done) == ("two-tools", "ok", False)
    assert answer.observation == "\n<tool_response>\n352\n</tool_response>\n"
    assert '"add"' in answer.input


@pytest.mark.parametrize(
    ("turn", "status", "said"),
    [
        (call("fail"), "ok", "no such luck"),
        (call("nothing"), "ok", "'nothing'"),
        ("<tool_call>3 + 4</tool_call>", "refused", "Extra data"),
        ("<tool_call>[1, 2]</tool_call>", "refused", "''"),
        (call("hang"), "timeout", "timeout: not done after 2 s"),
    ],
)
def test_what_is_no_good_call_is_answered_all_the_same(turn: str, status: str, said: str) -> None:
    answer = asked(TOOL, turn)
    assert (answer.status, answer.done) == (status, False)
    assert said in answer.observation


def test_a_turn_without_a_call_ends_the_output() -> None:
    answer = asked(TOOL, "It is 3.</tool_call>")
    assert (answer.done, answer.status) == (True, "ok")


def test_arguments_reach_the_environment() -> None:
    once = VerifiersConfig(name="two-tools", arguments={"max_turns": 1})
    assert asked(once, call("add", '{"a": 1, "b": 2}')).done


GAME = VerifiersConfig(name="guess-it", arguments={"most": 5}, opens="<guess>", closes="</guess>")


def test_a_state_is_made_anew_by_the_earlier_turns(folder: Path) -> None:
    first = asked(GAME, "<guess>3</guess>")
    second = asked(GAME, "<guess>3</guess>", "<guess>4</guess>", calls=(first,))
    count, _, number = first.observation.strip().splitlines()[1].partition(", ")
    assert count == "1 of 5"
    assert f"2 of 5, {number}" in second.observation
    assert (first.input, second.input) == ("3", "4")
    found = asked(GAME, *("<guess>3</guess>", "<guess>4</guess>", "<guess>7</guess>"), calls=(first, second))
    assert found.done
    assert "found" in found.output


def test_without_replay_no_recorded_call_is_made_again(folder: Path) -> None:
    config = GAME.override({"replay": False})
    first = asked(config, "<guess>3</guess>")
    before = (folder / "asked").stat().st_size
    second = asked(config, "<guess>3</guess>", "<guess>4</guess>", calls=(first,))
    assert (folder / "asked").stat().st_size == before + 1
    assert "1 of 5" in second.observation


def test_another_answer_in_the_replay_ends_the_run_by_question() -> None:
    first = asked(GAME, "<guess>98</guess>")
    with pytest.raises(ConfigError, match=r"'q'.*turn 0.*replay"):
        asked(GAME, "<guess>98</guess>", "<guess>4</guess>", calls=(first,))


def test_the_packages_own_error_and_stop_end_the_output() -> None:
    gone = asked(GAME, "<guess>99</guess>")
    assert (gone.status, gone.done) == ("error", True)
    assert "the table is gone" in gone.observation
    assert asked(GAME, "I give up <guess>1</guess>").done


def test_what_the_environment_raises_is_an_error_of_that_call_alone() -> None:
    wrong = asked(GAME, "<guess>many</guess>")
    assert (wrong.status, wrong.done) == ("error", False)
    assert "ValueError" in wrong.observation
    after = asked(GAME, "<guess>many</guess>", "<guess>4</guess>", calls=(wrong,))
    assert "1 of 5" in after.observation


def test_a_question_that_is_not_in_its_data_has_its_own_answer() -> None:
    assert asked(GAME, "<guess>8</guess>", question="Guess mine.").done
    assert "1 of None" in asked(GAME, "<guess>7</guess>", question="Guess mine.").observation


def test_a_run_asks_an_environment_for_each_answer_once(tmp_path: Path) -> None:
    tools = {"kind": "verifiers", "name": "two-tools", "opens": "C", "closes": "m", "after_answer": "="}
    config = arithmetic_smoke().override({"iterations": 1, "steps": 1, "evaluation.every": 0, "environment": tools})
    with use_store(Store(tmp_path)) as store:
        content, executed = executed_by(config)
        assert {"answer_calls", "continue_dialogues"} <= set(executed)
        calls = [ToolCalls(action["result"]) for action in store.actions() if action["stage"] == "answer_calls"]
        # An untrained policy writes no JSON; a turn without `C` makes no call, and ends.
        assert {(row["status"], row["done"]) for table in calls for row in table.rows()} == {
            ("refused", False),
            ("ok", True),
        }
        evict()
        assert executed_by(config) == (content, [])


def test_another_object_than_an_environment_is_refused_by_its_type() -> None:
    with pytest.raises(ConfigError, match=r"'not-one'.*MultiTurnEnv.*EnvGroup"):
        asked(VerifiersConfig(name="not-one"), "</tool_call>")


def test_wrong_arguments_are_refused_before_any_call() -> None:
    with pytest.raises(ConfigError, match=r"'guess-it'.*least"):
        asked(VerifiersConfig(name="guess-it", arguments={"least": 1}), "</tool_call>")


def test_an_environment_that_is_not_there_is_found_with_the_configuration() -> None:
    with pytest.raises(ConfigError, match="no module 'not_there'"):
        choose("arithmetic_smoke", settings=["environment={kind: verifiers, name: not-there}"])
