"""Models with one number for an output, or for each of its tokens: critics and reward models, made from a language model."""

from __future__ import annotations

import copy
from typing import Any, Literal

from stages.models.checkpoint import Checkpoint, load_model

__all__ = ["untrained_classifier"]


def untrained_classifier(trunk: Checkpoint, *, reads: Literal["sequence", "token"], label: str) -> Any:
    """The trunk of `trunk` under a new head of one output that says 0, as plain transformers loads it; float32.

    Zero, whatever the seed: nothing is preferred before anything was learned. The trunk has no gradient until the first update
    has moved the head.

    Args:
        trunk: its output head (tied to the embeddings or not) stays behind.
        reads: a number for an output, or for each token.
        label: what the number is called in config.json.

    Raises:
        ValueError: an architecture that has no such classifier in transformers.
    """
    import torch
    import transformers

    from stages.training.scores import score_head

    trained = load_model(trunk, dtype=torch.float32)
    description = copy.deepcopy(trained.config)
    description.id2label, description.label2id = {0: label}, {label: 0}
    description.classifier_dropout = 0.0  # transformers' 0.1 would act wherever the model is in training mode
    name = {"sequence": "AutoModelForSequenceClassification", "token": "AutoModelForTokenClassification"}[reads]
    try:
        with torch.random.fork_rng():
            model = getattr(transformers, name).from_config(description, dtype=torch.float32)
    except ValueError as error:
        raise ValueError(
            f"transformers has no {name} of architecture {description.model_type}; choose a model of another architecture "
            f"({error})"
        ) from None
    model.base_model.load_state_dict(trained.base_model.state_dict())
    with torch.no_grad():
        for parameter in score_head(model).parameters():
            parameter.zero_()
    model.config.architectures = [type(model).__name__]
    return model
