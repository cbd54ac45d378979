"""A critic from a policy: its trunk, and a new head of one output that says 0."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from pipeline.stage import record_metrics, stage
from stages.critic.config import CriticConfig
from stages.models import WEIGHTS, Checkpoint, copy_description, load_model, model_weights, write_tensors

__all__ = ["create_critic"]


@stage(version="1")
def create_critic(policy: Checkpoint, config: CriticConfig) -> Checkpoint:
    """V with the policy's trunk and tokenizer; a token classifier of one label, as plain transformers loads it.

    The head is zero, so that V = 0 before the first update: advantages then are those without a baseline, instead of those
    with a random one. The trunk has no gradient until the first update has moved the head.

    Args:
        policy: whose trunk it is; its output head (tied to the embeddings or not) stays behind.
        config: of its training. Nothing here depends on it; every critic stage takes the same two.

    Raises:
        ValueError: an architecture that has no token classifier in transformers.
    """
    import torch

    from stages.critic.forward import value_head

    trained = load_model(policy, dtype=torch.float32)
    critic = _untrained(trained.config)
    critic.base_model.load_state_dict(trained.base_model.state_dict())
    with torch.no_grad():
        for parameter in value_head(critic).parameters():
            parameter.zero_()
    record_metrics({"critic/parameters": critic.num_parameters()})

    def fill(folder: Path) -> None:
        copy_description(policy.path, folder)
        critic.config.save_pretrained(folder)
        write_tensors(folder / WEIGHTS, model_weights(critic))

    return Checkpoint.write(fill)


def _untrained(description: Any) -> Any:
    """A token classifier of one label with random weights."""
    import torch
    from transformers import AutoModelForTokenClassification

    description = copy.deepcopy(description)
    description.id2label = {0: "value"}
    description.label2id = {"value": 0}
    description.classifier_dropout = (
        0.0  # transformers' default of 0.1 would act wherever the critic is in training mode
    )
    try:
        with torch.random.fork_rng():
            critic = AutoModelForTokenClassification.from_config(description, dtype=torch.float32)
    except ValueError as error:
        raise ValueError(
            f"create_critic: transformers has no token classifier of architecture {description.model_type}; "
            f"choose a policy of another architecture ({error})"
        ) from None
    critic.config.architectures = [type(critic).__name__]
    return critic
