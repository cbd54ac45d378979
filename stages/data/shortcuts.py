"""What can be told of a solution's label without following its reasoning: the baselines of a reward model.

A shortcut is a logistic regression on a few declared features of a solution's surface, fitted on the rows a reward model learns
from and on nothing else. It gives a score to each row, so that reward model and shortcut are measured by the same gauges on the
same rows. The name is Geirhos et al.'s (2020, "Shortcut learning in deep neural networks").

Legend: N rows, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from pipeline.stage import record_metrics, stage
from stages.tables import Rewards, Rollouts, Solutions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

__all__ = ["Feature", "shortcut_scores"]

Feature = Literal[
    "tokens", "lines", "equations", "answered", "whole_answer", "answer_digits", "question_tokens", "author"
]
"""Tokens of the solution; its lines with text; its `=` signs; whether the rules found an answer, whether it is an integer, how
many digits it has; tokens of the question with its prompt; who wrote it (a weight for each author)."""
Row = Mapping[str, Any]

_RIDGE: Final = 1.0
"""Weight of the squared coefficients of standardised features, in rows: keeps those of separable data finite."""
_ROUNDS: Final = 50
_SETTLED: Final = 1e-10


@stage(version="1")
def shortcut_scores(
    learned: tuple[Solutions, Rollouts, Rewards],
    asked: tuple[Solutions, Rollouts, Rewards],
    features: tuple[Feature, ...],
) -> Rewards:
    """The log-odds of being right of every output of `asked`, by a logistic regression on `features` fitted on `learned`.

    min_w  sum_n log(1 + exp(-y_n (w . x_n + b))) + (1/2) |w|^2,   y = +1 right, -1 not, x standardised on `learned`

    The direction of every feature is learned with its weight, so that a shortcut may do worse than chance on `asked`.

    Args:
        learned: solutions, as outputs (solutions that are no output do not count), and the rules' verdicts on these.
        asked: the same of the outputs to be scored; their verdicts give status and extracted answer and are not learned from.

    Metrics: `shortcut/<feature>`, the weights; of `author` one for each, `shortcut/author/<name>`.

    Raises:
        ValueError: no row of `learned` has a verdict, or all have the same one.
    """
    import numpy as np

    rows, targets = _join(learned), _join(asked)
    judged = [row for row in rows if row["reward"] is not None]
    right_N = np.array([row["status"] == "ok" for row in judged], dtype=bool)
    if not judged or right_N.all() or not right_N.any():
        raise ValueError(
            f"a shortcut is fitted on right and on wrong solutions; found {right_N.sum()} right of {len(judged)}"
        )
    columns = _columns(judged, features)
    x_NF, y_NF = (
        np.array([[read(row) for read in columns.values()] for row in part], float) for part in (judged, targets)
    )
    mean_F, scale_F = x_NF.mean(axis=0), x_NF.std(axis=0)
    scale_F[scale_F == 0] = 1.0  # a feature that never varies has no weight
    weight_F, bias = _fit((x_NF - mean_F) / scale_F, right_N)
    scores = ((y_NF - mean_F) / scale_F) @ weight_F + bias
    record_metrics({f"shortcut/{name}": float(weight) for name, weight in zip(columns, weight_F, strict=True)})
    scorer = f"shortcut:{'+'.join(features)}"
    return Rewards.write([_reward(row, float(score), scorer) for row, score in zip(targets, scores, strict=True)])


def _join(part: tuple[Solutions, Rollouts, Rewards]) -> list[dict[str, Any]]:
    """What is known of each output, in their order."""
    solutions, outputs, rules = part
    written = {(row["question_id"], row["sample"]): row for row in solutions.rows()}
    verdicts = {(row["question_id"], row["sample"]): row for row in rules.rows()}
    columns = ["question_id", "sample", "output_ids", "prompt_ids"]
    rows = []
    for row in outputs.read().select(columns).to_pylist():
        key = (row["question_id"], row["sample"])
        if key not in written or key not in verdicts:
            raise ValueError(f"output {key} has no {'verdict' if key in written else 'solution'}; join equal solutions")
        lengths = {"tokens": len(row["output_ids"]), "question_tokens": len(row["prompt_ids"])}
        rows.append({**written[key], **lengths, **verdicts[key]})
    return rows


def _columns(rows: Sequence[Row], features: Sequence[Feature]) -> dict[str, Callable[[Row], float]]:
    """Name and reading of each column; `author` becomes one column per author of `rows`."""
    authors = sorted({row["author"] for row in rows if row["author"] is not None})
    columns: dict[str, Callable[[Row], float]] = {}
    for feature in features:
        if feature == "author":
            columns |= {f"author/{name}": lambda row, name=name: row["author"] == name for name in authors}  # type: ignore[misc]
        else:
            columns[feature] = _READINGS[feature]
    return columns


def _digits(row: Row) -> float:
    answer: str = row["extracted"] or ""
    return sum(letter.isdigit() for letter in answer)


_READINGS: Final[dict[str, Callable[[Row], float]]] = {
    "tokens": lambda row: row["tokens"],
    "question_tokens": lambda row: row["question_tokens"],
    "lines": lambda row: sum(bool(line.strip()) for line in row["solution"].splitlines()),
    "equations": lambda row: row["solution"].count("="),
    "answered": lambda row: row["extracted"] is not None,
    "whole_answer": lambda row: (row["extracted"] or "").strip().lstrip("-").replace(",", "").isdigit(),
    "answer_digits": _digits,
}


def _fit(x_NF: Floats, right_N: NDArray[np.bool_]) -> tuple[Floats, float]:
    """Weights and bias of the regression above, by Newton's method; the bias is not drawn to zero."""
    import numpy as np

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


def _reward(row: Row, score: float, scorer: str) -> dict[str, Any]:
    return {
        "question_id": row["question_id"],
        "sample": row["sample"],
        "reward": score,
        "status": row["status"],
        "extracted": row["extracted"],
        "components": [("model", score), ("rule", row["reward"])],
        "step_rewards": None,
        "step_ends": None,
        "scorer": scorer,
    }
