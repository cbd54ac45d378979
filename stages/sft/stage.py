"""Supervised fine-tuning as a stage: encode once, descend the mean negative log-likelihood, decay, publish."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, assert_never

from pipeline.progress import report
from pipeline.stage import record_metrics, stage
from stages.models import Checkpoint, load_tokenizer
from stages.sft.config import SFTConfig
from stages.sft.encoding import encode_demonstrations
from stages.tables import Demonstrations
from stages.text import PromptConfig
from stages.training.ranks import on_ranks

if TYPE_CHECKING:
    from torch import Tensor

    from stages.training.batching import Batch, Row
    from stages.training.engine import Engine, StepReport

__all__ = ["supervised_finetuning"]


@stage(version="2")
@on_ranks
def supervised_finetuning(
    policy: Checkpoint, demonstrations: Demonstrations, prompt: PromptConfig, config: SFTConfig
) -> Checkpoint:
    """`policy` after imitating the demonstrations; without optimizer state, since what follows is another objective.

    The learning rate is constant until the smoothed loss is below `stop_loss` (or `max_steps` are done), then falls linearly
    to 0 over `decay_steps`. The curve is kept in the checkpoint as sft_curve.json.

    Raises:
        ValueError: fewer demonstrations than one batch holds, or one longer than the model's window.
    """
    from stages.training.batching import Row
    from stages.training.engine import publish, resident_engine
    from stages.training.hardware import threads
    from stages.training.optimizers import trained_values

    encoded = encode_demonstrations(policy, load_tokenizer(policy), demonstrations.read(), prompt)
    rows = [Row(*ids) for ids in encoded]
    if len(rows) < config.batch_size:
        raise ValueError(f"{len(rows)} demonstrations are fewer than a batch of {config.batch_size}")
    with threads(config.training.threads):
        engine = resident_engine(policy, config.training.override({"optimizer_state": "none"}))
        started, skipped = time.perf_counter(), engine.skipped
        curve = _descend(engine, rows, config)
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
    """Losses so far, in nats per completion token, and their exponential mean."""

    def __init__(self, smoothing: float) -> None:
        self.losses: list[float] = []
        self.tokens = self.places = 0
        self.ended_by: Literal["stop_loss", "max_steps"] = "max_steps"
        self._smoothing = smoothing
        self._mean = self._weight = 0.0

    @property
    def smoothed(self) -> float:
        """Exponential mean of the losses; infinite before the first."""
        return self._mean / self._weight if self._weight else float("inf")

    def add(self, loss: float, tokens: int, places: int) -> None:
        """Take in one batch: its loss, its tokens with prompts, and these with their padding."""
        self.losses.append(loss)
        self.tokens += tokens
        self.places += places
        self._mean = self._smoothing * self._mean + (1 - self._smoothing) * loss
        self._weight = self._smoothing * self._weight + (1 - self._smoothing)


def batches(rows: list[Row], config: SFTConfig) -> Iterator[list[Row]]:
    """Batches without end: every epoch a new permutation, what does not fill a last batch is left out of it."""
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


def _descend(engine: Engine, rows: list[Row], config: SFTConfig) -> Curve:
    curve = Curve(config.smoothing)
    drawn = batches(rows, config)
    total = config.max_steps + config.decay_steps
    for _ in range(config.max_steps):
        step = _update(engine, next(drawn), config, curve, factor=1.0)
        report("sft", done=len(curve.losses), total=total, loss=curve.smoothed, learning_rate=step.learning_rate)
        if config.stop_loss is not None and curve.smoothed < config.stop_loss:
            curve.ended_by = "stop_loss"
            break
    total = len(curve.losses) + config.decay_steps
    for number in range(config.decay_steps):
        factor = 1 - (number + 1) / (config.decay_steps + 1)
        step = _update(engine, next(drawn), config, curve, factor=factor)
        report("sft", done=len(curve.losses), total=total, loss=curve.smoothed, learning_rate=step.learning_rate)
    return curve


def _update(engine: Engine, rows: list[Row], config: SFTConfig, curve: Curve, *, factor: float) -> StepReport:
    """One optimizer step down the configured mean over the batch, whatever its micro-batches and ranks."""
    from stages.training.batching import micro_batches, own_share
    from stages.training.forward import completion_logprobs

    batches = list(micro_batches(rows, config.micro_batch_tokens))
    passes = own_share(batches, rank=engine.rank, world_size=engine.world_size)
    losses = []
    for number, (batch, share) in enumerate(passes):
        weight_BO = share * _weights(batch, rows, config).to(engine.device)
        with engine.autocast():
            given = batch.to(engine.device)
            logp_BO = completion_logprobs(engine.model, given, max_logits=engine.max_logits).logp_BO
        loss = -(weight_BO.to(logp_BO.dtype) * logp_BO).sum()
        engine.backward(loss, last=number == len(passes) - 1)
        losses.append(loss.detach())
    step = engine.step(factor=factor)
    tokens = sum(len(row.prompt_ids) + len(row.output_ids) for row in rows)
    places = sum(batch.attention_mask_BT.numel() for batch in batches)
    curve.add(engine.total(sum(loss.item() for loss in losses)), tokens, places)
    return step


def _weights(batch: Batch, rows: list[Row], config: SFTConfig) -> Tensor:
    """Weight of every token of a micro-batch in the mean over all `rows`, [B, O]."""
    from stages.kernels.aggregation import sequence_mean_weights, token_mean_weights

    mask_BO = batch.output_mask_BO
    once_B = mask_BO.new_ones(len(mask_BO))
    match config.aggregation:
        case "sequence_mean":
            return sequence_mean_weights(mask_BO, once_B, outputs=len(rows))
        case "token_mean":
            return token_mean_weights(mask_BO, once_B, tokens=sum(len(row.output_ids) for row in rows))
        case _ as unknown:
            assert_never(unknown)
