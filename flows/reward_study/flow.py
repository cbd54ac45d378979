"""Train a reward model on labelled solutions of a file, and compare it with baselines on questions it has not seen.

The same stages as in Algorithm 1, but none that samples: solutions take the place of a policy's outputs, and the rules label
them. Reward model and baselines learn from the same rows and are measured on the same others.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from flows.algorithm.data import below
from flows.algorithm.models import pretrained_model
from flows.config import PretrainedPolicy
from flows.reward_study.config import RewardModelStudyConfig
from flows.runs.curve import calls_of
from pipeline.events import StepDone, emit
from pipeline.stage import flow
from stages.data import (
    DataError,
    demonstrations_from_solutions,
    demonstrations_of,
    measure_discrimination,
    questions_of,
    read_questions,
    read_solutions,
    shortcut_scores,
    solution_outputs,
    take_solutions,
)
from stages.join import KEY, align, key_at
from stages.models import Checkpoint
from stages.reward import score
from stages.reward_model import measure_reward_model, score_outputs
from stages.reward_training import RewardModelConfig, create_reward_model, label_outputs, train_reward_model
from stages.sft import create_policy, supervised_finetuning
from stages.tables import Demonstrations, RewardGauges, Rewards, Rollouts, Solutions

_AGREEING: Final = {(True, "ok"), (False, "wrong"), (False, "unparseable"), (False, "truncated")}
"""Label of a file and status by the rules that say the same."""
_SHOWN: Final = 3
"""Rows that a message names."""


@dataclass(frozen=True)
class Gauge:
    """A figure with the bounds of its 95 % interval; None where undefined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass
class Study:
    """The results of a study, by part: `learned`, the rows that model and baselines learn from, and `measured`, the others."""

    rows: dict[str, int]
    """Part -> solutions."""
    questions: dict[str, int]
    """Part -> questions."""
    right: dict[str, float]
    """Part -> share of right solutions."""
    left_out: dict[str, int]
    """Part -> solutions beyond `max_tokens`, in none of these counts."""
    disagreement: float | None
    """Share of the solutions whose own label the rules contradict; None: the file has no labels."""
    shortcuts: dict[str, dict[str, Gauge]]
    """Baseline -> its gauges."""
    models: dict[int, dict[str, Gauge]] = field(default_factory=dict)
    """Seed -> gauges of its model, on rows it has not learned from."""
    training: dict[int, dict[str, float]] = field(default_factory=dict)
    """Seed -> metrics of the training."""
    trained: dict[int, Checkpoint] = field(default_factory=dict)
    """Seed -> its model."""


@dataclass(frozen=True)
class _Side:
    """Solutions, the same rows as outputs, and the rules' verdicts."""

    solutions: Solutions
    outputs: Rollouts
    rules: Rewards

    @property
    def parts(self) -> tuple[Solutions, Rollouts, Rewards]:
        return self.solutions, self.outputs, self.rules


@flow
def reward_model_study(config: RewardModelStudyConfig) -> Study:
    """Train reward models and baselines as `config` says; return how both do on the other questions.

    Raise DataError where the rules contradict more of the file's labels than `max_disagreement`.
    """
    source = below(config.path, config.solutions.source)
    solutions = read_solutions(config.solutions.model_copy(update={"source": source}))
    tuning = config.judged_on == "validation"
    start = config.held_out_share if tuning else 0.0
    border = config.held_out_share + (config.validation_share if tuning else 0.0)
    learned = take_solutions(solutions, start=border, stop=1.0)
    trunk = _trunk(config, learned)
    train = _side(config, trunk, learned)
    other = _side(config, trunk, take_solutions(solutions, start=start, stop=border))
    share = _disagreement(config, [train, other])
    shortcuts = {name: shortcut_scores(train.parts, other.parts, each) for name, each in config.shortcuts.items()}
    study = _begin(config, {"learned": train, "measured": other}, shortcuts, share)
    labels = label_outputs(train.outputs, train.rules, trunk)
    untrained = create_reward_model(trunk, RewardModelConfig(kind="outcome"))
    for seed in range(config.seed, config.seed + config.seeds):
        model = train_reward_model(untrained, labels, config.training, seed=seed)
        scores = score_outputs(other.outputs, trunk, [model], config.scoring, other.rules)
        gauges = measure_reward_model(scores, other.rules, other.outputs, config.scoring, config.gauges)
        found = _measure(config, scores, other, shortcuts)
        study.models[seed] = _gauges(gauges) | _gauges(found)
        study.training[seed], study.trained[seed] = dict(model.metrics), model
        emit(StepDone(seed - config.seed + 1, 0, calls_of({"gauges": gauges, "shortcuts": found})))
    return study


def _trunk(config: RewardModelStudyConfig, learned: Solutions) -> Checkpoint:
    """Return the model that gets a head, after supervised training where there is any; the measured rows are not used."""
    if isinstance(config.policy, PretrainedPolicy):
        base = pretrained_model(config.policy)
    else:
        base = create_policy(config.policy, _corpus(config, learned), config.prompt)
    if config.sft is None:
        return base
    return supervised_finetuning(base, _corpus(config, learned), config.prompt, config.sft)


def _corpus(config: RewardModelStudyConfig, learned: Solutions) -> Demonstrations:
    if config.demonstrations is None:
        return demonstrations_of(learned)
    questions = read_questions(below(config.path, config.demonstrations))
    return demonstrations_from_solutions(questions, config.answer_line)


def _side(config: RewardModelStudyConfig, trunk: Checkpoint, solutions: Solutions) -> _Side:
    outputs = solution_outputs(trunk, solutions, config.prompt, max_tokens=config.max_tokens)
    return _Side(solutions, outputs, score(outputs, questions_of(solutions), config.reward))


def _disagreement(config: RewardModelStudyConfig, sides: Sequence[_Side]) -> float | None:
    """Return the share of the labelled solutions whose label is not the rules' verdict; rows without a verdict are left out."""
    labelled, found = 0, []
    for side in sides:
        written = side.solutions.read([*KEY, "label"])
        rules = side.rules.read([*KEY, "status"])
        verdicts = align(written, rules, "verdicts", to="solutions", extra=True, missing=True)
        pairs = zip(written["label"].to_pylist(), verdicts["status"].to_pylist(), strict=True)
        for row, (label, status) in enumerate(pairs):
            if label is None or status is None:
                continue
            labelled += 1
            if (label, status) not in _AGREEING:
                said = "right" if label else "wrong"
                found.append(f"{key_at(written, row)}: the file says {said}, the rules {status}")
    if found:
        text = f"the rules contradict {len(found)} of {labelled} labels of the file, {'; '.join(found[:_SHOWN])}"
        if len(found) > config.max_disagreement * labelled:
            raise DataError(
                f"{text}: correct the columns or the rules (solutions, reward), or allow for it (max_disagreement, "
                f"{config.max_disagreement:g} of all)"
            )
        warnings.warn(f"{text}; the rules' verdict counts", stacklevel=2)
    return len(found) / labelled if labelled else None


def _begin(
    config: RewardModelStudyConfig, sides: Mapping[str, _Side], shortcuts: Mapping[str, Rewards], share: float | None
) -> Study:
    """Return the study before any model: counts and baselines."""
    rules = {name: side.rules.rows() for name, side in sides.items()}
    return Study(
        rows={name: len(rows) for name, rows in rules.items()},
        questions={name: len({row["question_id"] for row in rows}) for name, rows in rules.items()},
        right={name: sum(row["status"] == "ok" for row in rows) / len(rows) for name, rows in rules.items()},
        left_out={name: int(side.outputs.metrics["data/left_out"]) for name, side in sides.items()},
        disagreement=share,
        shortcuts={name: _gauges(_measure(config, each, sides["measured"], {})) for name, each in shortcuts.items()},
    )


def _measure(
    config: RewardModelStudyConfig, scores: Rewards, side: _Side, baselines: dict[str, Rewards]
) -> RewardGauges:
    gauges = config.gauges
    return measure_discrimination(
        scores, side.rules, side.solutions, baselines, resamples=gauges.resamples, seed=gauges.seed
    )


def _gauges(table: RewardGauges) -> dict[str, Gauge]:
    return {row["gauge"]: Gauge(row["value"], row["low"], row["high"]) for row in table.rows()}
