"""The reward stage: outputs and questions in, one reward row per output out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pipeline.stage import record_metrics, stage
from stages.reward.composition import Part, compose
from stages.reward.config import AccuracyConfig, OverlongConfig, RewardConfig
from stages.reward.judge import Judged, Output, judge
from stages.reward.rules.accuracy import GoldError, read_gold
from stages.tables import Questions, Rewards, Rollouts

__all__ = ["STATUSES", "score"]

STATUSES: Final = ("ok", "wrong", "unparseable", "truncated", "timeout", "error")


@stage(version="3")
def score(outputs: Rollouts, questions: Questions, config: RewardConfig) -> Rewards:
    """Score every output o_i of every question by rules and functions, as a whole and, with a component `steps`, line by line.

    The status is that of the first component that reads the answer, else of the first; one that only scores says `ok` above 0.

    Metrics: `reward/mean`, `reward/<component>` (means over rows that have a score; of `steps` over all steps),
    `reward/status_<status>`, `reward/screened`, `reward/missing` (shares of all rows), `reward/faults` (components that timed
    out or failed, per row).

    Raises:
        ConfigError: a reward function that is not there or cannot be called.
        ValueError: a rollout of a question that `questions` does not have, a repeated row, a score that is not finite.
        GoldError: a question without an answer, by its id.
        DataError: step rewards of a question that is not of the built-in world.
    """
    rows = _read(outputs, questions)
    columns = {component.name: judge(rows, component, config) for component in config.components}
    rewards = [_reward({name: column[i] for name, column in columns.items()}, config) for i in range(len(rows))]
    shown = columns[_shown(config)]
    statuses = [judged.status or ("ok" if judged.score else "wrong") for judged in shown]
    # At most one component cuts outputs into steps.
    steps = [next((column[i].steps for column in columns.values() if column[i].steps), None) for i in range(len(rows))]
    record_metrics(_metrics(rewards, statuses, columns))
    return Rewards.write(
        {
            "question_id": [row.question_id for row in rows],
            "sample": [row.sample for row in rows],
            "reward": rewards,
            "status": statuses,
            "extracted": [judged.extracted for judged in shown],
            "components": [[(name, column[i].score) for name, column in columns.items()] for i in range(len(rows))],
            "step_rewards": [each and each.rewards for each in steps],
            "step_ends": [each and each.ends for each in steps],
            "scorer": [None] * len(rows),
        }
    )


def _read(outputs: Rollouts, questions: Questions) -> list[Output]:
    table = outputs.read()
    rows = table.select(["question_id", "sample", "finish_reason", "text", "text_ends", "output_ids"]).to_pylist()
    asked = _questions_of([(row["question_id"], row["sample"]) for row in rows], questions)
    for row in rows:
        if len(row["text_ends"]) != len(row["output_ids"]):
            raise ValueError(
                f"rollout ({row['question_id']!r}, {row['sample']}): expected one of text_ends for each of "
                f"{len(row['output_ids'])} tokens, found {len(row['text_ends'])}"
            )
    return [
        Output(
            question_id=row["question_id"],
            sample=row["sample"],
            question=asked[row["question_id"]]["question"],
            gold=asked[row["question_id"]]["answer"],
            solution=asked[row["question_id"]]["solution"],
            text=row["text"],
            output_ids=row["output_ids"],
            text_ends=row["text_ends"],
            finish_reason=row["finish_reason"],
        )
        for row in rows
    ]


def _questions_of(keys: Sequence[tuple[str, int]], questions: Questions) -> Mapping[str, Mapping[str, Any]]:
    """Rows of `questions` by id; those that have outputs have a gold answer."""
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise ValueError(f"rollouts hold {twice[0]} more than once; a row is one (question_id, sample)")
    table = questions.read().select(["question_id", "question", "answer", "solution"])
    asked = {row["question_id"]: row for row in table.to_pylist()}
    if len(asked) < table.num_rows:
        raise ValueError("questions hold a question_id more than once")
    wanted = list(dict.fromkeys(question_id for question_id, _ in keys))
    unknown = [question_id for question_id in wanted if question_id not in asked]
    if unknown:
        raise ValueError(
            f"rollouts of {len(unknown)} questions that are not in the table, first {unknown[0]!r}; "
            "score with the questions that were sampled"
        )
    for question_id in wanted:
        try:
            read_gold(asked[question_id]["answer"])
        except GoldError as error:
            raise GoldError(f"question {question_id!r}: {error}") from None
    return asked


def _shown(config: RewardConfig) -> str:
    """Name of the component whose status is the row's."""
    reading = [component for component in config.components if not isinstance(component, OverlongConfig)]
    return next((c.name for c in reading if isinstance(c, AccuracyConfig)), reading[0].name)


def _reward(judged: Mapping[str, Judged], config: RewardConfig) -> float | None:
    if all(part.status == "truncated" and part.score is None for part in judged.values()):
        return None  # whatever the components declare: the row was taken out as a whole
    return compose([Part(judged[c.name].score, c.weight, c.missing) for c in config.components])


def _metrics(
    rewards: Sequence[float | None], statuses: Sequence[str], columns: Mapping[str, Sequence[Judged]]
) -> dict[str, float]:
    rows = max(len(rewards), 1)
    means = {"reward/mean": list(rewards)} | {f"reward/{name}": _values(column) for name, column in columns.items()}
    metrics: dict[str, float] = {}
    for name, values in means.items():
        known = [value for value in values if value is not None]
        if known:  # no number is better than NaN: a chart shows the gap
            metrics[name] = math.fsum(known) / len(known)
    counts = Counter(statuses)
    metrics |= {f"reward/status_{status}": counts[status] / rows for status in STATUSES}
    metrics["reward/missing"] = sum(value is None for value in rewards) / rows
    metrics["reward/screened"] = sum(judged.screened for column in columns.values() for judged in column) / rows
    faults = [judged for column in columns.values() for judged in column if judged.status in ("timeout", "error")]
    metrics["reward/faults"] = len(faults) / rows
    return metrics


def _values(column: Sequence[Judged]) -> list[float | None]:
    """What a component's mean is of: its step rewards where it has them, else its scores."""
    if any(judged.steps for judged in column):
        return [reward for judged in column if judged.steps for reward in judged.steps.rewards]
    return [judged.score for judged in column]
