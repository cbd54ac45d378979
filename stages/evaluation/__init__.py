"""Evaluation: how often a policy is right, once, at least once in K (Pass@K), and by majority of K (Maj@K)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import Field

from pipeline.config import Config
from pipeline.stage import record_metrics, stage
from stages.tables import Evaluation, Rewards, Rollouts, Votes

__all__ = ["EvaluationConfig", "evaluate"]


class EvaluationConfig(Config):
    """What is estimated from the samples of an evaluation."""

    ks: tuple[int, ...] = (1,)
    """The K of Pass@K and Maj@K; none may exceed the samples per question. The paper's Figure 7 has 1 to 64."""
    bootstrap_resamples: int = Field(1000, ge=100)
    """Resamples of the questions for the 95 % intervals; 1000 settle their bounds to about 0.1 standard errors."""
    seed: int = 0
    """Seed of the resampling; it decides the third digit of the intervals' bounds."""


@stage(version="2")
def evaluate(outputs: Rollouts, rewards: Rewards, votes: Votes, config: EvaluationConfig) -> Evaluation:
    """Accuracy, Pass@K and Maj@K of the sampled outputs, each with its 95 % interval over questions.

    An output is right when its status is `ok`; right and wrong outputs vote as `votes` counted them, the rest (unparseable,
    truncated, no verdict) do not vote. With one greedy output per question `accuracy` is greedy accuracy; with several it is
    mean@k. Maj@K is left out where the votes of a question are not known: a mean over the other questions would be of
    another set.

    Metrics: `accuracy`, `pass_at_<k>`, `maj_at_<k>`, each with `<name>_ci_low` and `<name>_ci_high` (`share_interval` of
    `stages/kernels/voting.py`), `truncated_rate` (by finish reason), `unparseable_rate`, `no_verdict_rate`, `length_mean`
    (tokens).

    Raises:
        ValueError: no outputs, rows or votes that do not match, a K above the samples of a question.
    """
    rows = _joined(outputs, rewards)
    statuses: dict[str, Counter[str]] = {}
    for row in rows:
        statuses.setdefault(row["question_id"], Counter())[row["status"]] += 1
    questions = _with_votes(statuses, votes)
    _check_ks(questions, config.ks)
    record_metrics(
        _estimates(questions, config)
        | {
            "truncated_rate": _mean([row["finish_reason"] == "length" for row in rows]),
            "unparseable_rate": _mean([row["status"] == "unparseable" for row in rows]),
            "no_verdict_rate": _mean([row["status"] in ("timeout", "error") for row in rows]),
            "length_mean": _mean([row["length"] for row in rows]),
        }
    )
    return Evaluation.write(
        {
            "question_id": [question.question_id for question in questions],
            "samples": [question.samples for question in questions],
            "correct": [question.correct for question in questions],
            # A tie is not a majority.
            "majority_correct": [
                None if question.wrong is None else question.correct > max(question.wrong, default=0)
                for question in questions
            ],
            "status_counts": [sorted(statuses[question.question_id].items()) for question in questions],
        }
    )


class _Question(NamedTuple):
    """A row of `Votes`."""

    question_id: str
    samples: int
    correct: int
    wrong: list[int] | None


def _estimates(questions: Sequence[_Question], config: EvaluationConfig) -> dict[str, float]:
    """Accuracy, Pass@K and Maj@K with their bounds; without those that are undefined."""
    from stages.kernels.voting import maj_at_k, pass_at_k, share_interval

    shares: dict[str, list[float]] = {"accuracy": [one.correct / one.samples for one in questions]}
    voting = [(one.samples, one.correct, one.wrong) for one in questions if one.wrong is not None]
    for k in config.ks:
        shares[f"pass_at_{k}"] = [pass_at_k(one.samples, one.correct, k) for one in questions]
        if len(voting) == len(questions):
            shares[f"maj_at_{k}"] = [maj_at_k(*one, k) for one in voting]
    metrics: dict[str, float] = {}
    for name, values in shares.items():
        found = share_interval(values, resamples=config.bootstrap_resamples, seed=config.seed)
        metrics |= {name: found.estimate, f"{name}_ci_low": found.low, f"{name}_ci_high": found.high}
    return metrics


def _with_votes(statuses: Mapping[str, Counter[str]], votes: Votes) -> list[_Question]:
    """The votes of every question, in the order of the outputs."""
    found = {row["question_id"]: _Question(**row) for row in votes.rows()}
    expected = {name: (counts.total(), counts["ok"]) for name, counts in statuses.items()}
    counted = {name: (one.samples, one.correct) for name, one in found.items()}
    if expected != counted:
        example = next(name for name in [*expected, *counted] if expected.get(name) != counted.get(name))
        raise ValueError(
            f"votes are not of these rewards: question {example!r} has (samples, right) {expected.get(example)} in the "
            f"rewards and {counted.get(example)} in the votes; count the votes of the rewards that are evaluated"
        )
    return [found[name] for name in statuses]


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


def _check_ks(questions: Sequence[_Question], ks: tuple[int, ...]) -> None:
    fewest = min(questions, key=lambda one: one.samples)
    too_large = [k for k in ks if not 1 <= k <= fewest.samples]
    if too_large:
        raise ValueError(
            f"k = {too_large[0]} of Pass@K and Maj@K needs at least that many samples of every question, but "
            f"{fewest.question_id!r} has {fewest.samples}: sample more outputs or lower `ks`"
        )


def _mean(values: list[Any]) -> float:
    return math.fsum(values) / len(values)
