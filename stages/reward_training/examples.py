"""From labels to what a reward model learns from: examples, and the units that are learned from as a whole."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, assert_never

from pydantic import Field

from pipeline.config import Config
from stages.models import Checkpoint, RewardKind, check_lengths, reward_kind, vocabulary_of
from stages.tables import RewardLabels


class BradleyTerryConfig(Config):
    """-log sigma(s+ - s-) of pairs of a right and a wrong output of one question; outcome models only.

    Fits differences within a question, which is all that a group's advantages use; the level of the scores means nothing.
    """

    kind: Literal["bradley_terry"] = "bradley_terry"
    """Discriminator."""
    pairs: Literal["all", "matched"] = "all"
    """`all`: every right output with every wrong one of its question (after Ouyang et al. 2022, 3.5), computed together: G
    outputs must fit into memory at once. `matched`: the i-th right with the i-th wrong, each used once, in micro-batches of
    any size; what has no counterpart is not learned from."""
    average: Literal["questions", "pairs"] = "questions"
    """`questions`: mean over questions of the mean over their pairs: the 1 / (K choose 2) of Ouyang et al. 2022, Eq. 1, which
    ranks K outputs of a prompt. Ours have R (K - R) pairs, R outputs being right. `pairs`: mean over all pairs of the update,
    which weighs a question with half its outputs right (K / 2)^2 / (K - 1) times one with a single right output."""


class PointwiseConfig(Config):
    """Binary cross-entropy of each score with its label, mean over outputs; of a process model mean over outputs of the mean
    over their steps. sigma(score) estimates the chance of being right (Math-Shepherd, Eq. 1 and 2)."""

    kind: Literal["pointwise"] = "pointwise"
    """Discriminator."""


RewardObjectiveConfig = Annotated[BradleyTerryConfig | PointwiseConfig, Field(discriminator="kind")]


@dataclass(frozen=True)
class Example:
    """An output, where its scores are read, and the label of each; it counts for `weight` equal ones."""

    question_id: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    places: tuple[int, ...]
    """Indices into `output_ids`: one of an outcome, one for each step of a process."""
    labels: tuple[float, ...]
    """One for each place."""
    weight: int = 1


class Pair(NamedTuple):
    """A comparison: numbers of two examples, counting for `weight` equal ones."""

    preferred: int
    other: int
    weight: int = 1


@dataclass(frozen=True)
class Unit:
    """Examples that must share one micro-batch, and the pairs to compare among them, numbered within the unit."""

    examples: tuple[Example, ...]
    pairs: tuple[Pair, ...] = ()


def read_examples(labels: RewardLabels, model: Checkpoint, objective: RewardObjectiveConfig) -> list[Example]:
    """Read the examples that `model` can learn from, and check them.

    For a process model those with step labels; with pairs those of questions that have a right and a wrong output.

    Raises:
        ValueError: an objective that does not fit the model; no labels; another vocabulary; a row that is too long or names a
            token it does not have; labels without any difference to learn.
    """
    kind = reward_kind(model)
    if kind == "process" and isinstance(objective, BradleyTerryConfig):
        raise ValueError(
            "objective bradley_terry compares whole outputs; train a process model with objective.kind=pointwise"
        )
    rows = labels.rows()
    _check_vocabulary(rows, model)
    check_lengths(model, rows)
    examples = [_example(row, kind) for row in rows if kind == "outcome" or row["step_ends"]]
    if not examples:
        missing = "step labels; score the outputs with a component of kind `steps`" if rows else "rows"
        raise ValueError(f"there is nothing to train the reward model on: {labels} has no {missing}")
    return _with_differences(examples, objective)


def draw_updates(examples: Sequence[Example], questions: int, *, epoch: int, seed: int) -> list[list[Example]]:
    """Draw the updates of one epoch: each has the examples of `questions` questions, in an order of the epoch's own."""
    groups = list(_by_question(examples).values())
    uniform = random.Random(f"reward_training/{seed}/{epoch}").random
    groups.sort(key=lambda _: uniform())
    return [
        [example for group in groups[start : start + questions] for example in group]
        for start in range(0, len(groups), questions)
    ]


def units_of(examples: Sequence[Example], objective: RewardObjectiveConfig) -> list[Unit]:
    """Return the units that are learned from as a whole: an output, a pair, or a question's outputs with all their pairs.

    Equal outputs of a question are computed once, weighted by their number: the same sum, up to rounding, for less work.
    Matched pairs are left as they are.
    """
    match objective:
        case PointwiseConfig():
            return [Unit((example,)) for example in _merged(examples)]
        case BradleyTerryConfig():
            return [unit for group in _by_question(examples).values() for unit in _compared(group, objective)]
        case _ as unknown:
            assert_never(unknown)


def _compared(group: Sequence[Example], objective: BradleyTerryConfig) -> list[Unit]:
    right = [example for example in group if example.labels[0] == 1]
    wrong = [example for example in group if example.labels[0] != 1]
    match objective.pairs:
        case "matched":
            return [Unit(pair, (Pair(0, 1),)) for pair in zip(right, wrong, strict=False)]
        case "all":
            right, wrong = _merged(right), _merged(wrong)
            pairs = [
                Pair(i, len(right) + j, preferred.weight * other.weight)
                for i, preferred in enumerate(right)
                for j, other in enumerate(wrong)
            ]
            return [Unit((*right, *wrong), tuple(pairs))] if pairs else []
        case _:
            assert_never(objective.pairs)


def _merged(examples: Sequence[Example]) -> list[Example]:
    """Return each distinct example with how often it occurs, in the order first seen."""
    return [dataclasses.replace(example, weight=count) for example, count in Counter(examples).items()]


def _by_question(examples: Sequence[Example]) -> dict[str, list[Example]]:
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.question_id, []).append(example)
    return groups


def _example(row: Mapping[str, Any], kind: RewardKind) -> Example:
    places = [row["scored_index"]] if kind == "outcome" else row["step_ends"]
    labels = [row["label"]] if kind == "outcome" else row["step_labels"]
    key, tokens = (row["question_id"], row["sample"]), len(row["output_ids"])
    if len(places) != len(labels or ()):
        raise ValueError(f"output {key}: expected one step label for each of {len(places)} step ends, found {labels}")
    if not all(0 <= place < tokens for place in places):
        raise ValueError(f"output {key} has {tokens} tokens; its scores cannot be read at {places}")
    if not all(0 <= label <= 1 for label in labels):
        raise ValueError(f"output {key}: expected labels from 0 to 1, found {labels}")
    prompt_ids, output_ids = tuple(row["prompt_ids"]), tuple(row["output_ids"])
    return Example(row["question_id"], prompt_ids, output_ids, tuple(places), tuple(labels))


def _check_vocabulary(rows: Sequence[Mapping[str, Any]], model: Checkpoint) -> None:
    own = vocabulary_of(model)
    for row in rows:
        if row["vocabulary"] != own:
            raise ValueError(
                f"output {(row['question_id'], row['sample'])} was sampled with another tokenizer than the reward {model} has "
                f"(vocabulary {row['vocabulary'][:12]}, the model's is {own[:12]}); its ids mean other tokens there: make the "
                "reward model from a model that shares the policy's tokenizer"
            )


def nothing_to_learn(labels: RewardLabels, kind: RewardKind, objective: RewardObjectiveConfig) -> str | None:
    """Return why the training of a model of this kind on these labels would fail; None where it would not."""
    column = "label" if kind == "outcome" else "step_labels"
    table = labels.read().select(["question_id", column])
    groups: dict[str, list[float]] = {}
    for question_id, found in zip(table["question_id"].to_pylist(), table[column].to_pylist(), strict=True):
        groups.setdefault(question_id, []).extend([found] if isinstance(found, float) else found or [])
    return _objection(groups, objective)


def _objection(labels_by_question: Mapping[str, Sequence[float]], objective: RewardObjectiveConfig) -> str | None:
    labels = [label for group in labels_by_question.values() for label in group]
    if isinstance(objective, BradleyTerryConfig):
        if any(1 in group and any(label != 1 for label in group) for group in labels_by_question.values()):
            return None
        return (
            f"no question has both a right and a wrong output ({sum(label == 1 for label in labels)} of {len(labels)} are "
            "right), so there is no pair to compare: sample more outputs per question, at a higher temperature or of questions "
            "of medium difficulty, or set objective.kind=pointwise"
        )
    if not labels:
        return "there are no labels of its kind"
    if min(labels) == max(labels):
        return (
            f"all {len(labels)} labels are {labels[0]:g}; a reward model would learn a constant: sample from questions that "
            "the policy answers sometimes, not always or never"
        )
    return None


def _with_differences(examples: list[Example], objective: RewardObjectiveConfig) -> list[Example]:
    """Return the examples with something to learn from: with pairs, those of questions that have one."""
    groups = _by_question(examples)
    labels = {question: [label for example in group for label in example.labels] for question, group in groups.items()}
    objection = _objection(labels, objective)
    if objection:
        raise ValueError(objection)
    if isinstance(objective, BradleyTerryConfig):
        return [example for group in groups.values() if _compared(group, objective) for example in group]
    return examples
