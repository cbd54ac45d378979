"""Prepare the question sets and demonstrations that Algorithm 1 starts from."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

from flows.config import ArithmeticData, FileData, IterativeRLConfig, PretrainedPolicy
from pipeline.artifact import ArtifactError
from pipeline.config import ConfigError
from pipeline.store import PrunedArtifactError, StoreError, current_store
from stages.data import (
    DataError,
    PromptLimitConfig,
    PromptRoom,
    QuestionFileConfig,
    arithmetic_demonstrations,
    arithmetic_questions,
    demonstrations_from_solutions,
    limit_prompts,
    longest_question,
    read_questions,
)
from stages.models import Checkpoint
from stages.tables import Demonstrations, Questions, Rewards
from stages.text import PromptError


@dataclass(frozen=True)
class DataSets:
    """The question sets of a run."""

    train: Questions
    demonstrations: Demonstrations | None
    evaluation: dict[str, Questions]
    rewards: tuple[Rewards, ...] = ()
    """First estimates of a curriculum."""


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
            train = read_questions(below(data.path, data.train))
            return DataSets(
                train=train,
                demonstrations=demonstrations_of_set(train),
                evaluation={name: read_questions(below(data.path, part)) for name, part in data.evaluation.items()},
            )
        case _:
            assert_never(data)


def limit_data(config: IterativeRLConfig, data: DataSets, base: Checkpoint) -> DataSets:
    """Return the questions whose prompts leave room for an output, and the demonstrations of these, enough for every step.

    Raises:
        DataError: by set: prompts that are too long (`data.max_prompt_tokens`), or that the tokenizer cannot express.
        ConfigError: fewer questions than a step draws; rewards of a curriculum that are not there, or of other questions.
    """
    if isinstance(config.data, ArithmeticData):
        if complaints := list(arithmetic_complaints(config, config.data)):
            raise ConfigError("\n  ".join(complaints))
        return replace(data, rewards=first_rewards(config, data.train))
    train = _limit(config, "train", data.train, base)
    evaluation = {name: _limit(config, f"evaluation.{name}", part, base) for name, part in data.evaluation.items()}
    demonstrations = data.demonstrations and demonstrations_of_set(train)
    questions = int(train.metrics["data/questions"])
    if complaints := list(shortages(config, questions, questions if demonstrations else None)):
        raise ConfigError("\n  ".join(complaints))
    return DataSets(train, demonstrations, evaluation, first_rewards(config, train))


def first_rewards(config: IterativeRLConfig, questions: Questions) -> tuple[Rewards, ...]:
    """Return the tables that `curriculum.rewards` names; raise ConfigError for one that says nothing of `questions`."""
    names = config.curriculum.rewards if config.curriculum else ()
    return tuple(rewards_named(name, question_ids(questions)) for name in names)


def question_ids(table: Questions | Rewards) -> set[str]:
    """Return the ids of the questions in a table."""
    return set(table.read(["question_id"])["question_id"].to_pylist())


def rewards_named(name: str, questions: set[str]) -> Rewards:
    """Return the table of rewards that a digest or its beginning names, in the current store.

    Raises:
        ConfigError: none, another table, or rewards of none of these questions.
    """
    try:
        found = Rewards(current_store().resolve(name))
        with contextlib.suppress(PrunedArtifactError):  # draws that read it may be recorded
            if question_ids(found).isdisjoint(questions):
                raise ConfigError("its rewards are of other questions than data.train's")
    except (StoreError, ArtifactError, ConfigError) as error:
        raise ConfigError(f"curriculum.rewards: expected tables of rewards, found {name}: {error}") from None
    return found


def shortages(config: IterativeRLConfig, questions: int, demonstrations: int | None) -> Iterator[str]:
    """Name whatever draws more at once than there is; `demonstrations` is None where there are none."""
    plan, drawn = config.reward_model, config.questions_per_step
    if config.data_source == "demonstrations":
        if demonstrations is not None and drawn * config.rollout.G > demonstrations:
            yield (
                f"questions_per_step={drawn} and rollout.G={config.rollout.G} draw {drawn * config.rollout.G:,} demonstrations "
                f"a step, and there are {demonstrations:,}; lower one of them"
            )
    elif drawn > questions:
        yield f"questions_per_step={drawn} draws more than the {questions:,} questions of data.train; lower it"
    elif drawn == questions and config.curriculum is not None:
        yield f"questions_per_step={drawn} draws all questions of data.train, and leaves curriculum no choice; lower it"
    if plan is not None and plan.questions > questions:
        yield f"reward_model.questions={plan.questions} is more than the {questions:,} questions of data.train; lower it"
    if config.sft is not None and demonstrations is not None and config.sft.batch_size > demonstrations:
        yield f"sft.batch_size={config.sft.batch_size} is more than the {demonstrations:,} demonstrations; lower it"


def arithmetic_complaints(config: IterativeRLConfig, data: ArithmeticData) -> Iterator[str]:
    """Name what a run on the built-in world would fail of: too few questions, or a window below its longest prompt.

    Prompts are known where a token is a character; other tokenizers have fewer tokens, and the rollout says what is too long.
    """
    yield from shortages(config, data.train.count, data.demonstrations.chains.count)
    policy, prompt = config.policy, config.prompt
    if isinstance(policy, PretrainedPolicy) or policy.tokenizer.kind != "character" or prompt.chat == "tokenizer":
        return
    turn = len("User: \n\nAssistant:") if prompt.chat == "deepseek_math" else 0
    frame = len("".join((prompt.prefix, *prompt.around(), prompt.suffix))) + turn
    window = policy.settings.get("max_position_embeddings")
    sets = {"train": data.train} | {f"evaluation.{name}": part for name, part in data.evaluation.items()}
    for name, part in sets.items():
        room = room_of(config, name, window if isinstance(window, int) else None)
        digits = 2 if part.numbers == "small" else 3
        # At most so many: only near the limit are the questions themselves looked at.
        if room.tokens is None or frame + len("Compute .") + (digits + 1) * part.longest - 1 <= room.tokens:
            continue
        longest = frame + longest_question(part, "train" if name == "train" else "held_out")
        if longest > room.tokens:
            yield (
                f"data.{name}: its longest prompt has {longest} tokens, and {max(room.tokens, 0)} fit ({room}); lower "
                "rollout.max_output_tokens, or raise policy.settings.max_position_embeddings"
            )


def demonstrations_of_set(questions: Questions) -> Demonstrations | None:
    """Return the set's own solutions; None where it has none, which RL does not need."""
    with contextlib.suppress(PrunedArtifactError):  # then the stage answers, which was asked before
        solutions = questions.read().column("solution")
        if solutions.null_count == len(solutions):
            return None
    return demonstrations_from_solutions(questions)


def room_of(config: IterativeRLConfig, name: str, window: int | None) -> PromptRoom:
    """Return what bounds the prompts of the set `name` (`train`, `evaluation.test`) under a model's window."""
    backend = (config.evaluation.backend if name != "train" else None) or config.rollout.backend
    limit = config.data.max_prompt_tokens if isinstance(config.data, FileData) else PromptLimitConfig()
    return PromptRoom(window, getattr(backend, "max_model_len", None), config.rollout.max_output_tokens, limit)


def _limit(config: IterativeRLConfig, name: str, questions: Questions, base: Checkpoint) -> Questions:
    room = room_of(config, name, None)
    most, engine = room.max_output_tokens, room.max_model_len
    try:
        limited = limit_prompts(
            base, questions, config.prompt, room.limit, max_output_tokens=most, max_model_len=engine
        )
    except (DataError, PromptError) as error:
        raise DataError(f"data.{name}: {error}") from None
    if dropped := int(limited.metrics["data/dropped"]):
        left = int(limited.metrics["data/questions"])
        warnings.warn(
            f"data.{name}: {dropped:,} of {dropped + left:,} questions are left out: their prompts are too long "
            "(data.max_prompt_tokens)",
            stacklevel=3,
        )
    return limited


def below(folder: str, part: QuestionFileConfig) -> QuestionFileConfig:
    """Return a set with its path under `folder`, unless it is absolute; the name of a hub data set is no path."""
    if part.format == "hub":
        return part
    return part.override({"path": str(Path(folder) / Path(part.path).expanduser())})
