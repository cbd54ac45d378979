"""Least squares between values and returns: forward, weights and loss of the critic.

Legend: B rows of a micro-batch, O their longest output, N output tokens of all of them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.join import KEY, Ragged, align, key_at, per_token, written_rows
from stages.kernels.objective import sequence_mean_weights
from stages.tables import Advantages, Rollouts
from stages.training.batching import Batch, Row, micro_batches, own_share, spread
from stages.training.engine import Engine, StepReport
from stages.training.loop import train
from stages.training.scores import scores_at


@dataclass(frozen=True)
class Example:
    """Hold an output with what the critic shall predict before each of its tokens."""

    question_id: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    returns: tuple[float, ...]
    """One value per output id."""
    written: tuple[bool, ...] | None = None
    """Whether the policy wrote each output id; None: it wrote all."""
    weight: float = 1.0
    """How many equal outputs are merged into this one."""


def join(outputs: Rollouts, advantages: Advantages) -> list[Example]:
    """Return one example per distinct output that has advantages, weighted by its count; masked rows (null) take no part.

    Raises:
        ValueError: an output without a row of advantages or without returns, returns of another number than tokens or not
            finite.
    """
    table = outputs.read([*KEY, "prompt_ids", "output_ids", "turns"])
    found = align(table, advantages.read([*KEY, "advantage", "returns"]), "advantages")
    kept = found["advantage"].is_valid()
    table, found = table.filter(kept), found.filter(kept)
    absent = np.flatnonzero(found["returns"].is_null())
    if len(absent):
        key = key_at(found, absent[0])
        raise ValueError(
            f"output {key} has no returns to fit a critic to; estimate advantages with advantage.kind = gae"
        )
    output = Ragged.of(table["output_ids"])
    columns = (Ragged.of(table["prompt_ids"]), output, per_token(found, "returns", output.lengths, "returns"))
    rows = zip(*([tuple(values.tolist()) for values in column] for column in columns), written_rows(table), strict=True)
    examples = (Example(name, *row) for name, row in zip(table["question_id"].to_pylist(), rows, strict=True))
    return [dataclasses.replace(example, weight=float(count)) for example, count in Counter(examples).items()]


def values_before(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Return V(q, o_<t) for every output token o_t: `[B, O]`, 0 on padding, in the precision of the parameters.

    It is read at the token *before* o_t, where the policy's distribution of o_t is read too: the value knows the question and
    o_<t, and neither o_t nor what follows. (Read at o_t it would be a baseline that depends on the action.)
    """
    return spread(scores_at(model, batch, batch.source_index_N), batch.output_mask_BO)


@dataclass(frozen=True)
class Part:
    """Hold a micro-batch; tensors are [B, O] of `batch`."""

    batch: Batch
    return_BO: Tensor
    weight_BO: Tensor
    """Weight of each token in the mini-batch's mean over outputs of the mean over tokens; sums to 1 over its parts of all
    ranks. 0 on padding, and throughout where the part is another rank's and only fills up this rank's passes."""


class Fit:
    """Sum squared errors over this rank's micro-batches, and keep what the steps over them found."""

    def __init__(self, hands: Sequence[Sequence[Example]], engine: Engine, micro_batch_tokens: int) -> None:
        self._engine = engine
        self.mini_batches = [_parts(examples, engine, micro_batch_tokens) for examples in hands if examples]
        """Those that have any examples, on the engine's device."""
        self.reports: list[StepReport] = []
        """One for each step; losses are those of all ranks."""
        self._first_value_N: list[Tensor] = []
        """Values before the first step that learns from them, one vector for each part."""

    def train(self, passes: int) -> Iterator[StepReport]:
        """Make one optimizer step for each mini-batch of each pass."""
        steps = ((parts, 1.0) for _ in range(passes) for parts in self.mini_batches)
        for step in train(self._engine, steps, self._loss):
            self.reports.append(step._replace(loss=self._engine.total(step.loss)))
            yield step

    def _loss(self, part: Part) -> Tensor:
        with self._engine.autocast():
            value_BO = values_before(self._engine.model, part.batch)
        if len(self.reports) < len(self.mini_batches):
            self._first_value_N.append(value_BO.detach()[part.weight_BO > 0])
        return (part.weight_BO * 0.5 * (value_BO - part.return_BO).square()).sum()

    def metrics(self, *, idle: int = 0) -> dict[str, float | None]:
        """Return means over the steps, and values before the first step and returns as the loss weighs them.

        Args:
            idle: steps that were not made, since their mini-batch had no output.
        """
        value_N = torch.cat(self._first_value_N).double()
        parts = [part for mini_batch in self.mini_batches for part in mini_batch]
        return_N = torch.cat([part.return_BO[part.weight_BO > 0] for part in parts]).double()
        weight_N = torch.cat([part.weight_BO[part.weight_BO > 0] for part in parts])
        steps, total = len(self.reports), self._engine.total

        def mean(values_N: Tensor) -> float:
            return total(float((weight_N * values_N).sum())) / total(float(weight_N.sum()))

        return {
            "critic/loss": sum(report.loss for report in self.reports) / steps,
            "critic/grad_norm": sum(report.grad_norm for report in self.reports) / steps,
            "critic/learning_rate": self.reports[-1].learning_rate,
            "critic/skipped_steps": idle + sum(report.skipped for report in self.reports),
            "critic/value_mean": mean(value_N),
            "critic/return_mean": mean(return_N),
            "critic/explained_variance": _explained_variance(value_N, return_N, mean),
        }


def _parts(examples: Sequence[Example], engine: Engine, micro_batch_tokens: int) -> list[Part]:
    rows = [Row(example.prompt_ids, example.output_ids, example.written) for example in examples]
    batches = list(micro_batches(rows, micro_batch_tokens, model=engine.model))
    outputs = sum(example.weight for example in examples)
    parts = []
    for batch, factor in own_share(batches, rank=engine.rank, world_size=engine.world_size):
        mask_BO = batch.output_mask_BO
        flat_N = torch.tensor([value for row in batch.rows for value in examples[row].returns], dtype=torch.float32)
        count_B = factor * torch.tensor([examples[row].weight for row in batch.rows])
        weight_BO = sequence_mean_weights(batch.written, count_B, outputs=outputs)
        return_BO = spread(flat_N, mask_BO)
        parts.append(Part(batch.to(engine.device), return_BO.to(engine.device), weight_BO.to(engine.device)))
    return parts


def _explained_variance(value_N: Tensor, return_N: Tensor, mean: Callable[[Tensor], float]) -> float | None:
    """Return 1 - Var(return - V) / Var(return): 1 for a perfect critic, 0 for a constant; None where all returns are equal."""
    total = mean((return_N - mean(return_N)).square())
    # Returns are float32: what they differ by in rounding only is no variance.
    if total <= 1e-14 * mean(return_N.square()):
        return None
    error_N = return_N - value_N
    return 1 - mean((error_N - mean(error_N)).square()) / total
