"""How well scores tell right solutions from wrong ones: over all rows, within a question, within an author, beside baselines.

Authors are right more or less often. A score that knows no more than who wrote a solution already orders rows of different
authors; within an author it can not.

Legend: N rows, Q questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final

from pipeline.stage import record_metrics, stage
from stages.tables import RewardGauges, Rewards, Solutions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Places = NDArray[np.int64]
    Statistic = Callable[[Places, Places], float | None]

__all__ = ["measure_discrimination"]

_JUDGED: Final = ("ok", "wrong", "unparseable", "truncated")
"""Statuses that are a verdict on the output, as in the gauges of reward models."""
_TAIL: Final = 0.025


@stage(version="1")
def measure_discrimination(
    scores: Rewards, rules: Rewards, solutions: Solutions, baselines: dict[str, Rewards], *, resamples: int, seed: int
) -> RewardGauges:
    """Gauges with 95 % percentile bootstrap intervals over questions; undefined ones are null.

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
        ValueError: by row: a score without a verdict, a solution or a baseline's score.
    """
    data = _join(scores, rules, solutions, baselines)
    measured = _intervals(data, _statistics(data), resamples=resamples, seed=seed)
    metrics: dict[str, float | None] = {}
    for gauge, row in measured.items():
        metrics |= {f"rm/{gauge}{end}": row[name] for end, name in _BOUNDS.items() if row[name] is not None}
    record_metrics(metrics)
    return RewardGauges.write([{"gauge": gauge, **row} for gauge, row in measured.items()])


_BOUNDS: Final = {"": "value", "_low": "low", "_high": "high"}


@dataclass(frozen=True)
class _Data:
    """Rows with a verdict, N of them."""

    score_N: Floats
    right_N: NDArray[np.bool_]
    question_N: Places
    """Number of each row's question, 0 .. Q-1."""
    author_N: list[str | None]
    baselines: dict[str, Floats]


def _join(scores: Rewards, rules: Rewards, solutions: Solutions, baselines: Mapping[str, Rewards]) -> _Data:
    import numpy as np

    known = {"verdict": rules, "solution": solutions, **{f"score of {name}": each for name, each in baselines.items()}}
    tables = {what: {(row["question_id"], row["sample"]): row for row in table.rows()} for what, table in known.items()}
    rows: list[tuple[Mapping[str, Any], dict[str, Mapping[str, Any]]]] = []
    for scored in scores.rows():
        key = (scored["question_id"], scored["sample"])
        absent = next((what for what, table in tables.items() if key not in table), None)
        if absent:
            raise ValueError(f"score of {key} has no {absent}; join equal solutions")
        beside: dict[str, Mapping[str, Any]] = {what: table[key] for what, table in tables.items()}
        if beside["verdict"]["status"] in _JUDGED and beside["verdict"]["reward"] is not None:
            rows.append((scored, beside))
    _, question_N = np.unique([scored["question_id"] for scored, _ in rows], return_inverse=True)
    return _Data(
        score_N=np.array([scored["reward"] for scored, _ in rows], dtype=np.float64),
        right_N=np.array([beside["verdict"]["status"] == "ok" for _, beside in rows], dtype=bool),
        question_N=question_N,
        author_N=[beside["solution"]["author"] for _, beside in rows],
        baselines={
            name: np.array([beside[f"score of {name}"]["reward"] for _, beside in rows], dtype=np.float64)
            for name in baselines
        },
    )


def _statistics(data: _Data) -> dict[str, tuple[Statistic, int]]:
    """Each gauge as a function of the rows drawn and of how often each question was, and the rows that it looks at."""
    import numpy as np

    count = len(data.score_N)
    authors = sorted({name for name in data.author_N if name is not None})
    member = {name: np.array([author == name for author in data.author_N], dtype=bool) for name in authors}
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
    from stages.kernels.gauges import auc

    return lambda rows, times_Q: auc(score_N[rows], data.right_N[rows])


def _within(score_N: Floats, data: _Data, member: Mapping[str, NDArray[np.bool_]]) -> Statistic:
    """Mean over authors; one whose rows are all right, or none, does not count."""
    from stages.kernels.gauges import auc

    def statistic(rows: Places, times_Q: Places) -> float | None:
        own = [rows[mask[rows]] for mask in member.values()]
        defined = [value for part in own if (value := auc(score_N[part], data.right_N[part])) is not None]
        return fmean(defined) if defined else None

    return statistic


def _pair_accuracy(data: _Data) -> Statistic:
    """From each question's own pairs, which a resample only counts more or less often."""
    import numpy as np

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
    import numpy as np

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
