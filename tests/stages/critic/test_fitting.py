"""The share of one rank: added up over the ranks, gradients and losses are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.store import Store
from stages.critic.fitting import Fit, join
from stages.models import load_model
from stages.tables import Advantages, Rollouts
from tests.stages.critic.worlds import exploration, outspoken_critic, tables
from tests.stages.update.exact import ExactEngine, gradient_of, relative


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


def test_the_critic_learns_before_tokens_that_the_policy_wrote_and_counts_these_alone(store: Store) -> None:
    rows, advantages = exploration()
    turns = [None if len(row["output_ids"]) < 4 else [(0, 2), (3, len(row["output_ids"]))] for row in rows]
    spans = [None if each is None else [{"start": start, "end": end} for start, end in each] for each in turns]
    assert sum(each is not None for each in turns) >= 2
    outputs = Rollouts.write([row | {"turns": each} for row, each in zip(rows, spans, strict=True)])
    model = load_model(outspoken_critic(), dtype=torch.float32).double()
    engine: Any = ExactEngine(model)
    fit = Fit([join(outputs, Advantages.write(advantages))], engine, micro_batch_tokens=1000)
    list(fit.train(1))
    loss = torch.zeros((), dtype=torch.float64)
    for row, learned, each in zip(rows, advantages, turns, strict=True):
        prompt, ids = row["prompt_ids"], row["output_ids"]
        hidden = model.base_model(input_ids=torch.tensor([[*prompt, *ids]])).last_hidden_state[0]
        value = model.score(hidden)[len(prompt) - 1 : -1, 0]
        own = [at for at in range(len(ids)) if each is None or any(start <= at < end for start, end in each)]
        returns = torch.tensor(learned["returns"], dtype=torch.float32).double()
        loss = loss + 0.5 * (value - returns)[own].square().mean() / len(rows)
    loss.backward()
    assert fit.reports[0].loss == pytest.approx(float(loss), rel=1e-6)
    assert relative(engine.gradient, gradient_of(model)) < 1e-6
