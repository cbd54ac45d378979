"""What Algorithm 1 starts from: question sets and the first policy."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from flows.config import ArithmeticData, FileData, IterativeRLConfig
from flows.pretrained import PretrainedPolicy, pretrained_model
from pipeline.store import PrunedArtifactError
from stages.data import (
    QuestionFileConfig,
    arithmetic_demonstrations,
    arithmetic_questions,
    demonstrations_from_solutions,
    read_questions,
)
from stages.models import Checkpoint
from stages.sft import create_policy, supervised_finetuning
from stages.tables import Demonstrations, Questions

__all__ = ["DataSets", "base_model", "initial_policy", "prepare_data"]


@dataclass(frozen=True)
class DataSets:
    """The question sets of a run."""

    train: Questions
    demonstrations: Demonstrations | None
    evaluation: dict[str, Questions]


def prepare_data(data: ArithmeticData | FileData) -> DataSets:
    """Make or read every set."""
    match data:
        case ArithmeticData():
            return DataSets(
                train=arithmetic_questions(data.train, "train"),
                demonstrations=arithmetic_demonstrations(data.demonstrations),
                evaluation={name: arithmetic_questions(part, "held_out") for name, part in data.evaluation.items()},
            )
        case FileData():
            train = read_questions(_below(data.path, data.train))
            return DataSets(
                train=train,
                demonstrations=_demonstrations(train),
                evaluation={name: read_questions(_below(data.path, part)) for name, part in data.evaluation.items()},
            )
        case _:
            assert_never(data)


def base_model(config: IterativeRLConfig, data: DataSets) -> Checkpoint:
    """A model of others, or one made from scratch."""
    if isinstance(config.policy, PretrainedPolicy):
        return pretrained_model(config.policy)
    return create_policy(config.policy, data.demonstrations, config.prompt)


def initial_policy(config: IterativeRLConfig, data: DataSets, base: Checkpoint) -> Checkpoint:
    """pi_theta_init (Algorithm 1, line 1): the base model after supervised fine-tuning, where there is any."""
    if config.sft is None:
        return base
    if data.demonstrations is None:
        raise ValueError("sft: the data set has no solutions to imitate; set sft to null or name the solution column")
    return supervised_finetuning(base, data.demonstrations, config.prompt, config.sft)


def _demonstrations(questions: Questions) -> Demonstrations | None:
    """The set's own solutions; None where it has not a single one, which is all the same to RL."""
    with contextlib.suppress(PrunedArtifactError):  # then the stage answers, which was asked before
        solutions = questions.read().column("solution")
        if solutions.null_count == len(solutions):
            return None
    return demonstrations_from_solutions(questions)


def _below(folder: str, part: QuestionFileConfig) -> QuestionFileConfig:
    return part.override({"path": str(Path(folder) / part.path)})
