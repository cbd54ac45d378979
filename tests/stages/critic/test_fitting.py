"""The share of one rank: added up over the ranks, gradients and losses are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.store import Store
from stages.critic.fitting import Fit, join
from stages.models import load_model
from tests.stages.critic.worlds import outspoken_critic, tables
from tests.stages.update.exact import ExactEngine, relative


def fitted(ranks: int) -> tuple[torch.Tensor, float, list[int]]:
    """Gradient and loss summed over so many ranks, and the passes of each."""
    examples, critic = join(*tables()), outspoken_critic()
    gradient, loss, passes = torch.zeros(()), 0.0, []
    for rank in range(ranks):
        engine: Any = ExactEngine(load_model(critic, dtype=torch.float32))
        engine.rank, engine.world_size = rank, ranks
        fit = Fit([examples], engine, micro_batch_tokens=12)
        list(fit.train(1))
        gradient = gradient + engine.gradient
        loss += fit.reports[0].loss
        passes.append(len(fit.mini_batches[0]))
    return gradient, loss, passes


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_batch_and_not_its_denominator(store: Store, ranks: int) -> None:
    gradient, loss, (whole,) = fitted(1)
    shared, shared_loss, passes = fitted(ranks)
    assert passes == [-(-whole // ranks)] * ranks  # equally many, whatever remains
    assert shared_loss == pytest.approx(loss, rel=1e-6)
    assert relative(shared, gradient) < 1e-6
