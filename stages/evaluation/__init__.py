"""Evaluation: how often a policy is right, once, at least once in K (Pass@K), and by majority of K (Maj@K)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from pipeline.config import Config
from pipeline.stage import record_metrics, stage
from stages.tables import Evaluation, Rewards, Rollouts

__all__ = ["EvaluationConfig", "evaluate"]


class EvaluationConfig(Config):
    """What is estimated from the samples of an evaluation."""

    ks: tuple[int, ...] = (1,)
    """The K of Pass@K and Maj@K; none may exceed the samples per question. The paper's Figure 7 has 1 to 64."""
    bootstrap_resamples: int = Field(1000, ge=100)
    """Resamples of the questions for the 95 % interval of accuracy; 1000 settle its bounds to about 0.1 standard errors."""
    seed: int = 0
    """Seed of the resampling; it decides the third digit of the interval's bounds."""


@dataclass
class _Samples:
    """All samples of one question."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    """How many samples gave each distinct wrong answer."""

    @property
    def n(self) -> int:
        return self.statuses.total()

    @property
    def correct(self) -> int:
        return self.statuses["ok"]


@stage(version="1")
def evaluate(outputs: Rollouts, rewards: Rewards, config: EvaluationConfig) -> Evaluation:
    """Accuracy with its interval, Pass@K and Maj@K of the sampled outputs.

    An output is right when its status is `ok`. Right outputs vote for one answer however they spell it, wrong ones for
    their extracted answer, the rest (unparseable, truncated, no verdict) do not vote. With one greedy output per
    question `accuracy` is greedy accuracy; with several it is mean@k.

    Metrics: `accuracy`, `accuracy_ci_low`, `accuracy_ci_high`, `pass_at_<k>`, `maj_at_<k>`, `truncated_rate` (by finish
    reason), `unparseable_rate`, `no_verdict_rate`, `length_mean` (tokens).

    Raises:
        ValueError: no outputs, rows that do not match, a K above the samples of a question.
    """
    from stages.kernels.voting import bootstrap_interval, maj_at_k, pass_at_k

    rows = _joined(outputs, rewards)
    questions = _by_question(rows)
    _check_ks(questions, config.ks)
    accuracy = bootstrap_interval(
        [samples.correct / samples.n for samples in questions.values()],
        resamples=config.bootstrap_resamples,
        seed=config.seed,
    )
    metrics = {"accuracy": accuracy.estimate, "accuracy_ci_low": accuracy.low, "accuracy_ci_high": accuracy.high}
    for k in config.ks:
        metrics[f"pass_at_{k}"] = _mean([pass_at_k(s.n, s.correct, k) for s in questions.values()])
        votes = [maj_at_k(s.n, s.correct, list(s.wrong.values()), k) for s in questions.values()]
        metrics[f"maj_at_{k}"] = _mean(votes)
    metrics["truncated_rate"] = _mean([row["finish_reason"] == "length" for row in rows])
    metrics["unparseable_rate"] = _mean([row["status"] == "unparseable" for row in rows])
    metrics["no_verdict_rate"] = _mean([row["status"] in ("timeout", "error") for row in rows])
    metrics["length_mean"] = _mean([row["length"] for row in rows])
    record_metrics(metrics)
    return Evaluation.write(
        {
            "question_id": list(questions),
            "samples": [samples.n for samples in questions.values()],
            "correct": [samples.correct for samples in questions.values()],
            # A tie is not a majority.
            "majority_correct": [s.correct > max(s.wrong.values(), default=0) for s in questions.values()],
            "status_counts": [sorted(samples.statuses.items()) for samples in questions.values()],
        }
    )


def _joined(outputs: Rollouts, rewards: Rewards) -> list[dict[str, Any]]:
    """One row per output, in the order of `outputs`, with what its reward row says."""
    import pyarrow.compute as pc

    table = outputs.read().select(["question_id", "sample", "finish_reason", "output_ids"])
    lengths = pc.list_value_length(table["output_ids"]).to_pylist()
    rows: list[dict[str, Any]] = table.drop_columns(["output_ids"]).to_pylist()
    verdicts = rewards.read().select(["question_id", "sample", "status", "extracted"]).to_pylist()
    by_key = {(verdict["question_id"], verdict["sample"]): verdict for verdict in verdicts}
    if not rows:
        raise ValueError("there are no outputs to evaluate")
    keys = {(row["question_id"], row["sample"]) for row in rows}
    if len(keys) < len(rows) or keys != by_key.keys() or len(by_key) < len(verdicts):
        example = min(keys ^ by_key.keys(), default="a key that stands twice")
        raise ValueError(f"outputs and rewards are not of the same rows, for example {example}")
    return [
        row | by_key[row["question_id"], row["sample"]] | {"length": length}
        for row, length in zip(rows, lengths, strict=True)
    ]


def _by_question(rows: list[dict[str, Any]]) -> dict[str, _Samples]:
    questions: dict[str, _Samples] = {}
    for row in rows:
        samples = questions.setdefault(row["question_id"], _Samples())
        samples.statuses[row["status"]] += 1
        if row["status"] == "wrong":
            samples.wrong[row["extracted"] or ""] += 1
    return questions


def _check_ks(questions: dict[str, _Samples], ks: tuple[int, ...]) -> None:
    question_id, fewest = min(questions.items(), key=lambda item: item[1].n)
    too_large = [k for k in ks if not 1 <= k <= fewest.n]
    if too_large:
        raise ValueError(
            f"k = {too_large[0]} of Pass@K and Maj@K needs at least that many samples of every question, but "
            f"{question_id!r} has {fewest.n}: sample more outputs or lower `ks`"
        )


def _mean(values: list[Any]) -> float:
    return math.fsum(values) / len(values)
