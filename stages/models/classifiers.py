"""Critics and reward models: made from a language model, and what the checkpoint of a reward model says about itself."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from stages.models.checkpoint import Checkpoint, load_model, load_tokenizer
from stages.models.folders import WEIGHTS, copy_description
from stages.models.tensors import model_weights, write_tensors
from stages.models.trusted_code import read_object


def untrained_classifier(trunk: Checkpoint, *, reads: Literal["sequence", "token"], label: str) -> Any:
    """Put a head of one output that says 0 on the trunk of `trunk`, as plain transformers loads it; float32.

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


def save_classifier(trunk: Checkpoint, model: Any) -> Checkpoint:
    """Write a classifier that was just made from `trunk`, with the tokenizer of that."""

    def fill(folder: Path) -> None:
        copy_description(trunk.path, folder)
        model.config.save_pretrained(folder)
        write_tensors(folder / WEIGHTS, model_weights(model))

    return Checkpoint.write(fill)


# ------------------------------------------------------------------------------------------------ reward models

RewardKind = Literal["outcome", "process"]
"""`outcome`: one score for an output, read at its last token. `process`: one for each step, read at the step's last token."""

LABELS: dict[RewardKind, str] = {"outcome": "reward", "process": "step_reward"}
"""Name of the single label in config.json; that of a critic, a token classifier too, is `value`."""


def reward_kind(checkpoint: Checkpoint) -> RewardKind:
    """Return which kind of reward model it is, by its architecture and its label.

    Raises:
        ValueError: it is none.
    """
    description = _description(checkpoint)
    architecture = (description.get("architectures") or ["(none)"])[0]
    labels = description.get("id2label") or {}
    if architecture.endswith("ForSequenceClassification") and len(labels) == 1:
        return "outcome"
    # A critic is a token classifier of one label as well, and its values are no rewards.
    if architecture.endswith("ForTokenClassification") and len(labels) == 1 and "value" not in labels.values():
        return "process"
    raise ValueError(
        f"{checkpoint} is no reward model: expected a sequence or token classifier of one label, and no critic; found "
        f"{architecture} with labels {list(labels.values())}; make one with create_reward_model"
    )


def vocabulary_of(checkpoint: Checkpoint) -> str:
    """Return the sha256 of the tokenizer's map from id to token: it decides whether two models read ids alike.

    Chat template, normaliser and the roles of special tokens are no part of it: a base and an instructed model may differ in
    them and still share every id.
    """
    tokens = sorted((number, token) for token, number in load_tokenizer(checkpoint).get_vocab().items())
    return hashlib.sha256(json.dumps(tokens, ensure_ascii=False).encode()).hexdigest()


def same_vocabulary(policy: Checkpoint, model: Checkpoint) -> bool:
    """Return whether both know the same token by every id."""
    files = [checkpoint.described / "tokenizer.json" for checkpoint in (policy, model)]
    if all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
        return True
    return vocabulary_of(policy) == vocabulary_of(model)


def check_lengths(model: Checkpoint, rows: Sequence[dict[str, Any]]) -> None:
    """Refuse what the model cannot read whole: it is never cut.

    Args:
        rows: with `question_id`, `sample`, `prompt_ids` and `output_ids`.

    Raises:
        ValueError: an output without tokens, an input beyond the window, an id beyond the embedding; each by its row.
    """
    description = _description(model)
    window, known = description.get("max_position_embeddings"), description.get("vocab_size")
    for row in rows:
        key = (row["question_id"], row["sample"])
        prompt, output = len(row["prompt_ids"]), len(row["output_ids"])
        if not prompt or not output:
            raise ValueError(f"output {key}: {prompt} prompt and {output} output tokens; both need at least one")
        if window is not None and prompt + output > window:
            raise ValueError(
                f"output {key}: {prompt} prompt + {output} output tokens are {prompt + output}, the reward {model} has a "
                f"window of {window}; a cut input would be scored for what it does not say: shorten the outputs, or take a "
                "model with a longer window"
            )
        largest = max(*row["prompt_ids"], *row["output_ids"])
        if known is not None and largest >= known:
            raise ValueError(
                f"output {key} has the token id {largest}, the reward {model} knows ids below {known}; it must share the "
                "tokenizer of the policy that sampled"
            )


def _description(checkpoint: Checkpoint) -> dict[str, Any]:
    return read_object(checkpoint.described / "config.json")
