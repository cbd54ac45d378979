"""The rollout stage: table in, table out, one resident model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config import ConfigError
from pipeline.progress import listen
from pipeline.store import Store
from stages import rollout as package
from stages.models import Checkpoint, load_model
from stages.rollout import HFBackendConfig, RolloutConfig, engines, rollout
from stages.rollout.generator import PromptTooLongError, sample_seed
from stages.tables import Questions
from stages.text import PromptConfig, encode_prompt
from tests.stages.rollout.policies import questions, tiny_policy

pytestmark = pytest.mark.usefixtures("store")

PROMPT = PromptConfig(suffix="\n")
CONFIG = RolloutConfig(G=4, max_output_tokens=10, backend=HFBackendConfig(dtype="float32", threads=1))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often models are made and weights reloaded."""
    counts: Counter[str] = Counter()

    def counted(name: str) -> Any:
        original = getattr(engines, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        return call

    for name in ("load_model", "load_weights"):
        monkeypatch.setattr(engines, name, counted(name))
    return counts


@pytest.mark.claim("detokenised and tokenised again", "line 7")
def test_rows_carry_key_prompt_output_logprobs_text_temperature_and_seed() -> None:
    policy, asked = tiny_policy(0, head=8), questions("1+2", "34-5=", "7")
    rows = rollout(policy, asked, PROMPT, CONFIG.override({"temperature": 0.8}), seed=11).rows()
    assert [(row["question_id"], row["sample"]) for row in rows] == [(f"q{i}", s) for i in range(3) for s in range(4)]
    from stages.models import load_tokenizer

    tokenizer, model = load_tokenizer(policy), load_model(policy, dtype=torch.float32)
    texts = dict(zip(("q0", "q1", "q2"), ("1+2", "34-5=", "7"), strict=True))
    for row in rows:
        assert row["prompt_ids"] == encode_prompt(tokenizer, texts[row["question_id"]], PROMPT)
        assert row["seed"] == sample_seed(11, row["question_id"], row["sample"])
        assert row["temperature"] == pytest.approx(0.8)
        assert row["text"] == tokenizer.decode(row["output_ids"], skip_special_tokens=True)
        assert row["text_ends"] == [
            len(tokenizer.decode(row["output_ids"][: t + 1], skip_special_tokens=True))
            for t in range(len(row["output_ids"]))
        ]
        assert (row["output_ids"][-1] in (tokenizer.eos_token_id, 3)) == (row["finish_reason"] == "stop")
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["prompt_ids"] + row["output_ids"]])).logits[0]
        logp = (logits[len(row["prompt_ids"]) - 1 : -1] / 0.8).log_softmax(-1)
        expected = [logp[t, token].item() for t, token in enumerate(row["output_ids"])]
        np.testing.assert_allclose(row["logprobs"], expected, atol=1e-4)


def test_metrics_agree_with_the_table() -> None:
    seen: list[dict[str, Any]] = []
    with listen(lambda topic, values: seen.append(values) if topic == "rollout" else None):
        outputs = rollout(tiny_policy(0, head=8), questions("1+2", "7"), PROMPT, CONFIG, seed=0)
    assert (seen[-1]["done"], seen[-1]["total"]) == (8, 8)
    lengths = [len(row["output_ids"]) for row in outputs.rows()]
    metrics = outputs.metrics
    assert metrics["rollout/length_mean"] == pytest.approx(np.mean(lengths))
    assert metrics["rollout/length_p95"] == pytest.approx(np.percentile(lengths, 95))
    assert metrics["rollout/truncated_rate"] == np.mean([r["finish_reason"] == "length" for r in outputs.rows()])
    assert metrics["rollout/tokens"] == sum(lengths)
    assert metrics["rollout/tokens_per_s"] == pytest.approx(sum(lengths) / metrics["rollout/seconds"])


def test_equal_inputs_give_one_digest_in_two_stores(store: Store, tmp_path: Any) -> None:
    from pipeline.residency import evict
    from pipeline.store import use_store

    first = rollout(tiny_policy(0, head=8), questions("1+2", "7"), PROMPT, CONFIG, seed=0)
    evict()
    with use_store(Store(tmp_path / "another")):
        assert rollout(tiny_policy(0, head=8), questions("1+2", "7"), PROMPT, CONFIG, seed=0).digest == first.digest
    assert rollout(tiny_policy(0, head=8), questions("1+2", "7"), PROMPT, CONFIG, seed=1).digest != first.digest


def test_a_question_keeps_its_outputs_in_another_batch() -> None:
    policy = tiny_policy(0, head=8)
    single = rollout(policy, questions("1+2"), PROMPT, CONFIG, seed=0).rows()
    among = rollout(policy, questions("1+2", "34-56=", "7"), PROMPT, CONFIG, seed=0).rows()
    assert [row["output_ids"] for row in single] == [row["output_ids"] for row in among if row["question_id"] == "q0"]
    rows = rollout(policy, questions("1+2"), PROMPT, CONFIG.override({"stop": False}), seed=0).rows()
    assert {(len(row["output_ids"]), row["finish_reason"]) for row in rows} == {(10, "length")}


@pytest.mark.claim("outputs of stale weights")
def test_new_weights_are_loaded_in_place_and_a_new_architecture_anew(loads: Counter[str]) -> None:
    asked = questions("1+2")
    first, second = tiny_policy(0, head=8), tiny_policy(1, head=8)
    before = rollout(first, asked, PROMPT, CONFIG, seed=0).rows()
    rollout(first, asked, PROMPT, CONFIG, seed=1)
    assert loads == {"load_model": 1}
    other = rollout(second, asked, PROMPT, CONFIG, seed=0).rows()
    assert other != before
    rollout(first, questions("1+2", "5"), PROMPT, CONFIG, seed=0)
    assert loads == {"load_model": 1, "load_weights": 2}
    again = rollout(first, asked, PROMPT, CONFIG.override({"backend.batch_rows": 511}), seed=0).rows()
    assert again == before, "weights reloaded in place are not the weights"
    rollout(tiny_policy(0, head=4), asked, PROMPT, CONFIG, seed=0)
    assert loads == {"load_model": 2, "load_weights": 2}


def test_weights_that_failed_to_load_are_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, first, second = questions("1+2"), tiny_policy(0, head=8), tiny_policy(1, head=8)
    expected = rollout(second, asked, PROMPT, CONFIG, seed=0).rows()
    rollout(first, asked, PROMPT, CONFIG, seed=0)

    def half_loaded(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
        torch.nn.init.zeros_(next(model.parameters()))
        raise OSError("disk gone")

    with monkeypatch.context() as patch:
        patch.setattr(engines, "load_weights", half_loaded)
        with pytest.raises(OSError, match="disk gone"):
            rollout(second, asked, PROMPT, CONFIG, seed=3)
    assert rollout(second, asked, PROMPT, CONFIG.override({"backend.batch_rows": 511}), seed=0).rows() == expected


@pytest.mark.claim("groups formed by equal prompts")
def test_bad_input_is_refused_with_its_name() -> None:
    policy = tiny_policy(0, head=8)
    with pytest.raises(PromptTooLongError, match=r"'q1'.* 54 .* 61"):
        rollout(policy, questions("1", "1" * 60), PROMPT, CONFIG, seed=0)
    with pytest.raises(ValueError, match="question"):
        rollout(policy, questions(), PROMPT, CONFIG, seed=0)
    row = {"question_id": "same", "question": "1", "answer": "1", "solution": None}
    with pytest.raises(ValueError, match="'same'"):
        rollout(policy, Questions.write([row, row]), PROMPT, CONFIG, seed=0)


@pytest.mark.claim("top-p, top-k, min-p unseen by the ratio", "5.2.3 nucleus")
def test_configs_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ConfigError, match="G = 64"):
        RolloutConfig.parse({"temperature": 0})
    with pytest.raises(ConfigError, match="top_p = 1"):
        RolloutConfig.parse({"top_p": 0.9})
    assert RolloutConfig(temperature=0, G=1).backend == HFBackendConfig()


def test_the_package_exports_its_stages_and_configs() -> None:
    stages = {"continue_dialogues", "continue_outputs", "cut_into_prefixes", "rollout"}
    configs = {"BackendConfig", "HFBackendConfig", "RolloutConfig", "VLLMBackendConfig", "VLLMServerConfig"}
    assert set(package.__all__) == {*configs, *stages, "engines_of", "require_backend", "stops_of"}
