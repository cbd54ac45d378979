"""Optimizer steps of a reward model: forward, weights and loss.

Legend: B rows of a micro-batch, N scores of all of them, P pairs among them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.kernels.objective import bradley_terry, pointwise
from stages.reward_training.examples import BradleyTerryConfig, Example, Pair, RewardObjectiveConfig, Unit, units_of
from stages.training.batching import Batch, Row, micro_batches, own_share
from stages.training.engine import Engine, StepReport
from stages.training.loop import train
from stages.training.scores import places_in, scores_at


@dataclass(frozen=True)
class _Part:
    """A micro-batch, where it is scored and what the scores are fitted to: labels, or one another."""

    batch: Batch
    positions_N: Tensor
    label_N: Tensor
    weight_N: Tensor
    """weight / (outputs of the update * scores of the output): sums to 1 over all parts of all ranks."""
    preferred_P: Tensor
    """Row of the preferred output; with pairs an output has one score, so that rows are scores."""
    other_P: Tensor
    weight_P: Tensor
    """weight / (pairs of the question * questions of the update), or weight / pairs of the update: sums to 1 likewise."""


class Fit:
    """Optimizer steps of a reward model, and what those of the last epoch found."""

    def __init__(self, engine: Engine, objective: RewardObjectiveConfig, micro_batch_tokens: int) -> None:
        self._engine, self._objective, self._micro_batch_tokens = engine, objective, micro_batch_tokens
        self.updates = self.skipped = 0
        self._begin()

    def _begin(self) -> None:
        self.reports: list[StepReport] = []
        self._hits: list[float] = []
        """For each update the share of pairs in order, or of scores on the side of their label, weighted as the loss is."""
        self._pairs = 0

    def train(self, updates: Sequence[tuple[Sequence[Example], float]]) -> Iterator[StepReport]:
        """Make one epoch: for each update a step down the gradient of the mean loss over its outputs, or over their pairs as
        `BradleyTerryConfig.average` says.

        Args:
            updates: the examples of each, and the factor of its learning rate.
        """
        self._begin()
        for step in train(self._engine, self._steps(updates), self._loss):
            self.reports.append(step)
            self.updates += not step.skipped
            self.skipped += step.skipped
            yield step

    def _steps(self, updates: Sequence[tuple[Sequence[Example], float]]) -> Iterator[tuple[list[_Part], float]]:
        for examples, factor in updates:
            units = units_of(examples, self._objective)
            self._hits.append(0.0)
            self._pairs += sum(pair.weight for unit in units for pair in unit.pairs)
            yield list(_parts(units, self._engine, self._micro_batch_tokens, self._objective)), factor

    def _loss(self, part: _Part) -> Tensor:
        """Return the weighted loss of the scores, fitted to labels or to one another; add up the share that is right."""
        with self._engine.autocast():
            score_N = scores_at(self._engine.model, part.batch, part.positions_N)
        if isinstance(self._objective, BradleyTerryConfig):
            preferred_P, other_P = score_N[part.preferred_P], score_N[part.other_P]
            self._hits[-1] += float((part.weight_P * (preferred_P > other_P)).sum())
            return (part.weight_P * bradley_terry(preferred_P, other_P)).sum()
        self._hits[-1] += float((part.weight_N * ((score_N > 0) == (part.label_N > 0.5))).sum())
        return (part.weight_N * pointwise(score_N, part.label_N)).sum()

    def metrics(self) -> dict[str, float | None]:
        """Return means over the last epoch's updates, each before its step, and counts of all updates."""
        updates, total = len(self.reports), self._engine.total
        return {
            "rm/loss": total(sum(report.loss for report in self.reports)) / updates,
            "rm/train_accuracy": total(sum(self._hits)) / updates,
            "rm/grad_norm": sum(report.grad_norm for report in self.reports) / updates,
            "rm/learning_rate": self.reports[-1].learning_rate,
            "rm/pairs": self._pairs,
            "rm/updates": self.updates,
            "rm/skipped_steps": self.skipped,
        }


def _parts(
    units: Sequence[Unit], engine: Engine, micro_batch_tokens: int, objective: RewardObjectiveConfig
) -> Iterator[_Part]:
    """Yield this rank's parts of an update, on the engine's device."""
    examples = [example for unit in units for example in unit.examples]
    pairs, start = [], 0
    for unit in units:
        pairs += [Pair(start + pair.preferred, start + pair.other, pair.weight) for pair in unit.pairs]
        start += len(unit.examples)
    shares = _pair_shares(pairs, examples, objective)
    rows = [Row(example.prompt_ids, example.output_ids) for example in examples]
    borders = itertools.accumulate((len(unit.examples) for unit in units), initial=0)
    whole = [range(start, end) for start, end in itertools.pairwise(borders)]
    batches = list(micro_batches(rows, micro_batch_tokens, model=engine.model, units=whole))
    for batch, factor in own_share(batches, rank=engine.rank, world_size=engine.world_size):
        yield _part(batch, factor, examples, shares, engine.device)


def _pair_shares(
    pairs: Sequence[Pair], examples: Sequence[Example], objective: RewardObjectiveConfig
) -> dict[Pair, float]:
    """Return the weight of each pair in the loss of the update; they sum to 1."""
    if isinstance(objective, BradleyTerryConfig) and objective.average == "questions":
        comparisons: Counter[str] = Counter()
        for pair in pairs:
            comparisons[examples[pair.preferred].question_id] += pair.weight
        questions = len(comparisons)
        return {pair: pair.weight / (comparisons[examples[pair.preferred].question_id] * questions) for pair in pairs}
    total = sum(pair.weight for pair in pairs)
    return {pair: pair.weight / total for pair in pairs}


def _part(batch: Batch, factor: float, examples: Sequence[Example], shares: Mapping[Pair, float], device: str) -> _Part:
    """Build a micro-batch with its share of the update's denominator; `factor` is 0 where it only fills up a rank's passes."""
    held = [examples[row] for row in batch.rows]
    place = {row: number for number, row in enumerate(batch.rows)}
    here = [pair for pair in shares if pair.preferred in place]
    outputs = sum(example.weight for example in examples)
    labels = [label for example in held for label in example.labels]
    weights = [factor * each.weight / (outputs * len(each.labels)) for each in held for _ in each.labels]
    return _Part(
        batch=batch.to(device),
        positions_N=places_in(batch, [example.places for example in held]).to(device),
        label_N=torch.tensor(labels, device=device),
        weight_N=torch.tensor(weights, dtype=torch.float64, device=device),
        preferred_P=torch.tensor([place[pair.preferred] for pair in here], dtype=torch.long, device=device),
        other_P=torch.tensor([place[pair.other] for pair in here], dtype=torch.long, device=device),
        weight_P=torch.tensor([factor * shares[pair] for pair in here], dtype=torch.float64, device=device),
    )
