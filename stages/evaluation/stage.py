"""The evaluation stage: accuracy, Pass@K and Maj@K of sampled outputs.

Shapes: N outputs, Q questions, S statuses.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from pipeline.config import Config
from pipeline.stage import record_metrics, stage
from stages.join import KEY, Ragged, align, group_rows, written_lengths
from stages.kernels.estimators import maj_at_k, pass_at_k, share_interval
from stages.tables import Evaluation, Rewards, Rollouts, Votes


class EvaluationConfig(Config):
    """What is estimated from the samples of an evaluation."""

    ks: tuple[int, ...] = (1,)
    """The K of Pass@K and Maj@K; none may exceed the samples per question. The paper's Figure 7 has 1 to 64."""
    bootstrap_resamples: int = Field(1000, ge=100)
    """Resamples of the questions for the 95 % intervals; 1000 settle their bounds to about 0.1 standard errors."""
    seed: int = 0
    """Seed of the resampling; it decides the third digit of the intervals' bounds."""


@stage(version="3")
def evaluate(outputs: Rollouts, rewards: Rewards, votes: Votes, config: EvaluationConfig) -> Evaluation:
    """Estimate accuracy, Pass@K and Maj@K of the sampled outputs, each with its 95 % interval over questions.

    An output is right when its status is `ok`; right and wrong outputs vote as `votes` counted them, the rest (unparseable,
    truncated, no verdict) do not vote. With one greedy output per question `accuracy` is greedy accuracy; with several it is
    mean@k. Maj@K is left out where the votes of a question are not known: a mean over the other questions would be of
    another set.

    Metrics: `accuracy`, `pass_at_<k>`, `maj_at_<k>`, each with `<name>_ci_low` and `<name>_ci_high` (`share_interval` of
    `stages/kernels/estimators.py`), `truncated_rate` (by finish reason), `unparseable_rate`, `no_verdict_rate`, `length_mean`
    (tokens that the policy wrote).

    Raises:
        ValueError: no outputs, rows or votes that do not match, a K above the samples of a question.
    """
    import pyarrow.compute as pc

    table = outputs.read([*KEY, "finish_reason", "output_ids", "turns"])
    if not table.num_rows:
        raise ValueError("there are no outputs to evaluate")
    verdicts = align(table, rewards.read([*KEY, "status"]), "rewards")
    questions, question_N = group_rows(table["question_id"])
    statuses, status_N = group_rows(verdicts["status"])
    count_QS = np.zeros((len(questions), len(statuses)), dtype=np.int64)
    np.add.at(count_QS, (question_N, status_N), 1)
    counts = dict(zip(statuses, count_QS.sum(axis=0).tolist(), strict=True))
    voted = _votes_of(questions, count_QS.sum(axis=1), _right(statuses, count_QS), votes)
    _check_ks(voted, config.ks)
    record_metrics(
        _estimates(voted, config)
        | {
            "truncated_rate": pc.sum(pc.equal(table["finish_reason"], "length")).as_py() / table.num_rows,
            "unparseable_rate": counts.get("unparseable", 0) / table.num_rows,
            "no_verdict_rate": (counts.get("timeout", 0) + counts.get("error", 0)) / table.num_rows,
            "length_mean": int(written_lengths(table).sum()) / table.num_rows,
        }
    )
    wrong = Ragged.of(voted["wrong"])
    return Evaluation.write(
        {
            "question_id": questions,
            "samples": voted["samples"].to_pylist(),
            "correct": voted["correct"].to_pylist(),
            # A tie is not a majority.
            "majority_correct": [
                None if unknown else bool(correct > wrong_W.max(initial=0))
                for correct, wrong_W, unknown in zip(voted["correct"].to_pylist(), wrong, wrong.null, strict=True)
            ],
            "status_counts": [
                sorted((status, count) for status, count in zip(statuses, count_S, strict=True) if count)
                for count_S in count_QS.tolist()
            ],
        }
    )


def _right(statuses: list[str], count_QS: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many outputs of each question are right (Q)."""
    return count_QS[:, statuses.index("ok")] if "ok" in statuses else np.zeros(len(count_QS), dtype=np.int64)


def _votes_of(questions: list[str], sample_Q: NDArray[np.int64], right_Q: NDArray[np.int64], votes: Votes) -> pa.Table:
    """Return the votes of every question, in the order of the outputs.

    Raises:
        ValueError: votes that were not counted from these rewards; names the first question.
    """
    wanted = pa.table({"question_id": pa.array(questions, pa.string())})
    voted = align(wanted, votes.read(), "votes", to="questions", by=["question_id"])
    found_Q = np.stack([voted["samples"].to_numpy(), voted["correct"].to_numpy()], axis=1)
    expected_Q = np.stack([sample_Q, right_Q], axis=1)
    wrong = np.flatnonzero((found_Q != expected_Q).any(axis=1))
    if len(wrong):
        raise ValueError(
            f"votes are not of these rewards: question {questions[wrong[0]]!r} has (samples, right) "
            f"{tuple(expected_Q[wrong[0]].tolist())} in the rewards and {tuple(found_Q[wrong[0]].tolist())} in the votes; "
            "count the votes of the rewards that are evaluated"
        )
    return voted


def _estimates(voted: pa.Table, config: EvaluationConfig) -> dict[str, float]:
    """Return accuracy, Pass@K and Maj@K with their bounds; without those that are undefined."""
    samples, correct, wrong = (voted[name].to_pylist() for name in ("samples", "correct", "wrong"))
    shares: dict[str, list[float]] = {"accuracy": [c / n for n, c in zip(samples, correct, strict=True)]}
    for k in config.ks:
        shares[f"pass_at_{k}"] = [pass_at_k(n, c, k) for n, c in zip(samples, correct, strict=True)]
        if not voted["wrong"].null_count:
            shares[f"maj_at_{k}"] = [maj_at_k(n, c, w, k) for n, c, w in zip(samples, correct, wrong, strict=True)]
    metrics: dict[str, float] = {}
    for name, values in shares.items():
        found = share_interval(values, resamples=config.bootstrap_resamples, seed=config.seed)
        metrics |= {name: found.estimate, f"{name}_ci_low": found.low, f"{name}_ci_high": found.high}
    return metrics


def _check_ks(voted: pa.Table, ks: tuple[int, ...]) -> None:
    sample_Q = voted["samples"].to_numpy()
    question = int(sample_Q.argmin())
    fewest = int(sample_Q[question])
    too_large = [k for k in ks if not 1 <= k <= fewest]
    if too_large:
        raise ValueError(
            f"k = {too_large[0]} of Pass@K and Maj@K needs at least that many samples of every question, but "
            f"{voted['question_id'][question].as_py()!r} has {fewest}: sample more outputs or lower `ks`"
        )
