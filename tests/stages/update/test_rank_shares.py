"""What the ranks of a group compute of a mini-batch adds up to its gradient, for every objective, in float64.

That gradients are then summed over real processes, under every ZeRO stage: tests/stages/training/test_ranks.py.
"""

from __future__ import annotations

import pytest
import torch

from stages.update import UpdateConfig
from stages.update.examples import pair_up
from stages.update.ledger import Ledger
from stages.update.minibatch import MiniBatch
from stages.update.objectives import method_of
from stages.update.steps import optimizer_step
from tests.stages.update.exact import ExactEngine, policy_model, relative
from tests.stages.update.test_coefficients import examples
from tests.stages.update.test_invariance import OBJECTIVES


def gradients(name: str, world_size: int) -> tuple[list[torch.Tensor], float]:
    """The gradient of each rank, and the loss summed over them."""
    objective, kind = OBJECTIVES[name]
    config, method = UpdateConfig(objective=objective, micro_batch_tokens=16), method_of(objective)
    given = pair_up(examples(kind)) if method.pairs else examples(kind)
    found, loss = [], 0.0
    for rank in range(world_size):
        engine, ledger = ExactEngine(policy_model()), Ledger()
        engine.rank, engine.world_size = rank, world_size
        mini_batch = MiniBatch.of(given, engine, 1.0, config, method)
        if method.needs_reference:
            mini_batch.compare_with(policy_model(1), engine)
        mini_batch.remember_policy(ExactEngine(policy_model(2)))
        optimizer_step(engine, mini_batch, method, config.correction, ledger)
        assert engine.gradient is not None
        found.append(engine.gradient)
        loss += ledger.sums["loss"]
    return found, loss


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_shares_of_all_ranks_add_up_to_the_gradient_of_one(name: str, world_size: int) -> None:
    (alone,), loss = gradients(name, 1)
    shares, shared_loss = gradients(name, world_size)
    assert relative(torch.stack(shares).sum(0), alone) < 1e-12
    assert shared_loss == pytest.approx(loss, rel=1e-9)
    assert all(relative(share, alone) > 1e-3 for share in shares), "a rank computed everything"
