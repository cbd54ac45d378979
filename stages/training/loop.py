"""The optimizer loop of every stage that trains: micro-batches, gradient accumulation, clipping, optimizer step.

Supervised fine-tuning, critic, reward models and the policy update differ in what a micro-batch is and in its loss. The loss of
a micro-batch is divided by the count of the whole mini-batch, over all micro-batches and ranks, so that gradients add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from stages.training.engine import Engine, StepReport

__all__ = ["optimizer_step", "train"]

Part = TypeVar("Part")


def train(
    engine: Engine,
    steps: Iterable[tuple[Sequence[Part], float]],
    loss: Callable[[Part], Tensor],
    *,
    before_step: Callable[[], None] | None = None,
) -> Iterator[StepReport]:
    """Make optimizer steps and yield what each did.

    Args:
        steps: for each step this rank's micro-batches and the factor of its learning rate. Read one at a time: a generator
            may decide what comes next by what the caller made of the steps before.
        loss: as `optimizer_step`; so is `before_step`.

    Raises:
        GradientError: more steps in a row were skipped than `TrainingConfig.max_skipped_steps` allows.
    """
    for parts, factor in steps:
        yield optimizer_step(engine, parts, loss, factor=factor, before_step=before_step)


def optimizer_step(
    engine: Engine,
    parts: Sequence[Part],
    loss: Callable[[Part], Tensor],
    *,
    factor: float = 1.0,
    before_step: Callable[[], None] | None = None,
) -> StepReport:
    """Accumulate the gradients of a mini-batch and step; `loss` of the report is this rank's share, before the step.

    Args:
        parts: this rank's micro-batches. None: there is nothing to learn from, no step is made, and it counts as skipped.
        loss: forward and loss of a micro-batch, with gradient.
        factor: of the scheduled learning rate.
        before_step: called once gradients are accumulated; what it raises keeps the step from being made.
    """
    losses: list[Tensor] = []
    for number, part in enumerate(parts, start=1):
        share = loss(part)
        engine.backward(share, last=number == len(parts))
        losses.append(share.detach())
    if not parts:
        return StepReport(grad_norm=0.0, learning_rate=0.0, skipped=True)
    if before_step is not None:
        before_step()
    report = engine.step(factor=factor)
    return report._replace(loss=sum(share.item() for share in losses))
