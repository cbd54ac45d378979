"""Rollouts by vLLM, with our own worker process and another engine in it: orders, replies, and every way to fail."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from flows.config.recipes import RECIPES
from pipeline.config import ConfigError
from pipeline.progress import listen
from pipeline.residency import _residents, evict, resident
from pipeline.store import Store
from pipeline.workers.group import WorkerError
from stages.models import Checkpoint, load_tokenizer
from stages.rollout import HFBackendConfig, RolloutConfig, VLLMBackendConfig, VLLMServerConfig, rollout
from stages.rollout.config import environments_of, require_vllm
from stages.rollout.engines import generator_of
from stages.rollout.generator import (
    HF,
    VLLM,
    Output,
    Prompt,
    PromptTooLongError,
    Sampling,
    UnsoundOutputError,
    make_room,
)
from stages.rollout.probe import StaleWeightsError
from stages.rollout.vllm import Engine, deal
from stages.text import PromptConfig
from stages.text.stops import StopStrings
from stages.training import hardware
from tests.stages.rollout.policies import questions, tiny_policy, uniform_policy
from tests.stages.rollout.uniform_vllm import PLATFORM, make_environment

pytestmark = pytest.mark.usefixtures("store")

SAMPLING = Sampling(1.0, 6, (1, 3))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_environment(tmp_path_factory.mktemp("uniform"))


@pytest.fixture
def backend(python: Path) -> Iterator[VLLMBackendConfig]:
    asked = python.with_name("vllm") / "asked.jsonl"
    asked.unlink(missing_ok=True)
    yield VLLMBackendConfig(python=python, dtype="float32", start_deadline=30, deadline=20)
    evict()


def _asked(backend: VLLMBackendConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (backend.python.with_name("vllm") / "asked.jsonl").read_text().splitlines()]


def _generate(
    policy: Checkpoint, backend: VLLMBackendConfig, *, seed: int = 0, prompt: Prompt | None = None
) -> list[list[Output]]:
    with generator_of(policy, backend) as generator:
        return generator.generate([prompt or Prompt("a", [5], [seed])], SAMPLING)


def _engine() -> Engine:
    engine = _residents[VLLM][1]
    assert isinstance(engine, Engine)
    return engine


def test_outputs_come_in_order_whatever_ends_first(backend: VLLMBackendConfig) -> None:
    """By hand: token t of a request is (seed + t) mod V, and all V = 17 are equally likely."""
    policy = uniform_policy()
    counted: list[tuple[int, int]] = []
    with generator_of(policy, backend) as generator:
        prompts = [Prompt("a", [5, 6], [4, 34]), Prompt("b", [7], [2]), Prompt("none", [7], [])]
        outputs = generator.generate(prompts, SAMPLING, lambda *counts: counted.append(counts))
    vocabulary = json.loads((policy.path / "config.json").read_text())["vocab_size"]
    assert vocabulary == 17
    assert [[o.ids.tolist() for o in group] for group in outputs] == [[[4, 5, 6, 7, 8, 9], [0, 1]], [[2, 3]], []]
    assert [[o.finish_reason for o in group] for group in outputs] == [["length", "stop"], ["stop"], []]
    for output in (output for group in outputs for output in group):
        np.testing.assert_allclose(output.logprobs, -math.log(17), rtol=1e-6)
        assert (output.ids.dtype, output.logprobs.dtype) == (np.int32, np.float32)
    assert counted[-1] == (3, 10)


@pytest.mark.parametrize(("seed", "found"), [(15, "token 0: .*found nan"), (16, "token 0: .*0 to 16, found 17")])
def test_values_that_no_engine_can_have_sampled_are_refused_by_name(
    backend: VLLMBackendConfig, seed: int, found: str
) -> None:
    with pytest.raises(UnsoundOutputError, match=f"^vllm: question 'a', output 0: {found}"):
        _generate(uniform_policy(), backend, seed=seed)
    assert len(_generate(uniform_policy(), backend)[0]) == 1, "the next call has a fresh engine"


def test_vllm_is_asked_for_nothing_that_would_change_the_distribution(
    backend: VLLMBackendConfig,
) -> None:
    with generator_of(uniform_policy(), backend) as generator:
        generator.generate([Prompt("a", [5, 6], [2**63 - 1, 8])], Sampling(0.7, 4, (1, 3)))
    start, probe, *requests = _asked(backend)
    assert start["files"] == ["config.json", "generation_config.json", "model.safetensors"]
    assert start["extension"] == "cohort_worker.Repacking"
    expected = {
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        "dtype": "float32",
        "max_model_len": 64,
        "enforce_eager": True,
    }
    assert expected.items() <= start["engine"].items()
    assert (probe["temperature"], probe["prompt_logprobs"], len(probe["prompt"])) == (0.7, 0, 24)
    assert [request["seed"] for request in requests] == [2**63 - 1, 8]
    sampled = {
        "temperature": 0.7, "max_tokens": 4, "stop_token_ids": [1, 3], "ignore_eos": True, "logprobs": 0,
        "detokenize": False, "prompt_logprobs": None, "prompt": [5, 6],
    }  # fmt: skip
    assert [{key: request[key] for key in request if key != "seed"} for request in requests] == [sampled] * 2


def test_outputs_end_at_stop_strings_that_vllm_overlooks(backend: VLLMBackendConfig) -> None:
    """By hand: ids 7, 8, 9 are the characters 1, 2, 3. This engine looks for no strings, and goes on to a stop id."""
    policy = uniform_policy()
    sampling = Sampling(1.0, 6, (9, 12), StopStrings(load_tokenizer(policy), ["12", "45"]))
    prompts = [Prompt("a", [5, 7], [6, 9, 10], begun=1), Prompt("b", [5, 7], [8], begun=1), Prompt("c", [5, 7], [8])]
    with generator_of(policy, backend, stop_strings=True) as generator:
        outputs = generator.generate(prompts, sampling)
    assert [[o.ids.tolist() for o in group] for group in outputs] == [[[6, 7, 8], [9], [10, 11]], [[8]], [[8, 9]]]
    assert {o.finish_reason for group in outputs for o in group} == {"stop"}
    start, _, *requests = _asked(backend)
    assert not start["engine"]["skip_tokenizer_init"]
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(start["files"])
    asked = [(r["stop"], r["include_stop_str_in_output"], r["detokenize"]) for r in requests]
    assert asked == [(["12", "45"], True, True)] * 5


def test_an_engine_with_a_tokenizer_is_another_than_one_without(backend: VLLMBackendConfig) -> None:
    policy = uniform_policy()
    for strings in (False, False, True, True):
        with generator_of(policy, backend, stop_strings=strings):
            pass
    assert [entry["engine"]["skip_tokenizer_init"] for entry in _asked(backend) if "engine" in entry] == [True, False]


def test_the_stage_writes_the_same_table_as_with_hf(backend: VLLMBackendConfig, store: Store) -> None:
    policy, asked = uniform_policy(), questions("1+2", "7")
    config = RolloutConfig(G=2, max_output_tokens=5, backend=backend)
    seen: list[dict[str, Any]] = []
    with listen(lambda topic, values: seen.append({"topic": topic, **values})):
        table = rollout(policy, asked, PromptConfig(suffix="\n"), config, seed=0)
    ours = rollout(policy, asked, PromptConfig(suffix="\n"), config.override({"backend.kind": "hf"}), seed=0)
    assert table.read().schema.equals(ours.read().schema, check_metadata=True)
    same = ("question_id", "sample", "prompt_ids", "temperature", "seed")
    assert [[row[name] for name in same] for row in table.rows()] == [
        [row[name] for name in same] for row in ours.rows()
    ]
    assert store.manifest(table.digest)["provenance"]["packages"]["vllm"] == "0.32.0 (float32, cpu)"
    assert set(table.metrics) == set(ours.metrics)
    assert {report["topic"] for report in seen} == {"rollout"}
    assert (seen[-1]["done"], seen[-1]["total"]) == (4, 4)


def test_an_engine_that_reports_a_reload_and_keeps_its_weights_is_caught(backend: VLLMBackendConfig) -> None:
    """This one stays uniform whatever it loads."""
    backend = backend.override({"probe_every": 1})
    first, second, prompts = uniform_policy(), tiny_policy(1), [Prompt("a", [5], [4])]
    with generator_of(first, backend) as generator:
        before = generator.generate(prompts, SAMPLING)
    with pytest.raises(StaleWeightsError, match=r"probe differ by \d.* nats .*Checkpoint.*\(expected at most 0\.002"):
        _generate(second, backend)
    assert [entry["rpc"] for entry in _asked(backend) if "rpc" in entry] == ["reload_weights", "repack_weights"]
    with generator_of(first, backend) as generator:  # another engine
        assert generator.generate(prompts, SAMPLING)[0][0].ids.tolist() == before[0][0].ids.tolist()
    assert sum("engine" in entry for entry in _asked(backend)) == 2


def test_stale_weights_are_caught_within_the_policies_between_two_probes(backend: VLLMBackendConfig) -> None:
    backend, caught = backend.override({"probe_every": 3}), None
    _generate(uniform_policy(), backend)  # the engine starts, and is probed
    for number in range(1, 6):
        try:
            _generate(tiny_policy(number), backend)
        except StaleWeightsError:
            caught = number
            break
    assert caught == 3


def _two(backend: VLLMBackendConfig) -> VLLMBackendConfig:
    return backend.override({"data_parallel": 2})


def test_two_engines_share_the_questions_and_answer_as_one(backend: VLLMBackendConfig) -> None:
    """By hand: groups of 2, 1, 2 and 1 outputs go to the engine that has the fewest, 0 1 1 0; a group stays whole."""
    prompts = [Prompt("a", [5], [4, 34]), Prompt("b", [6], [2]), Prompt("c", [7], [5, 6]), Prompt("d", [8], [0])]
    found, counted = {}, []
    for chosen in (backend, _two(backend)):
        with generator_of(uniform_policy(), chosen) as generator:
            counted.clear()
            found[chosen.data_parallel] = generator.generate(prompts, SAMPLING, lambda *counts: counted.append(counts))
    assert [[o.ids.tolist() for o in group] for group in found[2]] == [
        [[4, 5, 6, 7, 8, 9], [0, 1]], [[2, 3]], [[5, 6, 7, 8, 9, 10], [6, 7, 8, 9, 10, 11]], [[0, 1]],
    ]  # fmt: skip
    for ours, theirs in zip(found[1], found[2], strict=True):
        assert [o.ids.tolist() for o in ours] == [o.ids.tolist() for o in theirs]
    assert counted[-1] == (6, 24), "progress is that of both"
    assert deal([len(prompt.seeds) for prompt in prompts], 2) == [[0, 3], [1, 2]]
    files = sorted(_engine()._folder.glob("requests-*.npz"))
    assert [np.load(file)["seeds"].tolist() for file in files] == [[4, 34, 0], [2, 5, 6]]


def test_an_engine_without_a_question_waits_for_the_others(backend: VLLMBackendConfig) -> None:
    assert [len(group) for group in _generate(uniform_policy(), _two(backend))] == [1]
    assert sum("engine" in entry for entry in _asked(backend)) == 2


def test_one_engine_of_several_that_dies_takes_all_with_it(backend: VLLMBackendConfig) -> None:
    policy, prompts = uniform_policy(), [Prompt("a", [5], [4]), Prompt("b", [5], [13])]
    _generate(policy, _two(backend))
    pids = _engine()._group.pids
    with (
        pytest.raises(WorkerError, match=r"vllm, rank 1 of 2 ended with exit code 3(.|\n)*out of luck"),
        generator_of(policy, _two(backend)) as generator,
    ):
        generator.generate(prompts, SAMPLING)
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert VLLM not in _residents


def test_each_of_several_engines_is_probed(backend: VLLMBackendConfig) -> None:
    with pytest.raises(StaleWeightsError, match=r"vllm, engine 0 of 2: .*probe differ"):
        _generate(tiny_policy(1), _two(backend))
    probes = [entry for entry in _asked(backend) if entry.get("prompt_logprobs") == 0]
    assert len(probes) == 2


@pytest.mark.parametrize(
    ("settings", "visible", "expected"),
    [
        ({"data_parallel": 2}, "4,5,6", ["4", "5"]),
        ({"data_parallel": "auto"}, "4,5,6", ["4", "5", "6"]),
        ({"data_parallel": "auto", "tensor_parallel_size": 2}, "0,1,2,3,4", ["0,1", "2,3"]),
        ({"data_parallel": 2, "tensor_parallel_size": 2}, "GPU-a,GPU-b,GPU-c,GPU-d", ["GPU-a,GPU-b", "GPU-c,GPU-d"]),
    ],
)
def test_engines_have_gpus_of_their_own(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], visible: str, expected: list[str]
) -> None:
    monkeypatch.setattr(hardware, "training_device", lambda: "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = environments_of(VLLMBackendConfig().override(settings))
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in found] == expected
    assert all("VLLM_CPU_OMP_THREADS_BIND" not in environment for environment in found)


def test_more_engines_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "training_device", lambda: "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(ConfigError, match=r"data_parallel: .*need 4 GPUs, found 3; .*at most 1$"):
        environments_of(VLLMBackendConfig(data_parallel=2, tensor_parallel_size=2))


@pytest.mark.parametrize(
    ("cores", "settings", "expected"),
    [
        ({0, 1, 2, 3}, {"data_parallel": 2}, ["0,1", "2,3"]),
        ({3, 5, 6, 9, 11}, {"data_parallel": 2, "threads": 1}, ["3", "6"]),
        ({0, 1, 2, 3}, {"data_parallel": 2, "tensor_parallel_size": 2}, ["0|1", "2|3"]),
        ({7}, {"data_parallel": 2}, ["nobind", "nobind"]),
        ({0, 1}, {"data_parallel": "auto"}, [None]),
    ],
)
def test_engines_on_a_cpu_have_cores_of_their_own(
    monkeypatch: pytest.MonkeyPatch, cores: set[int], settings: dict[str, Any], expected: list[str | None]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    found = environments_of(VLLMBackendConfig().override(settings))
    assert [environment.get("VLLM_CPU_OMP_THREADS_BIND") for environment in found] == expected


@pytest.mark.slow
def test_an_order_for_other_weights_than_the_engine_holds_is_refused(backend: VLLMBackendConfig) -> None:
    first, second = uniform_policy(), tiny_policy(1)
    message = f"asked for outputs of {second.digest}, but the engine holds"
    with generator_of(first, backend), pytest.raises(StaleWeightsError, match=message):
        _engine().generate(second, [Prompt("a", [5], [4])], SAMPLING, None)


@pytest.mark.slow
def test_an_engine_that_dies_is_named_with_its_last_lines(
    backend: VLLMBackendConfig,
) -> None:
    policy = uniform_policy()
    with pytest.raises(WorkerError, match=r"vllm ended with exit code 3(.|\n)*out of luck"):
        _generate(policy, backend, seed=13)
    assert _generate(policy, backend, seed=4)[0][0].ids[0] == 4


@pytest.mark.slow
def test_an_engine_that_hangs_is_killed_at_the_deadline(backend: VLLMBackendConfig) -> None:
    policy, impatient = uniform_policy(), backend.model_copy(update={"deadline": 1.0})
    with generator_of(policy, impatient):
        [pid] = _engine()._group.pids
    with pytest.raises(WorkerError, match="gave no answer within 1 s and was killed"):
        _generate(policy, impatient, seed=14)
    assert not psutil.pid_exists(pid)


@pytest.mark.slow
@pytest.mark.parametrize(("between", "lives"), [("warm", True), ("auto", True), ("kill", False)])
def test_an_engine_stays_between_calls_unless_it_is_to_be_killed(
    backend: VLLMBackendConfig, between: str, lives: bool
) -> None:
    chosen = backend.model_copy(update={"between_calls": between})
    with generator_of(uniform_policy(), chosen):
        engine = _engine()
        [pid], folder = engine._group.pids, engine._folder
    assert psutil.pid_exists(pid) == lives
    assert folder.exists() == lives


@pytest.mark.parametrize(
    ("platform", "lives", "sleeps"),
    [
        ("cpu", True, False),
        ("cuda sleep allocator", True, True),
        ("cuda sleep", False, False),  # a build without vLLM's allocator, which sleep mode needs on CUDA
        ("xpu sleep", True, True),
        ("tpu", False, False),
    ],
)
def test_where_the_trainer_has_a_gpu_the_engine_sleeps_if_it_can(
    backend: VLLMBackendConfig, monkeypatch: pytest.MonkeyPatch, platform: str, lives: bool, sleeps: bool
) -> None:
    monkeypatch.setattr(hardware, "training_device", lambda: "cuda")
    monkeypatch.setenv(PLATFORM, platform)
    _generate(uniform_policy(), backend)
    assert (VLLM in _residents) == lives
    assert _asked(backend)[0]["engine"]["enable_sleep_mode"] == sleeps
    assert [entry for entry in _asked(backend) if "sleep" in entry] == [{"sleep": 2}] * sleeps
    _generate(uniform_policy(), backend)
    assert sum("engine" in entry for entry in _asked(backend)) == (1 if lives else 2)
    assert [entry["wake"] for entry in _asked(backend) if "wake" in entry] == [["weights"], ["kv_cache"]] * sleeps


def test_where_the_trainer_has_no_gpu_the_engine_stays(
    backend: VLLMBackendConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLATFORM, "cuda sleep allocator")
    _generate(uniform_policy(), backend)
    assert VLLM in _residents
    assert not _asked(backend)[0]["engine"]["enable_sleep_mode"]


@pytest.mark.slow
def test_an_evaluation_by_hf_leaves_the_engine_of_the_rollouts_as_it_is(backend: VLLMBackendConfig) -> None:
    policy, outputs = uniform_policy(), []
    for chosen in (backend, HFBackendConfig(), backend, HFBackendConfig()):
        with generator_of(policy, chosen) as generator:
            outputs.append(generator.generate([Prompt("a", [5], [4])], SAMPLING)[0][0].ids.tolist())
    assert sum("engine" in entry for entry in _asked(backend)) == 1
    assert (outputs[0], outputs[1]) == (outputs[2], outputs[3])


@pytest.mark.slow
def test_on_a_gpu_the_engines_that_decode_take_turns() -> None:
    for slot in (HF, VLLM):
        resident(slot, "key", lambda slot=slot: f"model of {slot}")
    make_room(VLLM, "cpu")
    make_room(HF, "cpu")
    assert {HF, VLLM} <= _residents.keys()
    make_room(VLLM, "cuda")
    assert VLLM in _residents
    assert HF not in _residents
    resident(HF, "key", lambda: "model")
    make_room(HF, "cuda")
    assert HF in _residents
    assert VLLM not in _residents
    evict()


@pytest.mark.slow
def test_an_engine_that_slept_is_woken_before_its_weights_are_loaded(
    backend: VLLMBackendConfig,
) -> None:
    policy, sleeper = uniform_policy(), backend.model_copy(update={"between_calls": "sleep"})
    for _ in range(2):
        with generator_of(policy, sleeper) as generator:
            generator.generate([Prompt("a", [5], [4])], SAMPLING)
    orders = [entry for entry in _asked(backend) if "prompt" not in entry]
    assert orders[0]["engine"]["enable_sleep_mode"]
    assert orders[1:] == [
        {"sleep": 2},
        {"wake": ["weights"]},
        {"rpc": "reload_weights"},
        {"rpc": "repack_weights"},
        {"wake": ["kv_cache"]},
        {"sleep": 2},
    ]


@pytest.mark.slow
def test_a_prompt_that_does_not_fit_is_refused_by_name(backend: VLLMBackendConfig) -> None:
    policy, small = uniform_policy(), backend.model_copy(update={"max_model_len": 40})
    for chosen, window in ((backend, 64), (small, 40)):
        with pytest.raises(PromptTooLongError, match=rf"'long'.*at most {window - 6} tokens.*found {window - 5}"):
            _generate(policy, chosen, prompt=Prompt("long", [5] * (window - 5), [4]))


def test_an_absent_vllm_is_a_config_error_that_says_how_to_have_one(tmp_path: Path) -> None:
    empty = tmp_path / "python"
    with pytest.raises(ConfigError, match=r"python: .*make vllm-cpu.*\[vllm\]"):
        require_vllm(VLLMBackendConfig(python=empty))
    empty.write_text("#!/bin/sh\nexit 1\n")
    empty.chmod(0o755)
    with pytest.raises(ConfigError, match="make vllm-cpu"):
        require_vllm(VLLMBackendConfig(python=empty))
    with pytest.raises(ConfigError, match="make vllm-cpu"):
        require_vllm(VLLMBackendConfig())


def test_a_run_without_vllm_ends_before_anything_runs(tmp_path: Path) -> None:
    from io import StringIO

    from rich.console import Console

    from flows.config.resolve import choose
    from flows.runs.paths import Places
    from flows.runs.session import run_flow

    choice = choose("arithmetic_smoke", settings=["rollout.backend.kind=vllm", "rollout.backend.python=nowhere"])
    with pytest.raises(ConfigError, match="nowhere is not there"):
        run_flow(choice, Places.under(tmp_path / "root"), engine="inline", console=Console(file=StringIO()))
    assert not (tmp_path / "root").exists()


def test_what_decides_a_result_is_in_the_key_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.training.hardware.has_native_bf16", lambda: True)
    hf = {"kind": "hf", "dtype": "bfloat16", "head_precision": "fp32", "attention": "auto", "batch_rows": 512}
    assert RolloutConfig().key()["backend"] == hf | {"threads": "auto"}
    full = RolloutConfig.parse({"backend": {"kind": "hf", "dtype": "float32", "head_precision": "as_computed"}})
    assert "head_precision" not in full.key()["backend"]  # logits are float32 in any case
    vllm = RolloutConfig.parse({"backend": {"kind": "vllm", "python": "/x/python", "deadline": 1, "max_num_seqs": 3}})
    decisive = {"kind": "vllm", "dtype": "bfloat16", "tensor_parallel_size": 1, "eager": None, "threads": None}
    assert vllm.key()["backend"] == decisive | {"head_precision": "fp32"}
    served = RolloutConfig.parse({"backend": {"kind": "vllm_server", "url": "http://127.0.0.1:8000"}})
    assert served.key()["backend"] == {"kind": "vllm_server", "dtype": "bfloat16"}


def test_backends_are_checked_as_configs_are() -> None:
    for change, message in (
        ({"kind": "vlm"}, "'vlm'"),
        ({"kind": "vllm", "pythonn": "x"}, "backend.pythonn: unknown key; did you mean 'python'"),
        ({"kind": "vllm_server"}, "backend.url: Field required"),
        ({"kind": "vllm_server", "url": "localhost:8000"}, "backend.url"),
        ({"kind": "vllm", "gpu_memory_utilization": 1.5}, "backend.gpu_memory_utilization"),
    ):
        with pytest.raises(ConfigError, match=message):
            RolloutConfig.parse({"backend": change})
    with pytest.raises(ConfigError, match="top_p = 1"):
        RolloutConfig.parse({"top_p": 0.9, "backend": {"kind": "vllm"}})


def test_a_server_s_weights_are_fixed_and_a_run_s_are_not() -> None:
    recipe, server = RECIPES["arithmetic_smoke"](), {"kind": "vllm_server", "url": "http://127.0.0.1:8000"}
    with pytest.raises(ConfigError) as raised:
        recipe.override({"rollout.backend": server})
    assert "rollout.backend: a server keeps the weights it was started with, and data_source policy" in str(
        raised.value
    )
    assert "evaluation.backend: a server keeps" in str(raised.value)
    offline = {"data_source": "initial_policy", "update.old_logprobs": "rollout", "evaluation.backend": {"kind": "hf"}}
    chosen = recipe.override(offline | {"rollout.backend": server})
    assert isinstance(chosen.rollout.backend, VLLMServerConfig)
    modes = chosen.evaluation.modes(chosen.rollout)
    assert {mode.backend.kind for _, mode, _ in modes} == {"hf"}


@pytest.mark.slow
def test_an_engine_of_another_architecture_is_another_engine(backend: VLLMBackendConfig) -> None:
    with generator_of(uniform_policy(), backend):
        [first] = _engine()._group.pids
    with generator_of(tiny_policy(0, spread=0.0, window=48), backend):
        [second] = _engine()._group.pids
    assert first != second
    assert not psutil.pid_exists(first)


def test_inherited_ranks_and_settings_do_not_reach_the_engine(
    backend: VLLMBackendConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "PYTHONPATH", "VLLM_LOGPROBS_SOMETHING"):
        monkeypatch.setenv(name, "7")
    [chosen] = environments_of(backend.model_copy(update={"threads": 3, "cpu_kv_cache_gib": 2}))
    assert not {name for name, value in chosen.items() if value == "7"}
    assert (chosen["OMP_NUM_THREADS"], chosen["VLLM_CPU_KVCACHE_SPACE"], chosen["PATH"]) == (
        "3",
        "2",
        os.environ["PATH"],
    )
    assert (chosen["VLLM_NO_USAGE_STATS"], chosen["DO_NOT_TRACK"]) == ("1", "1")
