"""Sample G outputs for each question."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.progress import report
from pipeline.stage import record_metrics, stage
from pipeline.store.context import reads_done
from stages.models import Checkpoint, load_tokenizer
from stages.rollout.config import HFBackendConfig, RolloutConfig
from stages.rollout.engines import generator_of, hold_weights
from stages.tables import Questions, Rollouts
from stages.text import PromptConfig, decode_outputs, encode_prompt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

    from stages.rollout.generator import Output, Progress, Prompt, Sampling
    from stages.text.stops import StopStrings


@stage(version="4")
def rollout(
    policy: Checkpoint,
    questions: Questions,
    prompt: PromptConfig,
    config: RolloutConfig,
    *,
    seed: int,
    call_ends: Sequence[str] = (),
) -> Rollouts:
    """Sample o_1 ... o_G ~ policy(. | q) for every question q (DeepSeekMath, Algorithm 1, line 7).

    Rows come in the order of `questions`, samples 0 .. G-1 within each. Each row's seed is a function of (seed, question_id,
    sample), so that a question keeps its outputs whatever it is batched with (up to the last bits of float32).

    Args:
        call_ends: texts that complete a call to an environment. An output that ends with one waits for its answer: finish
            reason `call` (`continue_dialogues` goes on with it).

    Metrics: `rollout/length_mean`, `rollout/length_p95` (tokens of an output, its end of sequence included),
    `rollout/truncated_rate`, `rollout/samples`, `rollout/tokens`, `rollout/tokens_per_s`, `rollout/seconds`,
    `rollout/concurrent` (1: sampled while the update before it ran); with `call_ends` `rollout/waiting`, the outputs that wait.

    Raises:
        PromptTooLongError: a prompt and `max_output_tokens` exceed the model's window.
        ValueError: no questions, or a question twice.
        UnsoundOutputError: an engine's ids or log-probabilities that cannot have been sampled; nothing is written.
        ConfigError, WorkerError, StaleWeightsError: as `generator_of`; ConfigError also as `sampling_of`.
    """
    if (done := reads_done()) is not None:
        if call_ends:
            raise ValueError("rollout: outputs with calls to an environment are not sampled in a process of their own")
        return _sample_apart(policy, questions, prompt, config, seed=seed, done=done)
    return sample_outputs(policy, questions, prompt, config, seed=seed, call_ends=call_ends)


def sample_outputs(
    policy: Checkpoint,
    questions: Questions,
    prompt: PromptConfig,
    config: RolloutConfig,
    *,
    seed: int,
    call_ends: Sequence[str] = (),
) -> Rollouts:
    """Sample in this process, as `rollout`."""
    tokenizer = load_tokenizer(policy)
    prompts = _prompts(questions, tokenizer, prompt, G=config.G, seed=seed)
    sampling, calls = sampling_of(policy, tokenizer, config, call_ends), calls_of(tokenizer, call_ends)
    with generator_of(policy, config.backend, stop_strings=sampling.stop_strings is not None) as generator:
        started = time.perf_counter()
        outputs = generator.generate(prompts, sampling, reporter(len(prompts) * config.G))
        seconds = time.perf_counter() - started
    every = [output for group in outputs for output in group]
    truncated = sum(output.finish_reason == "length" for output in every)
    record_outputs([len(output.ids) for output in every], truncated, seconds)
    rows = [
        Sampled(
            prompt.question_id,
            n,
            list(prompt.ids),
            output.ids,
            output.logprobs,
            reason_of(output, calls),
            prompt.seeds[n],
        )
        for prompt, group in zip(prompts, outputs, strict=True)
        for n, output in enumerate(group)
    ]
    if calls is not None:
        record_metrics({"rollout/waiting": sum(row.finish_reason == "call" for row in rows)})
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


def sampling_of(
    policy: Checkpoint, tokenizer: PreTrainedTokenizerFast, config: RolloutConfig, call_ends: Sequence[str] = ()
) -> Sampling:
    """Return how `config` samples from a policy, until one of its end tokens, of the config's stops, or a call's end.

    Raises:
        ConfigError: stops that mean nothing in the policy's tokenizer.
    """
    from stages.rollout.generator import Sampling

    ids = {*stop_ids(policy, tokenizer), *config.stop_ids} if config.stop else set()
    strings = stops_of(tokenizer, config, call_ends)
    return Sampling(config.temperature, config.max_output_tokens, tuple(sorted(ids)), strings)


def calls_of(tokenizer: PreTrainedTokenizerFast, call_ends: Sequence[str]) -> StopStrings | None:
    """Return what completes a call, as a tokenizer writes it; None where nothing does."""
    if not call_ends:
        return None
    from stages.text.stops import StopStrings

    return StopStrings(tokenizer, call_ends, setting="environment: the end of a call")


def reason_of(output: Output, calls: StopStrings | None) -> str:
    """Return the finish reason; `call` where the output's last token completes a call."""
    if calls is None or output.finish_reason != "stop" or not calls.may_complete(output.ids[-1:])[0]:
        return output.finish_reason
    return "call" if calls.completes(output.ids) else output.finish_reason


def stops_of(
    tokenizer: PreTrainedTokenizerFast, config: RolloutConfig, call_ends: Sequence[str] = ()
) -> StopStrings | None:
    """Return the stop strings as a tokenizer writes them; None where there are none.

    Raises:
        ConfigError: ids that it does not have, or strings that it cannot write.
    """
    if not config.has_stops and not call_ends:
        return None
    from stages.text.stops import StopStrings, require_stop_ids

    require_stop_ids(tokenizer, config.stop_ids)
    calls_of(tokenizer, call_ends)
    strings = (*config.stop_strings, *call_ends)
    return StopStrings(tokenizer, strings) if strings else None


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


def record_outputs(lengths: Sequence[int], truncated: int, seconds: float) -> None:
    """Record the metrics of outputs of so many tokens, sampled within so many seconds."""
    import numpy as np

    record_metrics(
        {
            "rollout/length_mean": float(np.mean(lengths)),
            "rollout/length_p95": float(np.percentile(lengths, 95)),
            "rollout/truncated_rate": truncated / len(lengths),
            "rollout/samples": len(lengths),
            "rollout/tokens": float(sum(lengths)),
            "rollout/tokens_per_s": float(sum(lengths)) / seconds,
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
    logprobs: NDArray[np.float32] | Sequence[float | None] | None
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
