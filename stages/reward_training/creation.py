"""A reward model from a policy: its trunk, and a new head of one output that says 0."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pipeline.stage import record_metrics, stage
from stages.models import (
    LABELS,
    WEIGHTS,
    Checkpoint,
    RewardKind,
    copy_description,
    load_tokenizer,
    model_weights,
    untrained_classifier,
    write_tensors,
)
from stages.reward_training.config import RewardModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["create_reward_model"]

_READS: Final[dict[RewardKind, Literal["sequence", "token"]]] = {"outcome": "sequence", "process": "token"}


@stage(version="1")
def create_reward_model(policy: Checkpoint, config: RewardModelConfig) -> Checkpoint:
    """r_phi before its training, with the policy's trunk and tokenizer, as plain transformers loads it.

    Args:
        policy: whose trunk it is. The paper takes the base model, not the instructed one (4.2).
        config: the kind.

    Raises:
        ValueError: an architecture that has no such classifier in transformers.
    """
    model = untrained_classifier(policy, reads=_READS[config.kind], label=LABELS[config.kind])
    model.config.pad_token_id = _padding(load_tokenizer(policy))
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
