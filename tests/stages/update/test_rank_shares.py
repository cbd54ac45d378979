"""What the ranks of a group compute of a mini-batch adds up to its gradient, for every objective, in float64.

That gradients are then summed over real processes, under every ZeRO stage: tests/stages/training/test_ranks.py.
"""

from __future__ import annotations

import pytest
import torch

from stages.training.loop import optimizer_step
from stages.update import UpdateConfig
from stages.update.loss import MiniBatch, policy_loss
from stages.update.metrics import UpdateMetrics
from stages.update.objectives import method_of
from stages.update.stage import pair_up
from tests.stages.update.exact import ExactEngine, in_lockstep, logprobs, policy_model, relative
from tests.stages.update.test_coefficients import examples
from tests.stages.update.test_invariance import OBJECTIVES


def gradients(name: str, world_size: int) -> tuple[list[torch.Tensor], float]:
    """The gradient of each rank, and the loss summed over them."""
    objective, kind = OBJECTIVES[name]
    config, method = UpdateConfig(objective=objective, micro_batch_tokens=16), method_of(objective)
    given = pair_up(examples(kind)) if method.pairs else examples(kind)
    found, loss = [], 0.0
    for rank in range(world_size):
        engine, noted = ExactEngine(policy_model()), UpdateMetrics()
        engine.rank, engine.world_size = rank, world_size
        mini_batch = MiniBatch.of(given, engine, 1.0, config, method)
        if method.needs_reference:
            mini_batch.compare_with(policy_model(1), engine)
        mini_batch.remember_policy(ExactEngine(policy_model(2)))
        share = policy_loss(engine, mini_batch.temperature, method, config.correction, noted.add)
        noted.stepped(optimizer_step(engine, mini_batch.parts, share))
        found.append(engine.gradient)
        loss += noted.sums["loss"]
    return found, loss


@pytest.mark.claim("means of micro-batch means")
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_shares_of_all_ranks_add_up_to_the_gradient_of_one(name: str, world_size: int) -> None:
    (single,), loss = gradients(name, 1)
    shares, shared_loss = gradients(name, world_size)
    assert relative(torch.stack(shares).sum(0), single) < 1e-12
    assert shared_loss == pytest.approx(loss, rel=1e-9)
    assert all(relative(share, single) > 1e-3 for share in shares), "a rank computed everything"


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_every_rank_has_the_extreme_ratios_and_the_padding_of_all_outputs(world_size: int) -> None:
    """Three micro-batches; a rank that computes another's to stay in step counts nothing twice."""
    config, given = UpdateConfig(micro_batch_tokens=60), examples("tokens")
    method = method_of(config.objective)

    def measure(engine: ExactEngine) -> dict[str, float]:
        noted, mini_batch = UpdateMetrics(), MiniBatch.of(given, engine, 1.0, config, method)
        mini_batch.compare_with(policy_model(1), engine)
        mini_batch.remember_policy(ExactEngine(policy_model(2)))
        share = policy_loss(engine, mini_batch.temperature, method, config.correction, noted.add)
        noted.stepped(optimizer_step(engine, mini_batch.parts, share))
        noted.all_reduce(engine)
        metrics = noted.metrics(beta=method.beta, seconds=1.0, computed=0)
        return {name: metrics[f"policy/{name}"] for name in ("ratio_max", "ratio_min", "padding_share")}

    ratios = torch.cat([(logprobs(policy_model(), e) - logprobs(policy_model(2), e)).detach().exp() for e in given])
    lengths = sorted((len(example.prompt_ids) + len(example.output_ids) for example in given), reverse=True)
    tokens, places = sum(lengths), 0
    while lengths:
        rows = 60 // lengths[0]
        places += len(lengths[:rows]) * lengths[0]
        del lengths[:rows]
    expected = {
        "ratio_max": ratios.max().item(),
        "ratio_min": ratios.min().item(),
        "padding_share": 1 - tokens / places,
    }
    assert expected["padding_share"] > 0.01
    assert in_lockstep(world_size, measure) == [pytest.approx(expected, rel=1e-5)] * world_size
