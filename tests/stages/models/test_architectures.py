"""Models of others end to end, by architecture: imported, decoded, scored and trained as transformers itself would.

Each is a real architecture with its own switches (head size, norms, soft caps, rope scaling, tied embeddings) and few small
layers, with random weights that are neither flat nor certain.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from safetensors import safe_open

from pipeline.residency import evict
from pipeline.store import Store
from stages.advantage import GroupConfig, estimate_advantages
from stages.models import (
    Checkpoint,
    ExternalCheckpointConfig,
    import_checkpoint,
    load_model,
    load_tokenizer,
    load_weights,
    weight_files,
)
from stages.rollout import HFBackendConfig, RolloutConfig, rollout
from stages.rollout.stage import stop_ids
from stages.tables import Questions, Rewards
from stages.text import BPETokenizerConfig, PromptConfig, build_tokenizer, encode_prompt
from stages.training import AdamWConfig, TrainingConfig
from stages.training.batching import Row, micro_batches
from stages.training.forward import completion_logprobs
from stages.update import GRPOConfig, UpdateConfig, update_policy
from tests.stages.rows import reward_row

VOCABULARY: Final = 300
SMALL: Final = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
QUESTIONS: Final = ["1 + 2?", "7 * 3 - 5 + 1?", "2?"]


@dataclass(frozen=True)
class Case:
    """An architecture, and what a folder of it may look like."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    attention: str = "grouped"
    stored: torch.dtype = torch.float32
    shards: str = "5GB"
    stops: tuple[int, ...] = (0,)
    """`eos_token_id` of generation_config.json; the tokenizer's own is 0."""
    pad: bool = True


CASES: Final = {
    # Qwen2.5-0.5B ties its embeddings and stops at two tokens; 7B does not tie.
    "qwen2": Case("qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6, "sliding_window": None}, stops=(0, 5)),
    "qwen2.5-7b": Case(
        "qwen2", {"tie_word_embeddings": False, "rope_theta": 1e6}, stored=torch.bfloat16, shards="40KB"
    ),
    "qwen3": Case("qwen3", {"head_dim": 16, "tie_word_embeddings": True, "rope_theta": 1e6}, stored=torch.bfloat16),
    "llama-2": Case("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}, pad=False),
    "llama-3.2": Case(
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        stops=(0, 5, 6),
        pad=False,
    ),
    "gemma": Case("gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    # A soft cap on attention and logits, alternating layers; the window is longer than what is decoded.
    "gemma2": Case("gemma2", {"head_dim": 16, "sliding_window": 64}, attention="eager"),
    "gemma3": Case("gemma3_text", {"head_dim": 16, "sliding_window": 64}, stops=(0, 7)),
    "mistral": Case("mistral", {"sliding_window": 96}, stored=torch.bfloat16, shards="40KB"),
    # deepseek-math-7b-base's config.json, with 2 of its 30 layers, 32 of 4096 columns, 48 of 11008, 300 of 102,400 tokens;
    # 32 heads of 128 are 4 of 8. Window and rope are its own.
    "deepseek-math-7b": Case(
        "llama",
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10_000.0,
            "rope_scaling": None,
            "attention_bias": False,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "pretraining_tp": 1,
            "tie_word_embeddings": False,
        },
        stored=torch.bfloat16,
        shards="40KB",
        pad=False,
    ),
}


def make(case: Case, folder: Path) -> Path:
    """The folder as `save_pretrained` leaves it."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

    tokenizer = build_tokenizer(["12345 67890 + - * ?"] * 2, BPETokenizerConfig(vocab_size=VOCABULARY))
    description = AutoConfig.for_model(case.model_type, **{**SMALL, **case.settings})
    description.bos_token_id, description.eos_token_id = None, list(case.stops)
    description.pad_token_id = 1 if case.pad else None
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(description)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.5 if "embed" in name else 0.3)
    model.generation_config = GenerationConfig(eos_token_id=list(case.stops))
    model.to(case.stored).save_pretrained(folder, max_shard_size=case.shards)
    if not case.pad:  # the class of `tokenizer` has a padding token whatever its files say
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    tokenizer.save_pretrained(folder)
    return folder


_DEFAULT: Final = ("deepseek-math-7b",)
"""What the default suite looks at: the paper's model, stored in bfloat16 and shards; `make test-slow` looks at all."""


@pytest.fixture(params=[pytest.param(name, marks=[] if name in _DEFAULT else pytest.mark.slow) for name in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def policy(store: Store, case: Case, tmp_path: Path) -> Checkpoint:
    return import_checkpoint(ExternalCheckpointConfig(path=make(case, tmp_path / "model")))


def questions() -> Questions:
    columns = {"question": QUESTIONS, "answer": ["3"] * len(QUESTIONS), "solution": [None] * len(QUESTIONS)}
    return Questions.write({"question_id": [f"q{number}" for number in range(len(QUESTIONS))], **columns})


def sampled(policy: Checkpoint, case: Case, **settings: Any) -> Any:
    backend = HFBackendConfig(dtype="float32", attention=case.attention, threads=1)  # type: ignore[arg-type]
    config = RolloutConfig(max_output_tokens=24, backend=backend, **settings)
    return rollout(policy, questions(), PromptConfig(), config, seed=0)


def test_greedy_outputs_are_those_of_transformers(policy: Checkpoint, case: Case, tmp_path: Path) -> None:
    """Token for token, from the folder as it was, to the first of several ends."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert set(stop_ids(policy, load_tokenizer(policy))) == {*case.stops, 0}
    rows = sampled(policy, case, G=1, temperature=0.0).rows()
    for row, question in zip(rows, QUESTIONS, strict=True):
        assert (
            row["prompt_ids"] == encode_prompt(tokenizer, question, PromptConfig()) == tokenizer(question)["input_ids"]
        )
        ids = torch.tensor([row["prompt_ids"]])
        found = plain.generate(ids, do_sample=False, max_new_tokens=24, pad_token_id=1)
        assert row["output_ids"] == found[0, ids.shape[1] :].tolist()


def test_log_probabilities_are_those_of_a_full_softmax(policy: Checkpoint, case: Case) -> None:
    """Of the sampler and of the trainer, with and without all logits, against one forward of each row."""
    model = load_model(policy, dtype=torch.float32)
    rows = sampled(policy, case, G=2).rows()
    pairs = [Row(row["prompt_ids"], row["output_ids"]) for row in rows]
    with torch.no_grad():
        (batch,) = micro_batches(pairs, 10_000)
        scored = {limit: completion_logprobs(model, batch, max_logits=limit).logp_BO for limit in (None, 500)}
        for place, index in enumerate(batch.rows):
            ids = torch.tensor([[*pairs[index].prompt_ids, *pairs[index].output_ids]])
            table = model(input_ids=ids).logits[0, len(pairs[index].prompt_ids) - 1 : -1].double().log_softmax(-1)
            expected = table.gather(1, torch.tensor(pairs[index].output_ids)[:, None])[:, 0].numpy()
            np.testing.assert_allclose(rows[index]["logprobs"], expected, atol=1e-4)
            for found in scored.values():
                np.testing.assert_allclose(found[place, : len(expected)].numpy(), expected, atol=1e-4)


def test_a_grpo_update_changes_the_weights_and_leaves_a_checkpoint_that_loads(policy: Checkpoint, case: Case) -> None:
    outputs = sampled(policy, case, G=4)
    rows = outputs.rows()
    rewards = Rewards.write([reward_row(row["question_id"], row["sample"], float(row["sample"] % 2)) for row in rows])
    advantages = estimate_advantages(rewards, outputs, GroupConfig())
    training = TrainingConfig(precision="fp32", optimizer=AdamWConfig(learning_rate=1e-3), threads=1)
    updated = update_policy(
        policy, policy, outputs, advantages, UpdateConfig(objective=GRPOConfig(beta=0.04), training=training), seed=0
    )
    evict()
    before, after = (load_model(part, dtype=torch.float32) for part in (policy, updated))
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    assert old.keys() == new.keys()
    moved = [name for name in old if not old[name].equal(new[name])]
    assert len(moved) > len(old) / 2
    assert all(torch.isfinite(tensor).all() for tensor in new.values())
    assert (after.lm_head.weight is after.get_input_embeddings().weight) is bool(before.config.tie_word_embeddings)
    assert stop_ids(updated, load_tokenizer(updated)) == stop_ids(policy, load_tokenizer(policy))
    with safe_open(updated.path / "model.safetensors", framework="pt") as stored:
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.float32}  # noqa: SIM118
    load_weights(before, updated)  # in place, as the resident generator does
    assert all(tensor.equal(new[name]) for name, tensor in before.named_parameters())


def test_the_folders_are_as_various_as_they_are_meant_to_be(store: Store, tmp_path: Path) -> None:
    sharded = import_checkpoint(ExternalCheckpointConfig(path=make(CASES["qwen2.5-7b"], tmp_path / "a")))
    assert len(weight_files(sharded.path)) > 1
    with safe_open(weight_files(sharded.path)[0], framework="pt") as stored:
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert load_tokenizer(sharded).pad_token == "<|pad|>"
    unpadded = import_checkpoint(ExternalCheckpointConfig(path=make(CASES["deepseek-math-7b"], tmp_path / "b")))
    assert load_tokenizer(unpadded).pad_token is None
    described = load_model(unpadded, dtype=torch.float32).config
    assert (described.max_position_embeddings, described.rms_norm_eps) == (4096, 1e-6)
    assert described.rope_parameters["rope_theta"] == 10_000.0


def test_a_model_without_an_end_of_sequence_is_refused_with_what_to_set(store: Store, tmp_path: Path) -> None:
    folder = make(CASES["llama-2"], tmp_path / "model")
    for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
        described = {key: value for key, value in json.loads((folder / name).read_text()).items() if "eos" not in key}
        (folder / name).write_text(json.dumps(described))
    policy = import_checkpoint(ExternalCheckpointConfig(path=folder))
    with pytest.raises(ValueError, match=r"eos_token_id in generation_config\.json or config\.json"):
        sampled(policy, CASES["llama-2"], G=1, temperature=0.0)


def test_an_end_of_sequence_in_the_model_configuration_alone_is_found(store: Store, tmp_path: Path) -> None:
    """Older folders have no generation_config.json; transformers then takes config.json's."""
    folder = make(CASES["llama-3.2"], tmp_path / "model")
    (folder / "generation_config.json").unlink()
    policy = import_checkpoint(ExternalCheckpointConfig(path=folder))
    assert stop_ids(policy, load_tokenizer(policy)) == (0, 5, 6)
