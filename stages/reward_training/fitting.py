"""One optimizer step of a reward model: where forward, losses, weights and engine meet.

Legend: B rows of a micro-batch, N scores of all of them, P pairs among them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.kernels.ranking import bradley_terry, pointwise
from stages.reward_training.config import BradleyTerryConfig, RewardObjectiveConfig, RewardTrainingConfig
from stages.reward_training.examples import Example, Pair, Unit, units_of
from stages.training.batching import Batch, Row, collate, own_share
from stages.training.engine import Engine, StepReport
from stages.training.scores import places_in, scores_at

__all__ = ["Ledger", "update"]


@dataclass
class Ledger:
    """What the updates of one epoch found; losses and hits are this rank's share of them."""

    losses: list[float] = field(default_factory=list)
    """Mean loss of each update, before it."""
    hits: list[float] = field(default_factory=list)
    """Share of pairs in order, or of scores on the side of their label, weighted as the loss is, likewise."""
    reports: list[StepReport] = field(default_factory=list)
    pairs: int = 0

    def metrics(self, engine: Engine) -> dict[str, float | None]:
        """Means over the epoch's updates."""
        updates = len(self.reports)
        return {
            "rm/loss": engine.total(sum(self.losses)) / updates,
            "rm/train_accuracy": engine.total(sum(self.hits)) / updates,
            "rm/grad_norm": sum(report.grad_norm for report in self.reports) / updates,
            "rm/learning_rate": self.reports[-1].learning_rate,
            "rm/pairs": self.pairs,
        }


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


def update(
    engine: Engine, examples: Sequence[Example], config: RewardTrainingConfig, ledger: Ledger, *, factor: float = 1.0
) -> None:
    """One step down the gradient of the mean loss over all outputs of `examples`, or over their pairs as
    `BradleyTerryConfig.average` says; none where there are none.

    Every micro-batch has the update's own denominator, so that gradients add up to that of the update.

    Args:
        factor: of the learning rate.
    """
    units = units_of(examples, config.objective)
    if not units:
        return
    parts = list(_parts(units, engine, config.micro_batch_tokens, config.objective))
    total = total_hits = 0.0
    for number, part in enumerate(parts):
        with engine.autocast():
            score_N = scores_at(engine.model, part.batch, part.positions_N)
        loss, hits = _compare(score_N, part) if units[0].pairs else _fit(score_N, part)
        engine.backward(loss, last=number == len(parts) - 1)
        total, total_hits = total + float(loss.detach()), total_hits + float(hits)
    ledger.losses.append(total)
    ledger.hits.append(total_hits)
    ledger.reports.append(engine.step(factor=factor))
    ledger.pairs += sum(pair.weight for unit in units for pair in unit.pairs)


def _compare(score_N: Tensor, part: _Part) -> tuple[Tensor, Tensor]:
    """Loss and share of pairs in order, both weighted."""
    preferred_P, other_P = score_N[part.preferred_P], score_N[part.other_P]
    loss_P = bradley_terry(preferred_P, other_P)
    return (part.weight_P * loss_P).sum(), (part.weight_P * (preferred_P > other_P)).sum()


def _fit(score_N: Tensor, part: _Part) -> tuple[Tensor, Tensor]:
    """Loss and share of scores on the side of their label, both weighted."""
    loss_N = pointwise(score_N, part.label_N)
    return (part.weight_N * loss_N).sum(), (part.weight_N * ((score_N > 0) == (part.label_N > 0.5))).sum()


def _parts(
    units: Sequence[Unit], engine: Engine, micro_batch_tokens: int, objective: RewardObjectiveConfig
) -> Iterator[_Part]:
    """This rank's parts of an update, on the engine's device."""
    examples = [example for unit in units for example in unit.examples]
    pairs, start = [], 0
    for unit in units:
        pairs += [Pair(start + pair.preferred, start + pair.other, pair.weight) for pair in unit.pairs]
        start += len(unit.examples)
    shares = _pair_shares(pairs, examples, objective)
    batches = _micro_batches(units, micro_batch_tokens)
    for batch, factor in own_share(batches, rank=engine.rank, world_size=engine.world_size):
        yield _part(batch, factor, examples, shares, engine.device)


def _pair_shares(
    pairs: Sequence[Pair], examples: Sequence[Example], objective: RewardObjectiveConfig
) -> dict[Pair, float]:
    """The weight of each pair in the loss of the update; they sum to 1."""
    if isinstance(objective, BradleyTerryConfig) and objective.average == "questions":
        comparisons: Counter[str] = Counter()
        for pair in pairs:
            comparisons[examples[pair.preferred].question_id] += pair.weight
        questions = len(comparisons)
        return {pair: pair.weight / (comparisons[examples[pair.preferred].question_id] * questions) for pair in pairs}
    total = sum(pair.weight for pair in pairs)
    return {pair: pair.weight / total for pair in pairs}


def _part(batch: Batch, factor: float, examples: Sequence[Example], shares: Mapping[Pair, float], device: str) -> _Part:
    """A micro-batch with its share of the update's denominator; `factor` is 0 where it only fills up a rank's passes."""
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


def _micro_batches(units: Sequence[Unit], max_tokens: int) -> list[Batch]:
    """Units as micro-batches of at most `max_tokens` tokens, padding included, longest first; a longer unit stands alone."""
    rows = [Row(example.prompt_ids, example.output_ids) for unit in units for example in unit.examples]
    borders = itertools.accumulate((len(unit.examples) for unit in units), initial=0)
    members = [range(start, end) for start, end in itertools.pairwise(borders)]
    lengths = [max(len(rows[row].prompt_ids) + len(rows[row].output_ids) for row in held) for held in members]
    batches: list[list[int]] = []
    room = 0
    for number in sorted(range(len(units)), key=lambda number: -lengths[number]):
        if len(members[number]) > room or not batches:
            batches.append([])
            room = max_tokens // lengths[number]  # rows; no later unit is longer
        batches[-1] += members[number]
        room -= len(members[number])
    return [collate(rows, indices) for indices in batches]
