"""The share of one rank: added up over the ranks, gradients and losses are those of one process."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from pipeline.store import Store
from stages.critic.fitting import Fit, join
from stages.models import load_model
from stages.training.engine import StepReport
from tests.stages.critic.worlds import outspoken_critic, tables


class RankAlone:
    """A rank of several whose gradients stay with it."""

    def __init__(self, model: Any, rank: int, world_size: int) -> None:
        self.model, self.rank, self.world_size, self.device = model, rank, world_size, "cpu"
        self.holds, self.skipped = None, 0

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, *, factor: float = 1.0) -> StepReport:
        return StepReport(0.0, 0.0, False)

    def total(self, value: float) -> float:
        return value


def fitted(ranks: int) -> tuple[torch.Tensor, float, list[int]]:
    """Gradient and loss summed over so many ranks, and the passes of each."""
    examples, critic = join(*tables()), outspoken_critic()
    gradient, loss, passes = torch.zeros(()), 0.0, []
    for rank in range(ranks):
        model = load_model(critic, dtype=torch.float32)
        engine: Any = RankAlone(model, rank, ranks)
        fit = Fit([examples], engine, micro_batch_tokens=12)
        list(fit.train(1))
        gradient = gradient + torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        loss += fit.reports[0].loss
        passes.append(len(fit.mini_batches[0]))
    return gradient, loss, passes


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_batch_and_not_its_denominator(store: Store, ranks: int) -> None:
    gradient, loss, (alone,) = fitted(1)
    shared, shared_loss, passes = fitted(ranks)
    assert passes == [-(-alone // ranks)] * ranks  # equally many, whatever remains
    assert shared_loss == pytest.approx(loss, rel=1e-6)
    assert torch.linalg.vector_norm(shared - gradient) < 1e-6 * torch.linalg.vector_norm(gradient)
