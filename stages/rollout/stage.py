"""Sample G outputs for each question."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, assert_never

from pipeline.progress import report
from pipeline.residency import holder_of, resident
from pipeline.stage import record_metrics, stage
from pipeline.store.context import reads_done
from stages.models import (
    Checkpoint,
    architecture_of,
    copy_weights,
    load_model,
    load_tokenizer,
    load_weights,
    model_weights,
)
from stages.rollout.config import (
    BackendConfig,
    HFBackendConfig,
    RolloutConfig,
    VLLMBackendConfig,
    VLLMServerConfig,
    float32_logits,
)
from stages.tables import Questions, Rollouts
from stages.text import PromptConfig, decode_outputs, encode_prompt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from stages.rollout.generator import Generator, Output, Progress, Prompt, Sampling
    from stages.text.stops import StopStrings


@stage(version="4")
def rollout(
    policy: Checkpoint, questions: Questions, prompt: PromptConfig, config: RolloutConfig, *, seed: int
) -> Rollouts:
    """Sample o_1 ... o_G ~ policy(. | q) for every question q (DeepSeekMath, Algorithm 1, line 7).

    Rows come in the order of `questions`, samples 0 .. G-1 within each. Each row's seed is a function of (seed, question_id,
    sample), so that a question keeps its outputs whatever it is batched with (up to the last bits of float32).

    Metrics: `rollout/length_mean`, `rollout/length_p95` (tokens of an output, its end of sequence included),
    `rollout/truncated_rate`, `rollout/samples`, `rollout/tokens`, `rollout/tokens_per_s`, `rollout/seconds`,
    `rollout/concurrent` (1: sampled while the update before it ran).

    Raises:
        PromptTooLongError: a prompt and `max_output_tokens` exceed the model's window.
        ValueError: no questions, or a question twice.
        UnsoundOutputError: an engine's ids or log-probabilities that cannot have been sampled; nothing is written.
        ConfigError, WorkerError, StaleWeightsError: as `generator_of`; ConfigError also as `sampling_of`.
    """
    if (done := reads_done()) is not None:
        return _sample_apart(policy, questions, prompt, config, seed=seed, done=done)
    return sample_outputs(policy, questions, prompt, config, seed=seed)


def sample_outputs(
    policy: Checkpoint, questions: Questions, prompt: PromptConfig, config: RolloutConfig, *, seed: int
) -> Rollouts:
    """Sample in this process, as `rollout`."""
    tokenizer = load_tokenizer(policy)
    prompts = _prompts(questions, tokenizer, prompt, G=config.G, seed=seed)
    sampling = sampling_of(policy, tokenizer, config)
    with generator_of(policy, config.backend, stop_strings=bool(config.stop_strings)) as generator:
        started = time.perf_counter()
        outputs = generator.generate(prompts, sampling, reporter(len(prompts) * config.G))
        seconds = time.perf_counter() - started
    _record(outputs, seconds)
    rows = [
        Sampled(
            prompt.question_id, n, list(prompt.ids), output.ids, output.logprobs, output.finish_reason, prompt.seeds[n]
        )
        for prompt, group in zip(prompts, outputs, strict=True)
        for n, output in enumerate(group)
    ]
    return write_rollouts(rows, tokenizer, config.temperature)


def _sample_apart(
    policy: Checkpoint,
    questions: Questions,
    prompt: PromptConfig,
    config: RolloutConfig,
    *,
    seed: int,
    done: Callable[[], None],
) -> Rollouts:
    """Sample in a process of its own, with equal bits; call `done` once it has the weights.

    Raises:
        ValueError: another backend than `hf`.
        WorkerError: the process died, hung, or says what was wrong.
    """
    from stages.rollout.apart import sampler

    if not isinstance(config.backend, HFBackendConfig):
        raise ValueError(f"rollout.backend: expected hf in a process of its own, found {config.backend.kind}")
    process = sampler()
    process.hold(policy, config.backend, hold_weights)
    done()
    given = {"policy": policy, "questions": questions, "prompt": prompt, "config": config, "seed": seed}
    outputs: Rollouts = process.call(sample_outputs, given)
    record_metrics({"rollout/concurrent": 1.0})
    return outputs


def hold_weights(policy: Checkpoint, backend: HFBackendConfig, folder: str) -> Checkpoint:
    """Load the weights of a policy in the sampler's process; those that are not in the store are in `folder`."""
    from stages.rollout.apart import HandedOver

    handed = resident("handed over", None, HandedOver)
    handed.state, handed.folder = policy.state, Path(folder)
    try:
        resident_model(policy, backend)
    finally:
        handed.state = ""
    return policy


def _prompts(
    questions: Questions, tokenizer: PreTrainedTokenizerFast, prompt: PromptConfig, *, G: int, seed: int
) -> list[Prompt]:
    from stages.rollout.generator import Prompt, sample_seed

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
    """Return the end-of-sequence ids of the tokenizer and of generation_config.json, which may list several.

    Without a generation_config.json those of config.json, as transformers reads older folders.

    Raises:
        ValueError: none names one; no output would ever end.
    """
    files = [policy.described / name for name in ("generation_config.json", "config.json")]
    described = next(file for file in files if file.exists())
    listed = json.loads(described.read_text(encoding="utf-8")).get("eos_token_id")
    ids = {*(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise ValueError(
            f"{policy}: expected eos_token_id in generation_config.json or config.json, or an eos_token of the tokenizer, "
            "found none; no output would ever end: name the token in generation_config.json of the model's folder"
        )
    return tuple(sorted(ids))


def sampling_of(policy: Checkpoint, tokenizer: PreTrainedTokenizerFast, config: RolloutConfig) -> Sampling:
    """Return how `config` samples from a policy, until one of the policy's end tokens or of the config's stops.

    Raises:
        ConfigError: stops that mean nothing in the policy's tokenizer.
    """
    from stages.rollout.generator import Sampling

    ids = {*stop_ids(policy, tokenizer), *config.stop_ids} if config.stop else set()
    return Sampling(config.temperature, config.max_output_tokens, tuple(sorted(ids)), stops_of(tokenizer, config))


def stops_of(tokenizer: PreTrainedTokenizerFast, config: RolloutConfig) -> StopStrings | None:
    """Return the stop strings as a tokenizer writes them; None where there are none.

    Raises:
        ConfigError: ids that it does not have, or strings that it cannot write.
    """
    if not config.has_stops:
        return None
    from stages.text.stops import StopStrings, require_stop_ids

    require_stop_ids(tokenizer, config.stop_ids)
    return StopStrings(tokenizer, config.stop_strings) if config.stop_strings else None


@contextlib.contextmanager
def generator_of(policy: Checkpoint, backend: BackendConfig, *, stop_strings: bool = False) -> Iterator[Generator]:
    """Yield what decodes, with the weights of `policy`, its values checked (`CheckedGenerator`); for the block.

    Args:
        stop_strings: whether outputs will be ended by some.

    Raises:
        ConfigError: an engine that is not installed.
        WorkerError: vLLM's process died, hung, or cannot run this model.
        ServerError: the server cannot be reached, or cannot do what it is asked.
        StaleWeightsError: an engine, or a server, with other weights.
    """
    from stages.rollout.generator import CheckedGenerator
    from stages.rollout.probe import vocabulary_and_window

    known, _ = vocabulary_and_window(policy)
    match backend:
        case HFBackendConfig():
            from stages.rollout.hf import HFGenerator
            from stages.training.hardware import threads

            with threads(backend.threads):
                generator = HFGenerator(resident_model(policy, backend), batch_rows=backend.batch_rows)
                yield CheckedGenerator(generator, "hf", known)
        case VLLMBackendConfig():
            from stages.rollout.vllm import vllm_generator

            with vllm_generator(policy, backend, reads_text=stop_strings) as engine:
                yield CheckedGenerator(engine, "vllm", known)
        case VLLMServerConfig():
            from stages.rollout.served import ServedGenerator

            yield CheckedGenerator(ServedGenerator(policy, backend), f"the server {backend.url}", known)
        case _:
            assert_never(backend)


@dataclass
class _Resident:
    """Hold a model, and the digest of the checkpoint whose weights it has (None while they change)."""

    model: PreTrainedModel
    holds: str | None


def resident_model(policy: Checkpoint, backend: HFBackendConfig) -> PreTrainedModel:
    """The policy's model, ready: reloaded in place when only the weights differ, made anew when the architecture does.

    Weights that an engine in this process has are copied from there.
    """
    from stages.rollout.generator import HF, make_room
    from stages.rollout.kv_cache import GROUPED
    from stages.training.engine import CheckpointedEngine
    from stages.training.forward import keep_float32_logits
    from stages.training.hardware import inference_dtype, training_device

    device, dtype = training_device(), inference_dtype(backend.dtype)
    chosen = backend.attention if backend.attention != "auto" else "sdpa" if device == "cuda" else "grouped"
    attention = GROUPED if chosen == "grouped" else chosen

    def make() -> _Resident:
        model = load_model(policy, dtype=dtype, attention=attention)
        if float32_logits(backend):
            keep_float32_logits(model)
        return _Resident(model.to(device), policy.state)

    make_room(HF, device)
    kept = resident(HF, (architecture_of(policy), dtype, float32_logits(backend), attention, device), make)
    if kept.holds != policy.state:
        kept.holds = None
        trainer = holder_of(policy.state)
        if isinstance(trainer, CheckpointedEngine):
            copy_weights(model_weights(kept.model), trainer.weights())
        else:
            load_weights(kept.model, policy)
        kept.holds = policy.state
    return kept.model


def reporter(total: int, topic: str = "rollout") -> Progress:
    """Return what reports how far `topic` is, at most twice a second; a token may take a millisecond."""
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
            "rollout/concurrent": 0.0,
        }
    )


class Sampled(NamedTuple):
    """Hold a row of `Rollouts` but for what its ids and the call say."""

    question_id: str
    sample: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int] | NDArray[np.int32]
    logprobs: NDArray[np.float32] | None
    finish_reason: str
    seed: int
    turns: Sequence[tuple[int, int]] | None = None


def write_rollouts(rows: Sequence[Sampled], tokenizer: PreTrainedTokenizerFast, temperature: float) -> Rollouts:
    """Decode the ids of the rows, and write the table."""
    texts, ends = decode_outputs(tokenizer, [row.output_ids for row in rows])
    columns: dict[str, Any] = {name: [getattr(row, name) for row in rows] for name in Sampled._fields}
    columns |= {"text": texts, "text_ends": ends, "temperature": [temperature] * len(rows)}
    columns["turns"] = [row.turns and [{"start": start, "end": end} for start, end in row.turns] for row in rows]
    return Rollouts.write({name: columns[name] for name in Rollouts.schema.names})
