"""A tiny policy, outputs of uneven lengths and returns for tests of the critic."""

from __future__ import annotations

import random
from typing import Any

import torch

from stages.critic import CriticConfig, create_critic
from stages.models import Checkpoint
from stages.tables import Advantages, Rollouts
from stages.training import AdamWConfig, TrainingConfig
from tests.stages.rows import advantage_row, rollout_row
from tests.stages.training.tiny import VOCABULARY, changed, remembered, tiny_checkpoint

Q, G = 2, 3


def exploration() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of Q x G outputs, and of advantages with returns between 0 and 1; to be written as they are or changed."""
    rng = random.Random(3)
    outputs: list[dict[str, Any]] = []
    advantages: list[dict[str, Any]] = []
    for question in range(Q):
        prompt = [rng.randrange(3, VOCABULARY) for _ in range(2 + 3 * question)]
        for sample in range(G):
            ids = [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 7))]
            outputs.append(rollout_row(f"q{question}", sample, ids, prompt))
            returns = [rng.random() for _ in ids]
            advantages.append(advantage_row(f"q{question}", sample, [1.0] * len(ids), returns=returns))
    return outputs, advantages


def tables() -> tuple[Rollouts, Advantages]:
    outputs, advantages = exploration()
    return Rollouts.write(outputs), Advantages.write(advantages)


def exact(*, learning_rate: float = 1e-2, **changes: Any) -> CriticConfig:
    """fp32 and gradients that are not clipped."""
    adamw = AdamWConfig(learning_rate=learning_rate)
    training = TrainingConfig(precision="fp32", max_grad_norm=0.0, optimizer=adamw, threads=1)
    return CriticConfig(**({"training": training} | changes))


def tiny_critic(**settings: Any) -> Checkpoint:
    return create_critic(tiny_checkpoint(**settings), exact())


@remembered
def outspoken_critic() -> Checkpoint:
    """A tiny critic whose head is not zero: its values differ from token to token."""
    generator = torch.Generator().manual_seed(5)

    def speak(weights: dict[str, torch.Tensor]) -> None:
        weights["score.weight"] = 0.1 * torch.randn(weights["score.weight"].shape, generator=generator)
        weights["score.bias"] = torch.tensor([0.25])

    return changed(tiny_critic(), speak)
