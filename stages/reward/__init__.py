"""Rewards (Algorithm 1, line 8): one row per output, with a status and the scores of its parts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, assert_never

from pipeline.residency import resident
from pipeline.stage import record_metrics, stage
from stages.reward.composition import Part, compose
from stages.reward.config import AccuracyConfig, FormatConfig, RewardConfig
from stages.reward.pool import KillablePool
from stages.reward.rules.accuracy import VERIFIER_MODULES, GoldError, grade_answers, read_gold
from stages.reward.rules.form import has_form
from stages.tables import Questions, Rewards, Rollouts

__all__ = ["STATUSES", "AccuracyConfig", "FormatConfig", "RewardConfig", "score"]

STATUSES: Final = ("ok", "wrong", "unparseable", "truncated", "timeout", "error")


@dataclass(frozen=True)
class _Output:
    """What a component sees of a row."""

    gold: str
    text: str


@dataclass(frozen=True)
class _Judged:
    """One component's result for one output; `status` and `extracted` only from components that read the answer."""

    score: float | None
    status: str | None = None
    extracted: str | None = None
    screened: bool = False


@stage(version="1")
def score(outputs: Rollouts, questions: Questions, config: RewardConfig) -> Rewards:
    """Score every output o_i of every question by rules.

    Metrics: `reward/mean`, `reward/<component>` (means over rows that have a score), `reward/status_<status>`,
    `reward/screened`, `reward/missing` (shares of all rows).

    Raises:
        ValueError: a rollout of a question that `questions` does not have, a repeated row.
        GoldError: a question without an answer, by its id.
    """
    table = outputs.read().select(["question_id", "sample", "finish_reason", "text"])
    keys = list(zip(table["question_id"].to_pylist(), table["sample"].to_pylist(), strict=True))
    golds = _gold_answers(questions, keys)
    truncated = [reason == "length" for reason in table["finish_reason"].to_pylist()]
    rows = [_Output(golds[key[0]], text) for key, text in zip(keys, table["text"].to_pylist(), strict=True)]
    # Rows whose score is settled by being truncated cost no verification.
    scored = [index for index, cut in enumerate(truncated) if not cut or config.truncated == "as_is"]
    columns = {
        component.name: _spread(_judge([rows[i] for i in scored], component, config), scored, len(rows), config)
        for component in config.components
    }
    rewards = [_reward({name: column[i] for name, column in columns.items()}, config) for i in range(len(rows))]
    answers = next((columns[c.name] for c in config.components if isinstance(c, AccuracyConfig)), None)
    shown = answers or next(iter(columns.values()))
    statuses = [judged.status or ("ok" if judged.score else "wrong") for judged in shown]
    record_metrics(_metrics(rewards, statuses, columns))
    return Rewards.write(
        {
            "question_id": [key[0] for key in keys],
            "sample": [key[1] for key in keys],
            "reward": rewards,
            "status": statuses,
            "extracted": [judged.extracted for judged in shown],
            "components": [[(name, column[i].score) for name, column in columns.items()] for i in range(len(rows))],
        }
    )


def _gold_answers(questions: Questions, keys: Sequence[tuple[str, int]]) -> dict[str, str]:
    """Gold answer by question id, for the questions that have outputs."""
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise ValueError(f"rollouts hold {twice[0]} more than once; a row is one (question_id, sample)")
    table = questions.read()
    answers = dict(zip(table["question_id"].to_pylist(), table["answer"].to_pylist(), strict=True))
    if len(answers) < table.num_rows:
        raise ValueError("questions hold a question_id more than once")
    wanted = list(dict.fromkeys(question_id for question_id, _ in keys))
    unknown = [question_id for question_id in wanted if question_id not in answers]
    if unknown:
        raise ValueError(
            f"rollouts of {len(unknown)} questions that are not in the table, first {unknown[0]!r}; "
            "score with the questions that were sampled"
        )
    for question_id in wanted:
        try:
            read_gold(answers[question_id])
        except GoldError as error:
            raise GoldError(f"question {question_id!r}: {error}") from None
    return answers


def _judge(rows: Sequence[_Output], component: AccuracyConfig | FormatConfig, config: RewardConfig) -> list[_Judged]:
    match component:
        case AccuracyConfig():
            grades = grade_answers(
                [(row.gold, row.text) for row in rows],
                conventions=component.conventions,
                verifier=component.verifier,
                pool=_verifier_pool(config),
                deadline_s=config.deadline_s,
            )
            return [_Judged(grade.score, grade.status, grade.extracted, grade.screened) for grade in grades]
        case FormatConfig():
            return [_Judged(float(has_form(row.text, component.form, component.pattern))) for row in rows]
        case _:
            assert_never(component)


def _verifier_pool(config: RewardConfig) -> KillablePool:
    def make() -> KillablePool:
        return KillablePool(workers=config.workers, memory_mb=config.memory_mb, preload=VERIFIER_MODULES)

    return resident("verifier", (config.workers, config.memory_mb), make)


def _spread(judged: Sequence[_Judged], places: Sequence[int], rows: int, config: RewardConfig) -> list[_Judged]:
    """The results in their rows, with the declared score of a truncated output in all others."""
    cut = _Judged(None if config.truncated == "no_reward" else 0.0, "truncated")
    column = [cut] * rows
    for place, result in zip(places, judged, strict=True):
        column[place] = result
    return column


def _reward(judged: dict[str, _Judged], config: RewardConfig) -> float | None:
    if all(part.status == "truncated" and part.score is None for part in judged.values()):
        return None  # whatever the components declare: the row was taken out as a whole
    return compose([Part(judged[c.name].score, c.weight, c.missing) for c in config.components])


def _metrics(
    rewards: Sequence[float | None], statuses: Sequence[str], columns: dict[str, list[_Judged]]
) -> dict[str, float]:
    rows = max(len(rewards), 1)
    means = {"reward/mean": list(rewards)} | {
        f"reward/{name}": [judged.score for judged in column] for name, column in columns.items()
    }
    metrics: dict[str, float] = {}
    for name, values in means.items():
        known = [value for value in values if value is not None]
        if known:  # no number is better than NaN: a chart shows the gap
            metrics[name] = math.fsum(known) / len(known)
    counts = Counter(statuses)
    metrics |= {f"reward/status_{status}": counts[status] / rows for status in STATUSES}
    metrics["reward/missing"] = sum(value is None for value in rewards) / rows
    metrics["reward/screened"] = sum(judged.screened for column in columns.values() for judged in column) / rows
    return metrics
