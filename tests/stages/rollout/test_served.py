"""Rollouts by a server, with another server behind the address: what it is asked, and what it may answer."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from pipeline.store import Store
from stages.models import load_tokenizer
from stages.rollout import RolloutConfig, VLLMServerConfig, rollout
from stages.rollout.engines import generator_of
from stages.rollout.generator import Output, Prompt, PromptTooLongError, Sampling, UnsoundOutputError
from stages.rollout.probe import StaleWeightsError
from stages.rollout.served import ServedGenerator, ServerError
from stages.text import PromptConfig
from stages.text.stops import StopStrings
from tests.stages.rollout.policies import questions, tiny_policy, uniform_policy

pytestmark = pytest.mark.usefixtures("store")

V = 17
SAMPLING = Sampling(1.0, 6, (1, 3))


class UniformServer(ThreadingHTTPServer):
    """Draws every token with the same probability; token number t is (seed + t) mod V. Fails as often as `failures` says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models: list[dict[str, Any]] = [{"id": "tiny", "max_model_len": 48}]
        self.asked: list[dict[str, Any]] = []
        self.failures: list[int] = []
        self.answer: dict[str, Any] = {}
        self.sampled: dict[str, Any] = {}
        """What replaces parts of the answers to all but the probe."""
        self.delay = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: UniformServer

    def do_GET(self) -> None:
        self._say({"data": self.server.models} if self.path == "/v1/models" else {"version": "0.32.0"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.failures:
            self.send_error(self.server.failures.pop())
            return
        self.server.asked.append(asked)
        time.sleep(self.server.delay / (1 + asked["seed"]))  # the first to be asked is the last to answer
        changes = self.server.answer | ({} if "prompt_logprobs" in asked else self.server.sampled)
        self._say({"choices": [_choice(asked) | changes]})

    def _say(self, what: dict[str, Any]) -> None:
        body = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _choice(asked: dict[str, Any]) -> dict[str, Any]:
    ids: list[int] = []
    while len(ids) < asked["max_tokens"] and not (ids and ids[-1] in asked["stop_token_ids"]):
        ids.append((asked["seed"] + len(ids)) % V)
    logprob = -math.log(V)
    return {
        "token_ids": ids,
        "logprobs": {"token_logprobs": [logprob] * len(ids)},
        "finish_reason": "stop" if ids[-1] in asked["stop_token_ids"] else "length",
        "prompt_logprobs": [None, *({str(token): {"logprob": logprob}} for token in asked["prompt"][1:])],
    }


@pytest.fixture
def server() -> Iterator[UniformServer]:
    with UniformServer() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield running
        running.shutdown()


def _config(server: UniformServer, **changes: Any) -> VLLMServerConfig:
    values = {"url": server.url, "dtype": "float32", "concurrency": 4, "retries": 0, "deadline": 20}
    return VLLMServerConfig.parse(values | changes)


def _generate(config: VLLMServerConfig, *prompts: Prompt, sampling: Sampling = SAMPLING) -> list[list[Output]]:
    with generator_of(uniform_policy(), config) as generator:
        return generator.generate(prompts or [Prompt("a", [5], [4])], sampling)


def test_outputs_come_in_order_whatever_is_answered_first(server: UniformServer) -> None:
    server.delay = 0.05
    outputs = _generate(_config(server), Prompt("a", [5, 6], [4, 34]), Prompt("none", [7], []), Prompt("b", [7], [2]))
    assert [[o.ids.tolist() for o in group] for group in outputs] == [[[4, 5, 6, 7, 8, 9], [0, 1]], [], [[2, 3]]]
    assert [[o.finish_reason for o in group] for group in outputs] == [["length", "stop"], [], ["stop"]]
    np.testing.assert_allclose(outputs[0][0].logprobs, -math.log(V), rtol=1e-6)


def test_every_default_that_the_server_may_have_is_overruled(server: UniformServer) -> None:
    _generate(_config(server), Prompt("a", [5, 6], [2**63 - 1]), sampling=Sampling(0.7, 4, (1, 3)))
    probe, request = server.asked
    assert request == {
        "model": "tiny", "prompt": [5, 6], "seed": 2**63 - 1, "max_tokens": 4, "temperature": 0.7, "stop_token_ids": [1, 3],
        "ignore_eos": True, "logprobs": 0, "return_token_ids": True, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "add_special_tokens": False,
    }  # fmt: skip
    assert (probe["prompt_logprobs"], probe["temperature"]) == (0, 0.7)


def test_outputs_end_at_stop_strings_that_the_server_overlooks(server: UniformServer) -> None:
    """By hand: ids 7, 8, 9 are the characters 1, 2, 3."""
    strings = StopStrings(load_tokenizer(uniform_policy()), ["12"])
    outputs = _generate(_config(server), Prompt("a", [5, 7], [6, 9, 8]), sampling=Sampling(1.0, 4, (1, 10), strings))
    assert [o.ids.tolist() for o in outputs[0]] == [[6, 7, 8], [9, 10], [8, 9, 10]]
    assert all((asked["stop"], asked["include_stop_str_in_output"]) == (["12"], True) for asked in server.asked[1:])


def test_a_server_with_other_weights_is_refused_before_any_output(server: UniformServer) -> None:
    generator = ServedGenerator(tiny_policy(1), _config(server))
    with pytest.raises(StaleWeightsError, match=r"http://.*\(tiny\)"):
        generator.generate([Prompt("a", [5], [4])], SAMPLING)
    assert len(server.asked) == 1
    with pytest.raises(PromptTooLongError, match=r"'long'.* 42 .* 48 .* 43"):  # the server's window counts
        _generate(_config(server), Prompt("long", [5] * 43, [0]))


def test_an_overloaded_server_is_asked_again_and_one_that_refuses_not(server: UniformServer) -> None:
    server.failures = [503]
    assert len(_generate(_config(server, retries=1))[0]) == 1
    server.failures = [400, 400]
    with pytest.raises(ServerError, match="/v1/completions: HTTP 400"):
        _generate(_config(server, retries=5))
    assert server.failures == [400]
    server.failures = [503]
    with pytest.raises(ServerError, match=r"no answer, attempts: 1 \(HTTP 503.*is `vllm serve` running there"):
        _generate(_config(server))


def test_a_server_that_is_absent_too_slow_or_of_several_models_is_refused(server: UniformServer) -> None:
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:1/v1/models: no answer, attempts: 1"):
        _generate(_config(server, url="http://127.0.0.1:1"))
    server.delay = 20.0
    with pytest.raises(ServerError, match="timed out"):
        _generate(_config(server, deadline=0.3))
    server.models.append({"id": "another"})
    with pytest.raises(ServerError, match="tiny, another"):
        _generate(_config(server))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"token_ids": None}, "vLLM 0.32"),
        ({"logprobs": {"token_logprobs": []}}, "as many logprobs as token_ids"),
        # It ended by a stop token of the server's own.
        (
            {"token_ids": [4, 5], "logprobs": {"token_logprobs": [-1.0] * 2}, "finish_reason": "stop"},
            "'a': .* 2 tokens",
        ),
    ],
)
def test_an_answer_that_lacks_what_was_asked_for_is_an_error(
    server: UniformServer, answer: dict[str, Any], message: str
) -> None:
    server.sampled = answer
    with pytest.raises(ServerError, match=message):
        _generate(_config(server))


TEN = [4, 5, 6, 7, 8, 9]
"""Ids of the sampled output of seed 4."""


def _answers(**changes: Any) -> dict[str, Any]:
    return {"token_ids": TEN, "logprobs": {"token_logprobs": [-1.0] * 6}, "finish_reason": "length"} | changes


def _logprob(value: Any) -> dict[str, Any]:
    return _answers(logprobs={"token_logprobs": [-1.0, value, *[-1.0] * 4]})


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (_logprob(None), "token 1: .* None"),
        (_logprob(math.nan), "token 1: .* nan"),
        (_logprob(-math.inf), "token 1: .* -inf"),
        (_logprob(math.inf), "token 1: .* found inf"),
        (_logprob(0.5), "token 1: .* found 0.5"),
        (_logprob(-9999.0), "token 1: .* found -9999"),
        (_logprob("-1.0"), "token 1: .* '-1.0'"),
        (_logprob(False), "token 1: .* False"),
        (_answers(token_ids=[4, V, 6, 7, 8, 9]), f"token 1: .* 0 to 16, .* {V}"),
        (_answers(token_ids=[4, -1, 6, 7, 8, 9]), "token 1: .* found -1"),
        (_answers(token_ids=[4, 2**70, 6, 7, 8, 9]), "token 1: .* 0 to 16"),
        (_answers(token_ids=[4, 5.0, 6, 7, 8, 9]), "ids: token 1: .* 5.0"),
        (_answers(token_ids=[4, "5", 6, 7, 8, 9]), "ids: token 1: .* '5'"),
        (_answers(token_ids=[4, None, 6, 7, 8, 9]), "ids: token 1: .* None"),
        (_answers(token_ids=[4, True, 6, 7, 8, 9]), "ids: token 1: .* True"),
        (_answers(token_ids=[4, 1, 6, 7, 8, 9]), r"'length' of 6 .* \(1, 3\) at \[1\]"),
        (
            _answers(token_ids=[*TEN, 10, 1], logprobs={"token_logprobs": [-1.0] * 8}, finish_reason="stop"),
            "1 to 6 .* 8 and 8",
        ),
    ],
)
def test_values_that_no_engine_can_have_sampled_are_refused_by_name(
    server: UniformServer, answer: dict[str, Any], found: str
) -> None:
    server.sampled = answer
    with pytest.raises(UnsoundOutputError, match=f"^the server {server.url}: question 'a', output 0: .*{found}"):
        _generate(_config(server))


@pytest.mark.parametrize("logprob", [0.0, -0.0, 5e-5, -3, -800.0])
def test_a_certain_token_a_whole_number_and_rounding_are_log_probabilities(
    server: UniformServer, logprob: float
) -> None:
    server.sampled = _logprob(logprob)
    [[output]] = _generate(_config(server))
    assert (output.ids.dtype, output.logprobs.dtype) == (np.dtype("int32"), np.dtype("float32"))
    assert output.logprobs[1] == np.float32(logprob)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (
            {"prompt_logprobs": [None, *[{"5": {"logprob": None}}] * 23]},
            "each of the probe's tokens in prompt_logprobs",
        ),
        ({"prompt_logprobs": None}, "each of the probe's tokens in prompt_logprobs"),
        (
            {"token_ids": [V] * 8, "logprobs": {"token_logprobs": [-1.0] * 8}},
            "behind the probe: token 0: expected an id of the vocabulary",
        ),
        (
            {"logprobs": {"token_logprobs": [None] * 8}},
            "behind the probe: log-probabilities: token 0: expected a number",
        ),
    ],
)
def test_a_probe_s_answer_without_sound_values_is_an_error_by_name(
    server: UniformServer, answer: dict[str, Any], error: str
) -> None:
    server.answer = answer
    with pytest.raises(RuntimeError, match=rf"{server.url}.*{error}"):
        _generate(_config(server))


@pytest.mark.claim("unsound rows of an engine")
def test_nothing_is_written_of_a_server_that_answers_nonsense(server: UniformServer, store: Store) -> None:
    config = RolloutConfig(G=2, max_output_tokens=6, backend=_config(server))
    policy, asked = uniform_policy(), questions("1+1=", "2+2=")

    for sick in (_logprob(None), _logprob(math.nan), _logprob(-math.inf), _logprob(0.5), _answers(token_ids=[V] * 6)):
        server.sampled = sick
        with pytest.raises(UnsoundOutputError, match=r"question 'q0', output 0: .*give the same command again"):
            rollout(policy, asked, PromptConfig(suffix="\n"), config, seed=0)
        assert not any(record["stage"] == "rollout" for record in store.actions())
    server.sampled = {}
    found = rollout(policy, asked, PromptConfig(suffix="\n"), config, seed=0).rows()
    assert [(row["question_id"], row["sample"]) for row in found] == [("q0", 0), ("q0", 1), ("q1", 0), ("q1", 1)]
    assert {round(logprob, 4) for row in found for logprob in row["logprobs"]} == {round(-math.log(V), 4)}
