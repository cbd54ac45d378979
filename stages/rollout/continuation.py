"""Continue outputs from the ends of their steps: what Monte-Carlo completion samples (Math-Shepherd, arXiv 2312.08935)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.stage import record_metrics, stage
from stages.join import KEY, Ragged, align, key_at
from stages.models import Checkpoint, load_tokenizer
from stages.rollout.config import RolloutConfig
from stages.rollout.engines import generator_of
from stages.rollout.generator import Generator, Output, Prompt, Sampling, generate_within, sample_seed
from stages.rollout.stage import Sampled, reporter, sampling_of, write_rollouts
from stages.tables import Rollouts, StepPrefixes
from stages.text import decode_outputs, step_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@stage(version="1")
def cut_into_prefixes(outputs: Rollouts, *, outputs_per_question: int | None = None) -> StepPrefixes:
    """Return every step of every output, with the number of the prefix that it ends.

    A prefix is what was sampled up to and including the step's last token (`step_ends`), as ids: a token that completes a
    line may bring the beginning of the next, and the prefix has all of it. The step that ends with the output has no prefix
    to continue.

    Args:
        outputs_per_question: cut only so many outputs of each question, those of the lowest `sample`; None: all of them.

    Metrics: `rm/steps`, `rm/prefixes` (distinct, to be continued), `rm/prefixes_saved` (share of the steps to be continued
    whose prefix another step has already).

    Raises:
        ValueError: by row: an output without tokens, or whose `text_ends` are not one per token; of several turns.
    """
    table = outputs.read([*KEY, "prompt_ids", "output_ids", "text", "text_ends", "turns"])
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        groups.setdefault(row["question_id"], []).append(row)
    cut = []
    for group in groups.values():
        kept = sorted(group, key=lambda row: row["sample"])[:outputs_per_question]
        numbers: dict[tuple[int, ...], int] = {}
        for row in kept:
            cut += _steps(row, numbers)
    continued = [(row["question_id"], row["prefix"]) for row in cut if row["prefix"] is not None]
    distinct = len(set(continued))
    record_metrics(
        {
            "rm/steps": len(cut),
            "rm/prefixes": distinct,
            "rm/prefixes_saved": 1 - distinct / len(continued) if continued else None,
        }
    )
    return StepPrefixes.write(cut)


def _steps(row: Mapping[str, Any], numbers: dict[tuple[int, ...], int]) -> list[dict[str, Any]]:
    """Return the steps of one output; `numbers` are those of its question's prefixes so far."""
    key, ids, prompt = (row["question_id"], row["sample"]), row["output_ids"], row["prompt_ids"]
    if not ids or len(row["text_ends"]) != len(ids):
        raise ValueError(
            f"output {key}: expected tokens with one of text_ends for each, found {len(ids)} and {len(row['text_ends'])}"
        )
    if row["turns"] is not None:
        raise ValueError(
            f"output {key}: expected one turn, which is continued from each of its steps, found {len(row['turns'])}: an "
            "environment would have to answer the continuation; label the steps by rules (step_labels.kind=rules)"
        )
    steps = []
    for step, end in enumerate(step_ends(row["text"], row["text_ends"])):
        whole = end == len(ids) - 1
        # The prompt is part of what is equal: it is the question's, but nothing in the table says so.
        prefix = None if whole else numbers.setdefault((len(prompt), *prompt, *ids[: end + 1]), len(numbers))
        steps.append({"question_id": key[0], "sample": key[1], "step": step, "end": end, "prefix": prefix})
    return steps


@stage(version="2")
def continue_outputs(
    policy: Checkpoint, outputs: Rollouts, prefixes: StepPrefixes, config: RolloutConfig, *, samples: int, seed: int
) -> Rollouts:
    """Sample `samples` (Math-Shepherd's N) continuations of every distinct prefix, each a whole output that begins with it.

    A row is an output of its question like any other: `output_ids` are prefix and continuation, so that whatever scores outputs
    scores it. Number n of prefix p has `sample` = p * samples + n. `max_output_tokens` counts the prefix too. `logprobs` are
    null: the prefix may be another policy's, and nothing is learned from a row of which only the end was sampled.

    Each row's seed is a function of (seed, question_id, prefix, n): a prefix keeps its continuations whatever other outputs
    there are (up to the last bits of float32), and a larger N adds to a smaller one's.

    Args:
        outputs: what `prefixes` was cut from; sampled with the tokenizer of `policy`.
        config: as the outputs were sampled; its `G` is not used.

    Metrics: `rm/continuations`, `rm/continued_tokens` (sampled), `rm/continued_length_mean` (tokens of a continuation),
    `rm/continued_truncated_rate`, `time/continuations`.

    Raises:
        PromptTooLongError, ConfigError, WorkerError, StaleWeightsError: as `rollout`.
        ValueError: temperature 0 with more than one sample; by row: an output that is missing, that leaves no room, or whose
            ids mean another text in the policy's tokenizer.
    """
    if config.temperature == 0 and samples > 1:
        raise ValueError(
            f"temperature 0 gives {samples} equal continuations of a prefix; set samples = 1, or another one"
        )
    tokenizer = load_tokenizer(policy)
    found = _read(outputs, prefixes, tokenizer, limit=config.max_output_tokens)
    started = time.perf_counter()
    sampling = sampling_of(policy, tokenizer, config)
    with generator_of(policy, config.backend, stop_strings=bool(config.stop_strings)) as generator:
        completed = complete(generator, found, sampling, samples=samples, seed=seed, window=generator.window)
    _record(completed, time.perf_counter() - started)
    rows = []
    for prefix, group in zip(found, completed, strict=True):
        for n, (output, own) in enumerate(zip(group, prefix.seeds(seed, samples), strict=True)):
            ids, number = [*prefix.ids, *output.ids.tolist()], prefix.number * samples + n
            rows.append(
                Sampled(prefix.question_id, number, list(prefix.prompt_ids), ids, None, output.finish_reason, own)
            )
    return write_rollouts(rows, tokenizer, config.temperature)


@dataclass(frozen=True)
class Prefix:
    """Hold the beginning of an output, up to the end of one of its steps."""

    question_id: str
    number: int
    prompt_ids: Sequence[int]
    ids: Sequence[int]

    def seeds(self, seed: int, samples: int) -> list[int]:
        """Return those of its continuations; no other prefix's and no rollout's."""
        name = hashlib.sha256(",".join(map(str, self.ids)).encode()).hexdigest()
        return [sample_seed(seed, f"{self.question_id}\0{name}", n) for n in range(samples)]


def complete(
    generator: Generator,
    prefixes: Sequence[Prefix],
    sampling: Sampling,
    *,
    samples: int,
    seed: int,
    window: int | None,
) -> list[list[Output]]:
    """Return the continuations of each prefix, none beyond `sampling.max_output_tokens` together with it."""
    prompts = [
        Prompt(
            prefix.question_id,
            [*prefix.prompt_ids, *prefix.ids],
            prefix.seeds(seed, samples),
            begun=len(prefix.ids),
            shared=len(prefix.prompt_ids),
        )
        for prefix in prefixes
    ]
    rooms = [sampling.max_output_tokens - len(prefix.ids) for prefix in prefixes]
    progress = reporter(len(prefixes) * samples, "continue_outputs")
    return generate_within(generator, prompts, rooms, sampling, progress, window=window)


def _read(outputs: Rollouts, prefixes: StepPrefixes, tokenizer: PreTrainedTokenizerFast, *, limit: int) -> list[Prefix]:
    """Return the distinct prefixes, by the first output that has each."""
    steps = prefixes.read()
    steps = steps.filter(steps["prefix"].is_valid())
    steps = steps.take(_first_rows(steps, "question_id", "prefix"))
    table = outputs.read([*KEY, "prompt_ids", "output_ids", "text"])
    rows = align(steps, table, "outputs", to="prefixes", extra=True, several=True)
    prompt, output = Ragged.of(rows["prompt_ids"]), Ragged.of(rows["output_ids"])
    names = zip(steps["question_id"].to_pylist(), steps["prefix"].to_pylist(), strict=True)
    found = []
    for row, (name, step, end) in enumerate(
        zip(names, steps["step"].to_pylist(), steps["end"].to_pylist(), strict=True)
    ):
        key, ids = key_at(rows, row), output[row][: end + 1].tolist()
        if len(ids) <= end:
            raise ValueError(f"output {key} is shorter than its steps; were the prefixes cut from others?")
        if len(ids) >= limit:
            raise ValueError(
                f"output {key}: step {step} ends at token {len(ids)}, and max_output_tokens = {limit} leaves no room "
                "behind it; continue with the limit that the outputs were sampled with"
            )
        found.append(Prefix(*name, prompt[row].tolist(), ids))
    used: list[Mapping[str, Any]] = rows.take(_first_rows(rows, *KEY)).to_pylist()
    _check_vocabulary(used, tokenizer)
    return found


def _first_rows(table: pa.Table, *by: str) -> NDArray[np.int64]:
    """Return the first row of each key, in order."""
    numbered = table.select(list(by)).append_column("row", pa.array(np.arange(table.num_rows)))
    return np.sort(numbered.group_by(list(by)).aggregate([("row", "min")])["row_min"].to_numpy())


def _check_vocabulary(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse ids of another tokenizer: they would be continued as the text that they happen to spell in this one."""
    texts = decode_outputs(tokenizer, [row["output_ids"] for row in rows]).texts
    for row, text in zip(rows, texts, strict=True):
        if text != row["text"]:
            raise ValueError(
                f"output {(row['question_id'], row['sample'])} reads {row['text'][:40]!r}, and {text[:40]!r} in the policy's "
                "tokenizer; continue outputs with a policy that shares the tokenizer they were sampled with"
            )


def _record(completed: Sequence[Sequence[Output]], seconds: float) -> None:
    every = [output for group in completed for output in group]
    tokens = sum(len(output.ids) for output in every)
    record_metrics(
        {
            "rm/continuations": len(every),
            "rm/continued_tokens": tokens,
            "rm/continued_length_mean": tokens / len(every) if every else None,
            "rm/continued_truncated_rate": (
                sum(output.finish_reason == "length" for output in every) / len(every) if every else None
            ),
            "time/continuations": seconds,
        }
    )
