"""Supervised fine-tuning, and demonstrations as outputs: SFT as a row of the unified paradigm (DeepSeekMath, 5.2.1)."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, assert_never

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.artifact import take_rows
from pipeline.config import Config
from pipeline.progress import report
from pipeline.stage import record_metrics, stage
from stages.models import Checkpoint, load_tokenizer
from stages.tables import Demonstrations, Rollouts
from stages.text import PromptConfig, encode_completions, encode_prompts
from stages.training.batching import sample_positions
from stages.training.config import MuonConfig, TrainingConfig
from stages.training.ranks import on_ranks

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from stages.training.batching import Batch, Row
    from stages.training.engine import Engine

Written = tuple[bool, ...]
"""Whether the policy is to write each id of a completion, or an environment wrote it."""
Encoded = tuple[list[int], list[int], Written | None]
"""Ids of a prompt, ids of its completion, and who writes these; None: the policy all of them."""
Part = tuple["Batch", "Tensor"]
"""A micro-batch, and the weight of each of its tokens [B, O] in the mean over the whole batch."""


class SFTConfig(Config):
    """Supervised fine-tuning: mean negative log-likelihood of completion tokens, EOS included (DeepSeekMath, Eq. 6)."""

    training: TrainingConfig = TrainingConfig(optimizer=MuonConfig(), warmup_steps=40)
    """Engine, optimizer, precision and warm-up. One stage call is the whole training: it begins without moments and publishes
    none, which another objective follows, whatever `optimizer_state` says."""
    seed: NonNegativeInt = 0
    """Draws the order of the demonstrations; apart from the run's seed, so that runs with other seeds share this policy."""
    aggregation: Literal["sequence_mean", "token_mean"] = "sequence_mean"
    """Which mean: over demonstrations of the mean over their tokens, (1/|o|) sum_t (DeepSeekMath, Eq. 6), or over all tokens of
    the batch, so that long demonstrations count for more (usual elsewhere). For lengths 2 and 6 a token weighs 1/4 and 1/12, or
    1/8 and 1/8. The loss that is charted and compared with `stop_loss` is this mean, in nats per token."""
    batch_size: PositiveInt = 64
    """Demonstrations per update."""
    max_steps: PositiveInt = 2000
    """Updates before the decay begins, at most."""
    stop_loss: PositiveFloat | None = None
    """Begin the decay once the smoothed loss (nats per token) is below this; None: at max_steps only."""
    smoothing: float = Field(0.95, ge=0, lt=1)
    """Weight of the past in the smoothed loss, an exponential mean without the bias of its start."""
    decay_steps: NonNegativeInt = 0
    """Further updates, over which the learning rate falls linearly to 0."""
    length_pool: PositiveInt = 1
    """Batches that are drawn together and sorted by length before they are cut, then used in random order. 1: every batch
    is a plain random draw; more: less padding, batches of like length."""
    micro_batch_tokens: PositiveInt = 8192
    """Tokens per forward pass, padding included. Has no influence on the gradient but its last bits."""


@stage(version="4")
@on_ranks
def supervised_finetuning(
    policy: Checkpoint, demonstrations: Demonstrations, prompt: PromptConfig, config: SFTConfig
) -> Checkpoint:
    """Return `policy` after imitating the demonstrations; without optimizer state, since what follows is another objective.

    What an environment wrote in them (`observed`) is read and not imitated.

    The learning rate is constant until the smoothed loss is below `stop_loss` (or `max_steps` are done), then falls linearly
    to 0 over `decay_steps`. The curve is kept in the checkpoint as sft_curve.json.

    Raises:
        ValueError: fewer demonstrations than one batch holds, or one longer than the model's window.
    """
    from stages.training.batching import Row
    from stages.training.loop import publish, resident_engine, train
    from stages.training.optimizers import trained_values

    encoded = _encode(policy, load_tokenizer(policy), demonstrations.read(), prompt)
    rows = [Row(*example) for example in encoded]
    if len(rows) < config.batch_size:
        raise ValueError(f"{len(rows)} demonstrations are fewer than a batch of {config.batch_size}")
    with config.training.arithmetic():
        engine = resident_engine(policy, config.training.override({"optimizer_state": "none"}))
        started, skipped, curve = time.perf_counter(), engine.skipped, Curve(config)
        for step in train(engine, _steps(engine, rows, config, curve), lambda part: sft_loss(engine, part)):
            curve.add(engine.total(step.loss))
            done = len(curve.losses)
            report("sft", done=done, total=curve.total, loss=curve.smoothed, learning_rate=step.learning_rate)
        seconds = time.perf_counter() - started
        described = {"ended_by": curve.ended_by, "loss": [round(loss, 6) for loss in curve.losses]}
        checkpoint = publish(engine, optimizer=False, files={"sft_curve.json": json.dumps(described) + "\n"})
    record_metrics(
        {
            "sft/loss": curve.smoothed,
            "sft/steps": len(curve.losses),
            "sft/reached_stop_loss": curve.ended_by == "stop_loss",
            "sft/skipped_steps": engine.skipped - skipped,
            "sft/padding_share": 1 - curve.tokens / curve.places,
            "sft/trained_parameters": trained_values(engine.model),
            "sft/seconds": seconds,
            "sft/tokens_per_s": curve.tokens / seconds,
        }
    )
    return checkpoint


class Curve:
    """Keep losses so far, in nats per completion token, their exponential mean, and what the batches held."""

    def __init__(self, config: SFTConfig) -> None:
        self.losses: list[float] = []
        self.tokens = self.places = 0
        """Tokens of all batches with prompts, and these with their padding."""
        self.total = config.max_steps + config.decay_steps
        """Steps, as far as they are known."""
        self.ended_by: Literal["stop_loss", "max_steps"] = "max_steps"
        self._smoothing = config.smoothing
        self._mean = self._weight = 0.0

    @property
    def smoothed(self) -> float:
        """Return the exponential mean of the losses; infinite before the first."""
        return self._mean / self._weight if self._weight else float("inf")

    def add(self, loss: float) -> None:
        """Add the loss of one batch."""
        self.losses.append(loss)
        self._mean = self._smoothing * self._mean + (1 - self._smoothing) * loss
        self._weight = self._smoothing * self._weight + (1 - self._smoothing)


def _steps(engine: Engine, rows: list[Row], config: SFTConfig, curve: Curve) -> Iterator[tuple[list[Part], float]]:
    """Yield this rank's micro-batches of each step, and the factor of its learning rate: full steps, then the decay."""
    drawn = batches(rows, config)
    for _ in range(config.max_steps):
        yield parts_of(next(drawn), engine, config, curve), 1.0
        if config.stop_loss is not None and curve.smoothed < config.stop_loss:
            curve.ended_by, curve.total = "stop_loss", len(curve.losses) + config.decay_steps
            break
    for number in range(config.decay_steps):
        yield parts_of(next(drawn), engine, config, curve), 1 - (number + 1) / (config.decay_steps + 1)


def batches(rows: list[Row], config: SFTConfig) -> Iterator[list[Row]]:
    """Yield batches without end: every epoch a new permutation, what does not fill a last batch is left out of it."""
    import numpy as np

    lengths = np.array([len(row.prompt_ids) + len(row.output_ids) for row in rows])
    size = config.batch_size
    epoch = 0
    while True:
        generator = np.random.Generator(np.random.PCG64([config.seed, epoch]))
        order = generator.permutation(len(rows))
        order = order[: len(rows) // size * size]
        for start in range(0, len(order), size * config.length_pool):
            pool = order[start : start + size * config.length_pool]
            if config.length_pool > 1:
                alike = pool[np.argsort(lengths[pool], kind="stable")].reshape(-1, size)
                pool = generator.permutation(alike).reshape(-1)
            for first in range(0, len(pool), size):
                yield [rows[index] for index in pool[first : first + size]]
        epoch += 1


def parts_of(rows: list[Row], engine: Engine, config: SFTConfig, curve: Curve) -> list[Part]:
    """Cut a batch into this rank's micro-batches, and add its tokens to the curve."""
    from stages.training.batching import micro_batches, own_share

    whole = list(micro_batches(rows, config.micro_batch_tokens, model=engine.model))
    curve.tokens += sum(batch.tokens for batch in whole)
    curve.places += sum(batch.input_ids_BT.numel() for batch in whole)
    passes = own_share(whole, rank=engine.rank, world_size=engine.world_size)
    return [
        (batch.to(engine.device), (share * _weights(batch, rows, config)).to(engine.device)) for batch, share in passes
    ]


def sft_loss(engine: Engine, part: Part) -> Tensor:
    """Return the micro-batch's share of the mean negative log-likelihood, in nats (DeepSeekMath, Eq. 6)."""
    from stages.training.forward import completion_logprobs

    batch, weight_BO = part
    with engine.autocast():
        logp_BO = completion_logprobs(engine.model, batch, max_logits=engine.max_logits).logp_BO
    return -(weight_BO.to(logp_BO.dtype) * logp_BO).sum()


def _weights(batch: Batch, rows: list[Row], config: SFTConfig) -> Tensor:
    """Return the weight of every token of a micro-batch in the mean over all `rows`, [B, O]."""
    from stages.kernels.objective import sequence_mean_weights, token_mean_weights

    mask_BO = batch.written
    once_B = mask_BO.new_ones(len(mask_BO))
    match config.aggregation:
        case "sequence_mean":
            return sequence_mean_weights(mask_BO, once_B, outputs=len(rows))
        case "token_mean":
            return token_mean_weights(mask_BO, once_B, tokens=sum(map(_length, rows)))
        case _ as unknown:
            assert_never(unknown)


@stage(version="2")
def demonstrated_outputs(
    policy: Checkpoint, demonstrations: Demonstrations, prompt: PromptConfig, *, size: int, step: int, seed: int
) -> Rollouts:
    """Draw q, o ~ P_sft(Q, O) (Table 10, SFT): the `size` demonstrations of step `step` (0, 1, ...), no two alike.

    Steps walk through one shuffled order of the set after another, as batches of questions do. Ids are those that supervised
    fine-tuning trains on, the end of sequence included. A question's demonstrations in the batch are its samples 0, 1, ...

    No policy sampled these rows: they have no log-probabilities, temperature 1, and `seed` is the call's. `text` is what the
    ids decode to, so that `text_ends` are places in it.

    Args:
        policy: its tokenizer and window; the weights have no influence.

    Raises:
        DataError: the set has fewer than `size` demonstrations.
        ValueError: a demonstration longer than the model's window, by its question.
    """
    from stages.text import decode_outputs

    table = demonstrations.read()
    drawn = take_rows(table, sample_positions(table.num_rows, size=size, step=step, seed=seed))
    tokenizer = load_tokenizer(policy)
    rows = _encode(policy, tokenizer, drawn, prompt)
    outputs = [completion for _, completion, _ in rows]
    decoded = decode_outputs(tokenizer, outputs)
    question_ids = drawn.column("question_id").to_pylist()
    tokens = sum(map(len, outputs))
    record_metrics({"rollout/samples": size, "rollout/tokens": tokens, "rollout/length_mean": tokens / size})
    return Rollouts.write(
        {
            "question_id": question_ids,
            "sample": _numbered(question_ids),
            "prompt_ids": [prompt_ids for prompt_ids, _, _ in rows],
            "output_ids": outputs,
            "logprobs": [None] * size,
            "finish_reason": ["stop"] * size,
            "text": decoded.texts,
            "text_ends": decoded.ends,
            "temperature": [1.0] * size,
            "seed": [seed] * size,
            "turns": [written and _turns(written) for _, _, written in rows],
        }
    )


def _turns(written: Written) -> list[dict[str, int]]:
    """Return the parts that the policy is to write, as `Rollouts` has them."""
    border = [False, *written, False]
    changes = [place for place in range(len(written) + 1) if border[place] != border[place + 1]]
    return [{"start": start, "end": end} for start, end in zip(changes[::2], changes[1::2], strict=True)]


def _length(row: Row) -> int:
    return len(row.output_ids) if row.written is None else sum(row.written)


def _numbered(names: list[str]) -> list[int]:
    """Count for each name how often it came before."""
    seen: Counter[str] = Counter()
    numbers = []
    for name in names:
        numbers.append(seen[name])
        seen[name] += 1
    return numbers


def _encode(
    policy: Checkpoint, tokenizer: PreTrainedTokenizerFast, table: pa.Table, prompt: PromptConfig
) -> list[Encoded]:
    """Return ids of the prompt and of the completion with its end, and what of it is to be written, for every demonstration.

    Raises:
        PromptError: a character that the tokenizer cannot express.
        ValueError: a demonstration longer than the model's window, or with observed parts out of order, by its question.
    """
    questions = encode_prompts(tokenizer, table.column("question").to_pylist(), prompt)
    completions = _encode_completions(tokenizer, table)
    window = json.loads((policy.described / "config.json").read_text()).get("max_position_embeddings")
    rows = []
    for prompt_ids, (ids, written), name in zip(
        questions, completions, table.column("question_id").to_pylist(), strict=True
    ):
        length = len(prompt_ids) + len(ids)
        if window is not None and length > window:
            raise ValueError(
                f"demonstration of question {name!r}: expected at most {window} tokens (the model's window), found "
                f"{length}; shorten or drop it, or take a model with a larger window"
            )
        rows.append((prompt_ids, ids, written))
    return rows


def _encode_completions(tokenizer: PreTrainedTokenizerFast, table: pa.Table) -> list[tuple[list[int], Written | None]]:
    """Encode completions; where an environment wrote parts, each part by itself, as outputs of several turns are made."""
    texts, observed = table.column("completion").to_pylist(), table.column("observed").to_pylist()
    if not any(observed):
        return [(ids, None) for ids in encode_completions(tokenizer, texts)]
    cuts = [
        _cuts(name, text, spans or [])
        for name, text, spans in zip(table.column("question_id").to_pylist(), texts, observed, strict=True)
    ]
    parts = [text[start:end] for text, cut in zip(texts, cuts, strict=True) for start, end in itertools.pairwise(cut)]
    encoded: list[tuple[list[int], Written | None]] = []
    remaining = iter(encode_completions(tokenizer, parts))
    for cut, spans in zip(cuts, observed, strict=True):
        ids: list[int] = []
        written: list[bool] = []
        for number, part in enumerate(itertools.islice(remaining, len(cut) - 1)):
            ids += part[:-1]  # without the end of sequence
            written += [number % 2 == 0] * (len(part) - 1)
        encoded.append(([*ids, part[-1]], (*written, True) if spans else None))
    return encoded


def _cuts(name: str, text: str, spans: list[dict[str, int]]) -> list[int]:
    """Return where the parts of a completion begin, written and observed in turns, and where it ends."""
    cuts = [0, *(place for span in spans for place in (span["start"], span["end"])), len(text)]
    if any(before > after for before, after in itertools.pairwise(cuts)):
        raise ValueError(
            f"demonstration of question {name!r}: expected observed parts [start, end) within its {len(text)} characters, in "
            f"order, found {[(span['start'], span['end']) for span in spans]}"
        )
    return cuts
