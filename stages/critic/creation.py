"""A critic from a policy: its trunk, and a new head of one output that says 0."""

from __future__ import annotations

from pathlib import Path

from pipeline.stage import record_metrics, stage
from stages.critic.config import CriticConfig
from stages.models import WEIGHTS, Checkpoint, copy_description, model_weights, untrained_classifier, write_tensors

__all__ = ["create_critic"]


@stage(version="1")
def create_critic(policy: Checkpoint, config: CriticConfig) -> Checkpoint:
    """V with the policy's trunk and tokenizer; a token classifier of one label, as plain transformers loads it.

    V = 0 before the first update: advantages then are those without a baseline, instead of those with a random one.

    Args:
        policy: whose trunk it is; its output head (tied to the embeddings or not) stays behind.
        config: of its training. Nothing here depends on it; every critic stage takes the same two.

    Raises:
        ValueError: an architecture that has no token classifier in transformers.
    """
    critic = untrained_classifier(policy, reads="token", label="value")
    record_metrics({"critic/parameters": critic.num_parameters()})

    def fill(folder: Path) -> None:
        copy_description(policy.path, folder)
        critic.config.save_pretrained(folder)
        write_tensors(folder / WEIGHTS, model_weights(critic))

    return Checkpoint.write(fill)
