"""How well scores tell right solutions from wrong ones, and the shortcuts that a reward model is compared with.

Authors are right more or less often. A score that knows no more than who wrote a solution already orders rows of different
authors; within an author it cannot.

A shortcut is a logistic regression on a few declared features of a solution's surface, fitted on the rows a reward model learns
from and on nothing else (Geirhos et al. 2020, "Shortcut learning in deep neural networks"). It scores each row, so that reward
model and shortcut are measured by the same gauges on the same rows.

Legend: N rows, F features, Q questions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.stage import record_metrics, stage
from stages.join import KEY, Ragged, align
from stages.reward_metrics import gauge_metrics
from stages.tables import RewardGauges, Rewards, Rollouts, Solutions, has_verdict

if TYPE_CHECKING:
    import pyarrow as pa

Floats = NDArray[np.float64]
Places = NDArray[np.int64]
Statistic = Callable[[Places, Places], float | None]
"""A gauge of the rows drawn, and of how often each question was."""

Feature = Literal[
    "tokens", "lines", "equations", "answered", "whole_answer", "answer_digits", "question_tokens", "author"
]
"""Tokens of the solution; its lines with text; its `=` signs; whether the rules found an answer, whether it is an integer, how
many digits it has; tokens of the question with its prompt; who wrote it (a weight for each author)."""
_RIDGE: Final = 1.0
"""Weight of the squared coefficients of standardised features, in rows: keeps those of separable data finite."""
_ROUNDS: Final = 50
_SETTLED: Final = 1e-10
_TAIL: Final = 0.025


@stage(version="1")
def measure_discrimination(
    scores: Rewards, rules: Rewards, solutions: Solutions, baselines: dict[str, Rewards], *, resamples: int, seed: int
) -> RewardGauges:
    """Measure gauges with 95 % percentile bootstrap intervals over questions; undefined ones are null.

    Every resample draws whole questions, one and the same draw for every gauge and for the baselines, so that the interval of
    a difference is that of paired differences.

    - `auc`: a right row above a wrong one, over all rows; `pair_accuracy`: of the pairs within a question
    - `auc_within_authors`: mean over the authors of the AUC among their own rows; `auc_of/<author>`: each
    - `auc_gain/<baseline>`, `auc_within_authors_gain/<baseline>`: the difference to that baseline's on these rows

    Each is a metric `rm/<gauge>` too, its interval `rm/<gauge>_low` and `_high`.

    Args:
        scores: of the solutions.
        rules: verdicts on the same; right is status `ok`, rows without a verdict do not count.
        solutions: the same; their authors.
        baselines: other scores of the same solutions, by name.
        resamples: how many.
        seed: draws them.

    Raises:
        JoinError: a score without a verdict, a solution or a baseline's score.
    """
    data = _with_verdict(scores, rules, solutions, baselines)
    measured = _intervals(data, _statistics(data), resamples=resamples, seed=seed)
    record_metrics(gauge_metrics(measured))
    return RewardGauges.write([{"gauge": gauge, **row} for gauge, row in measured.items()])


@dataclass(frozen=True)
class _Data:
    """Rows with a verdict, N of them."""

    score_N: Floats
    right_N: NDArray[np.bool_]
    question_N: Places
    """Number of each row's question, 0 .. Q-1."""
    author_N: NDArray[np.object_]
    """Names, or None."""
    baselines: dict[str, Floats]


def _with_verdict(scores: Rewards, rules: Rewards, solutions: Solutions, baselines: Mapping[str, Rewards]) -> _Data:
    import pyarrow.compute as pc

    score = scores.read([*KEY, "reward"])

    def joined(table: Rewards | Solutions, columns: Sequence[str], of: str) -> pa.Table:
        return align(score, table.read([*KEY, *columns]), of, to="scores", extra=True)

    verdict = joined(rules, ["reward", "status"], "verdicts")
    author = joined(solutions, ["author"], "solutions")["author"]
    others = {name: joined(table, ["reward"], f"scores of {name}")["reward"] for name, table in baselines.items()}
    kept = has_verdict(verdict)
    question_id = np.array(score["question_id"].filter(kept).to_pylist(), dtype=str)
    return _Data(
        score_N=score["reward"].filter(kept).to_numpy(),
        right_N=pc.equal(verdict["status"].filter(kept), "ok").to_numpy(),
        question_N=np.unique(question_id, return_inverse=True)[1],
        author_N=author.filter(kept).to_numpy(),
        baselines={name: other.filter(kept).to_numpy() for name, other in others.items()},
    )


def _statistics(data: _Data) -> dict[str, tuple[Statistic, int]]:
    """Return each gauge as a function of the rows drawn and of how often each question was, and the rows that it looks at."""
    count = len(data.score_N)
    authors = sorted(set(data.author_N.tolist()) - {None})
    member = {name: data.author_N == name for name in authors}
    found: dict[str, tuple[Statistic, int]] = {
        "auc": (_auc_of(data.score_N, data), count),
        "pair_accuracy": (_pair_accuracy(data), count),
    }
    if authors:
        found["auc_within_authors"] = (_within(data.score_N, data, member), count)
    for name in authors:
        found[f"auc_of/{name}"] = (_within(data.score_N, data, {name: member[name]}), int(member[name].sum()))
    for name, other in data.baselines.items():
        found[f"auc_gain/{name}"] = (_difference(_auc_of(data.score_N, data), _auc_of(other, data)), count)
        if authors:
            pair = (_within(each, data, member) for each in (data.score_N, other))
            found[f"auc_within_authors_gain/{name}"] = (_difference(*pair), count)
    return found


def _auc_of(score_N: Floats, data: _Data) -> Statistic:
    from stages.kernels.estimators import auc

    return lambda rows, times_Q: auc(score_N[rows], data.right_N[rows])


def _within(score_N: Floats, data: _Data, member: Mapping[str, NDArray[np.bool_]]) -> Statistic:
    """Return the mean over authors; one whose rows are all right, or none, does not count."""
    from stages.kernels.estimators import auc

    def statistic(rows: Places, times_Q: Places) -> float | None:
        own = [rows[mask[rows]] for mask in member.values()]
        defined = [value for part in own if (value := auc(score_N[part], data.right_N[part])) is not None]
        return fmean(defined) if defined else None

    return statistic


def _pair_accuracy(data: _Data) -> Statistic:
    """Count each question's own pairs, which a resample only counts more or less often."""
    questions = int(data.question_N.max(initial=-1)) + 1
    ordered_Q, pairs_Q = np.zeros(questions), np.zeros(questions)
    for question in range(questions):
        rows = data.question_N == question
        score, right = data.score_N[rows], data.right_N[rows]
        gap = score[right][:, None] - score[~right][None, :]
        ordered_Q[question], pairs_Q[question] = (gap > 0).sum() + (gap == 0).sum() / 2, gap.size

    def statistic(rows: Places, times_Q: Places) -> float | None:
        pairs = float(times_Q @ pairs_Q)
        return float(times_Q @ ordered_Q) / pairs if pairs else None

    return statistic


def _difference(one: Statistic, other: Statistic) -> Statistic:
    def statistic(rows: Places, times_Q: Places) -> float | None:
        first, second = one(rows, times_Q), other(rows, times_Q)
        return None if first is None or second is None else first - second

    return statistic


def _intervals(
    data: _Data, statistics: Mapping[str, tuple[Statistic, int]], *, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    questions, every = int(data.question_N.max(initial=-1)) + 1, np.arange(len(data.score_N))
    whole = {name: each(every, np.ones(questions, dtype=np.int64)) for name, (each, _) in statistics.items()}
    drawn: dict[str, list[float]] = {name: [] for name in statistics}
    rng = np.random.default_rng(seed)
    for _ in range(resamples if questions else 0):
        times_Q = np.bincount(rng.integers(0, questions, questions), minlength=questions)
        rows = np.repeat(every, times_Q[data.question_N])
        for name, (each, _) in statistics.items():
            value = each(rows, times_Q)
            drawn[name] += [] if value is None else [value]
    measured = {}
    for name, value in whole.items():
        low, high = np.quantile(drawn[name], [_TAIL, 1 - _TAIL]).tolist() if drawn[name] else (None, None)
        bounds = {"low": low, "high": high} if value is not None else {"low": None, "high": None}
        measured[name] = {"value": value, **bounds, "rows": statistics[name][1]}
    return measured


# ------------------------------------------------------------------------------------------------ shortcuts


@stage(version="1")
def shortcut_scores(
    learned: tuple[Solutions, Rollouts, Rewards],
    asked: tuple[Solutions, Rollouts, Rewards],
    features: tuple[Feature, ...],
) -> Rewards:
    """Score every output of `asked` with the log-odds of a logistic regression on `features`, fitted on `learned`.

    min_w  sum_n log(1 + exp(-y_n (w . x_n + b))) + (1/2) |w|^2,   y = +1 right, -1 not, x standardised on `learned`

    The direction of every feature is learned with its weight, so that a shortcut may do worse than chance on `asked`.

    Args:
        learned: solutions, as outputs (solutions that are no output do not count), and the rules' verdicts on these.
        asked: the same of the outputs to be scored; their verdicts give status and extracted answer and are not learned from.

    Metrics: `shortcut/<feature>`, the weights; of `author` one for each, `shortcut/author/<name>`.

    Raises:
        ValueError: no row of `learned` has a verdict, or all have the same one.
        JoinError: an output without a solution or a verdict.
    """
    rows, targets = _joined(*learned), _joined(*asked)
    rows = rows.filter(rows["reward"].is_valid())
    right_N = np.array([status == "ok" for status in rows["status"].to_pylist()], dtype=bool)
    if not len(right_N) or right_N.all() or not right_N.any():
        raise ValueError(
            f"a shortcut is fitted on right and on wrong solutions; found {right_N.sum()} right of {len(right_N)}"
        )
    columns = _columns(rows, features)
    x_NF, y_NF = (np.array([read(part) for read in columns.values()], np.float64).T.copy() for part in (rows, targets))
    mean_F, scale_F = x_NF.mean(axis=0), x_NF.std(axis=0)
    scale_F[scale_F == 0] = 1.0  # a feature that never varies has no weight
    weight_F, bias = _fit((x_NF - mean_F) / scale_F, right_N)
    score_N = ((y_NF - mean_F) / scale_F) @ weight_F + bias
    record_metrics({f"shortcut/{name}": float(weight) for name, weight in zip(columns, weight_F, strict=True)})
    scores, verdicts = score_N.tolist(), targets["reward"].to_pylist()
    components = [[("model", one), ("rule", verdict)] for one, verdict in zip(scores, verdicts, strict=True)]
    absent = [None] * len(scores)
    kept = {name: targets[name] for name in ("question_id", "sample", "status", "extracted")}
    scorer = [f"shortcut:{'+'.join(features)}"] * len(scores)
    made = {"reward": scores, "components": components, "step_rewards": absent, "step_ends": absent, "scorer": scorer}
    return Rewards.write({**kept, **made})


def _joined(solutions: Solutions, outputs: Rollouts, rules: Rewards) -> pa.Table:
    """Return what is known of each output, in their order."""
    table = outputs.read([*KEY, "output_ids", "prompt_ids"])
    for found, name, columns in (
        (solutions, "solutions", ["solution", "author"]),
        (rules, "verdicts", ["reward", "status", "extracted"]),
    ):
        joined = align(table, found.read([*KEY, *columns]), name, extra=True)
        for column in columns:
            table = table.append_column(column, joined[column])
    return table


def _columns(rows: pa.Table, features: Sequence[Feature]) -> dict[str, Callable[[pa.Table], Sequence[float]]]:
    """Return name and reading of each column; `author` becomes one column per author of `rows`."""
    authors = sorted(set(rows["author"].to_pylist()) - {None})
    columns: dict[str, Callable[[pa.Table], Sequence[float]]] = {}
    for feature in features:
        if feature == "author":
            columns |= {f"author/{name}": functools.partial(_is_author, name=name) for name in authors}
        else:
            columns[feature] = functools.partial(_read, feature=feature)
    return columns


def _is_author(rows: pa.Table, *, name: str) -> list[float]:
    return [float(author == name) for author in rows["author"].to_pylist()]


def _read(rows: pa.Table, *, feature: Feature) -> list[float]:
    column, value_of = _READINGS[feature]
    if column.endswith("_ids"):
        return [float(length) for length in Ragged.of(rows[column]).lengths]
    return [float(value_of(value)) for value in rows[column].to_pylist()]


_READINGS: Final[dict[Feature, tuple[str, Callable[[Any], float]]]] = {
    "tokens": ("output_ids", len),
    "question_tokens": ("prompt_ids", len),
    "lines": ("solution", lambda text: sum(bool(line.strip()) for line in text.splitlines())),
    "equations": ("solution", lambda text: text.count("=")),
    "answered": ("extracted", lambda answer: answer is not None),
    "whole_answer": ("extracted", lambda answer: (answer or "").strip().lstrip("-").replace(",", "").isdigit()),
    "answer_digits": ("extracted", lambda answer: sum(letter.isdigit() for letter in answer or "")),
}


def _fit(x_NF: Floats, right_N: NDArray[np.bool_]) -> tuple[Floats, float]:
    """Fit weights and bias of the regression above by Newton's method; the bias is not drawn to zero."""
    design = np.hstack([x_NF, np.ones((len(x_NF), 1))])
    ridge = np.diag([_RIDGE] * x_NF.shape[1] + [1e-9])
    weight = np.zeros(design.shape[1])
    for _ in range(_ROUNDS):
        chance_N = (1 + np.tanh(design @ weight / 2)) / 2
        gradient = design.T @ (chance_N - right_N) + ridge @ weight
        step = np.linalg.solve((design.T * (chance_N * (1 - chance_N))) @ design + ridge, gradient)
        weight -= step
        if np.abs(step).max() < _SETTLED:
            break
    return weight[:-1], float(weight[-1])
