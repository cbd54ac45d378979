"""A reward model from a policy: its trunk, and a new head of one output that says 0."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.stage import record_metrics, stage
from stages.models import (
    WEIGHTS,
    Checkpoint,
    copy_description,
    load_model,
    load_tokenizer,
    model_weights,
    write_tensors,
)
from stages.reward_models import LABELS, RewardKind
from stages.reward_training.config import RewardModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["create_reward_model"]


@stage(version="1")
def create_reward_model(policy: Checkpoint, config: RewardModelConfig) -> Checkpoint:
    """r_phi before its training, with the policy's trunk and tokenizer, as plain transformers loads it.

    The head is zero: all outputs score alike, whatever the seed. The trunk has no gradient until the first update has moved
    the head.

    Args:
        policy: whose trunk it is. The paper takes the base model, not the instructed one (4.2).
        config: the kind.

    Raises:
        ValueError: an architecture that has no such classifier in transformers.
    """
    import torch

    from stages.training.scores import score_head

    trained = load_model(policy, dtype=torch.float32)
    model = _untrained(trained.config, config.kind)
    model.base_model.load_state_dict(trained.base_model.state_dict())
    model.config.pad_token_id = _padding(load_tokenizer(policy))
    with torch.no_grad():
        for parameter in score_head(model).parameters():
            parameter.zero_()
    record_metrics({"rm/parameters": model.num_parameters()})

    def fill(folder: Path) -> None:
        copy_description(policy.path, folder)
        model.config.save_pretrained(folder)
        write_tensors(folder / WEIGHTS, model_weights(model))

    return Checkpoint.write(fill)


def _padding(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The padding id in config.json, by which plain transformers finds the last token of a padded row.

    None where padding and end of sequence are one token: transformers then refuses to score several rows at once, instead of
    reading each one token too early. (Here nothing depends on it: the scored token is given.)
    """
    same = tokenizer.pad_token_id == tokenizer.eos_token_id
    padding: int | None = None if same else tokenizer.pad_token_id
    return padding


def _untrained(description: Any, kind: RewardKind) -> Any:
    """A classifier of one label with random weights."""
    import torch
    import transformers

    description = copy.deepcopy(description)
    description.id2label = {0: LABELS[kind]}
    description.label2id = {LABELS[kind]: 0}
    description.classifier_dropout = 0.0  # transformers' 0.1 would act wherever the model is in training mode
    name = {"outcome": "AutoModelForSequenceClassification", "process": "AutoModelForTokenClassification"}[kind]
    try:
        with torch.random.fork_rng():
            model = getattr(transformers, name).from_config(description, dtype=torch.float32)
    except ValueError as error:
        raise ValueError(
            f"create_reward_model: transformers has no {name} of architecture {description.model_type}; choose a model of "
            f"another architecture ({error})"
        ) from None
    model.config.architectures = [type(model).__name__]
    return model
