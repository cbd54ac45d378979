"""The rollout stage: questions in, G sampled outputs for each out."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.progress import report
from pipeline.residency import resident
from pipeline.stage import record_metrics, stage
from stages.decoding import decode_outputs
from stages.models import Checkpoint, load_model, load_tokenizer, load_weights
from stages.prompts import PromptConfig, encode_prompt
from stages.rollout.config import HFBackendConfig, RolloutConfig
from stages.tables import Questions, Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from stages.rollout.generator import Output, Progress, Prompt


@stage(version="2")
def rollout(
    policy: Checkpoint, questions: Questions, prompt: PromptConfig, config: RolloutConfig, *, seed: int
) -> Rollouts:
    """o_1 ... o_G ~ policy(. | q) for every question q (DeepSeekMath, Algorithm 1, line 7).

    Rows come in the order of `questions`, samples 0 .. G-1 within each. Each row's seed is a function of (seed, question_id,
    sample), so that a question keeps its outputs whatever it is batched with (up to the last bits of float32).

    Metrics: `rollout/length_mean`, `rollout/length_p95` (tokens of an output, its end of sequence included),
    `rollout/truncated_rate`, `rollout/samples`, `rollout/tokens`, `rollout/tokens_per_s`, `rollout/seconds`.

    Raises:
        PromptTooLongError: a prompt and `max_output_tokens` exceed the model's window.
        ValueError: no questions, or a question twice.
    """
    from stages.rollout.generator import Sampling
    from stages.rollout.hf import HFGenerator
    from stages.training.hardware import threads

    tokenizer = load_tokenizer(policy)
    prompts = _prompts(questions, tokenizer, prompt, G=config.G, seed=seed)
    sampling = Sampling(
        config.temperature, config.max_output_tokens, stop_ids(policy, tokenizer) if config.stop else ()
    )
    with threads(config.backend.threads):
        generator = HFGenerator(resident_model(policy, config.backend), batch_rows=config.backend.batch_rows)
        started = time.perf_counter()
        outputs = generator.generate(prompts, sampling, reporter(len(prompts) * config.G))
        seconds = time.perf_counter() - started
    _record(outputs, seconds)
    return Rollouts.write(_columns(prompts, outputs, tokenizer, config.temperature))


def _prompts(
    questions: Questions, tokenizer: PreTrainedTokenizerFast, prompt: PromptConfig, *, G: int, seed: int
) -> list[Prompt]:
    from stages.rollout.generator import Prompt
    from stages.rollout.seeds import sample_seed

    table = questions.read()
    names = table["question_id"].to_pylist()
    if not names:
        raise ValueError("rollout: expected at least one question, found none; check the question set and its filters")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(
            f"rollout: question {twice!r} comes twice in one batch; keys (question_id, sample) must be unique"
        )
    return [
        Prompt(name, encode_prompt(tokenizer, text, prompt), [sample_seed(seed, name, sample) for sample in range(G)])
        for name, text in zip(names, table["question"].to_pylist(), strict=True)
    ]


def stop_ids(policy: Checkpoint, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """End-of-sequence ids of the tokenizer and of generation_config.json, which may list several.

    Raises:
        ValueError: neither names one; no output would ever end.
    """
    file = policy.path / "generation_config.json"
    listed = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    ids = {*(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise ValueError(
            f"{policy}: expected eos_token_id in generation_config.json or the tokenizer, found none in both"
        )
    return tuple(sorted(ids))


@dataclass
class _Resident:
    """A model kept warm, and the digest of the checkpoint whose weights it has (None while they change)."""

    model: PreTrainedModel
    holds: str | None


def resident_model(policy: Checkpoint, backend: HFBackendConfig) -> PreTrainedModel:
    """The policy's model, ready: reloaded in place when only the weights differ, made anew when the architecture does."""
    import torch

    from stages.rollout.attention import GROUPED
    from stages.training.hardware import native_bf16, training_device

    device = training_device()
    if backend.dtype == "auto":
        dtype = torch.bfloat16 if device == "cuda" or native_bf16() else torch.float32
    else:
        dtype = torch.bfloat16 if backend.dtype == "bfloat16" else torch.float32

    attention = GROUPED if backend.attention == "grouped" else backend.attention

    def make() -> _Resident:
        return _Resident(load_model(policy, dtype=dtype, attention=attention).to(device), policy.digest)

    architecture = hashlib.sha256((policy.path / "config.json").read_bytes()).hexdigest()
    kept = resident("rollout", (architecture, dtype, attention, device), make)
    if kept.holds != policy.digest:
        kept.holds = None
        load_weights(kept.model, policy)
        kept.holds = policy.digest
    return kept.model


def reporter(total: int, topic: str = "rollout") -> Progress:
    """Reports how far `topic` is, at most twice a second; a token may take a millisecond."""
    started = last = time.perf_counter()

    def progress(done: int, tokens: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if done == total or now - last > 0.5:
            report(topic, done=done, total=total, tokens=tokens, tokens_per_s=tokens / (now - started))
            last = now

    return progress


def _record(outputs: Sequence[Sequence[Output]], seconds: float) -> None:
    import numpy as np

    every = [output for group in outputs for output in group]
    lengths = np.array([len(output.ids) for output in every])
    record_metrics(
        {
            "rollout/length_mean": float(lengths.mean()),
            "rollout/length_p95": float(np.percentile(lengths, 95)),
            "rollout/truncated_rate": sum(output.finish_reason == "length" for output in every) / len(every),
            "rollout/samples": len(every),
            "rollout/tokens": float(lengths.sum()),
            "rollout/tokens_per_s": float(lengths.sum()) / seconds,
            "rollout/seconds": seconds,
        }
    )


def _columns(
    prompts: Sequence[Prompt],
    outputs: Sequence[Sequence[Output]],
    tokenizer: PreTrainedTokenizerFast,
    temperature: float,
) -> dict[str, Any]:
    rows = [
        (prompt, sample, output)
        for prompt, group in zip(prompts, outputs, strict=True)
        for sample, output in enumerate(group)
    ]
    decoded = decode_outputs(tokenizer, [output.ids for _, _, output in rows])
    return {
        "question_id": [prompt.question_id for prompt, _, _ in rows],
        "sample": [sample for _, sample, _ in rows],
        "prompt_ids": [list(prompt.ids) for prompt, _, _ in rows],
        "output_ids": [output.ids for _, _, output in rows],
        "logprobs": [output.logprobs for _, _, output in rows],
        "finish_reason": [output.finish_reason for _, _, output in rows],
        "text": decoded.texts,
        "text_ends": decoded.ends,
        "temperature": [temperature] * len(rows),
        "seed": [prompt.seeds[sample] for prompt, sample, _ in rows],
    }
