"""How far a reward model's scores can be trusted: held against the verdicts of the rules on the same outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.stage import record_metrics, stage
from stages.reward_model.config import GaugeConfig, GaugeLimits, ScoringConfig
from stages.tables import VERDICTS, RewardGauges, Rewards, Rollouts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stages.kernels.voting import Interval

__all__ = ["RewardModelError", "check_gauges", "measure_reward_model"]


class RewardModelError(ValueError):
    """A reward model whose scores have left the limits that the config sets."""


@stage(version="1")
def measure_reward_model(
    scores: Rewards, rules: Rewards, outputs: Rollouts, scoring: ScoringConfig, config: GaugeConfig
) -> RewardGauges:
    """Gauges of a reward model on outputs whose rule rewards are known; on outputs it was not trained on, its quality.

    Rows with a verdict (right: status `ok`) and a rule reward count; gauges that are undefined are null (all outputs right,
    say). Each is a metric `rm/<gauge>` too, its interval `rm/<gauge>_low` and `_high`:

    - `auc`: right against wrong over all rows (with interval over questions); `pair_accuracy`: within questions only
    - `accuracy`: share of scores on the side of their verdict, `ece`: calibration error; both of the probability
      sigma(score), which only a pointwise model means
    - `pearson`, `spearman`: correlation of model reward with rule reward
    - `score_length`, `rule_length`: rank correlation of each with the output's length in tokens; `length_bias`: their
      difference; `length_auc`: AUC of the length alone, `cut_auc` of not being truncated, as baselines
    - `step_accuracy`, `step_auc`: the same of steps, where both have step rewards
    - `score_mean`, `rule_mean`

    Args:
        scores: of the model.
        rules: of the same outputs.
        outputs: the outputs.
        scoring: how the scores were made: their scale.
        config: intervals and bins.

    Raises:
        ValueError: by row: a counterpart is missing, or its steps end at other tokens.
    """
    measures = _measure(_join(scores, rules, outputs), scoring, config)
    record_metrics(_metrics(measures))
    return RewardGauges.write([{"gauge": name, **measure.row()} for name, measure in measures.items()])


def check_gauges(gauges: RewardGauges, limits: GaugeLimits) -> None:
    """Compare gauges with the limits that are set; an undefined gauge passes.

    Raises:
        RewardModelError: a limit is passed; names gauge, value and limit.
    """
    found = {row["gauge"]: row["value"] for row in gauges.rows()}
    wrong = [
        f"{name} {found[name]:.3f} is below {field}={least}"
        for name, field, least in (
            ("auc", "min_auc", limits.min_auc),
            ("pearson", "min_correlation", limits.min_correlation),
        )
        if least is not None and found[name] is not None and found[name] < least
    ]
    most, bias = limits.max_length_bias, found["length_bias"]
    if most is not None and bias is not None and abs(bias) > most:
        wrong.append(f"length_bias {bias:+.3f} is beyond max_length_bias={most}")
    if wrong:
        raise RewardModelError(
            f"the reward model's scores no longer stand for being right: {'; '.join(wrong)}. Train it on the current policy's "
            "outputs (reward_training, iterations), lower the learning rate or raise the KL coefficient; or change the limit"
        )


@dataclass(frozen=True)
class _Measure:
    value: float | None
    rows: int
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, interval: Interval | None, rows: int) -> _Measure:
        if interval is None:
            return cls(None, rows)
        return cls(interval.estimate, rows, interval.low, interval.high)

    def row(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high, "rows": self.rows}


@dataclass(frozen=True)
class _Joined:
    """Rows with a verdict, N of them, and their steps, S in all."""

    score_N: NDArray[np.float64]
    rule_N: NDArray[np.float64]
    right_N: NDArray[np.bool_]
    length_N: NDArray[np.float64]
    cut_N: NDArray[np.bool_]
    question_N: list[str]
    step_score_S: NDArray[np.float64]
    step_right_S: NDArray[np.bool_]


def _join(scores: Rewards, rules: Rewards, outputs: Rollouts) -> _Joined:
    import numpy as np
    import pyarrow.compute as pc

    by_key = {(row["question_id"], row["sample"]): row for row in rules.rows()}
    table = outputs.read()
    tokens = pc.list_value_length(table["output_ids"]).to_pylist()
    keys = zip(table["question_id"].to_pylist(), table["sample"].to_pylist(), strict=True)
    lengths = dict(zip(keys, tokens, strict=True))
    rows, steps = [], []
    for scored in scores.rows():
        key = (scored["question_id"], scored["sample"])
        if key not in by_key or key not in lengths:
            raise ValueError(
                f"score of {key} has no {'output' if key in by_key else 'rule reward'}; join equal rollouts"
            )
        rule = by_key[key]
        if rule["status"] not in VERDICTS or rule["reward"] is None or scored["reward"] is None:
            continue
        rows.append((scored["reward"], rule["reward"], rule["status"], lengths[key], key[0]))
        steps += _steps(key, scored, rule)
    return _Joined(
        score_N=np.array([row[0] for row in rows], dtype=np.float64),
        rule_N=np.array([row[1] for row in rows], dtype=np.float64),
        right_N=np.array([row[2] == "ok" for row in rows], dtype=bool),
        cut_N=np.array([row[2] == "truncated" for row in rows], dtype=bool),
        length_N=np.array([row[3] for row in rows], dtype=np.float64),
        question_N=[row[4] for row in rows],
        step_score_S=np.array([score for score, _ in steps], dtype=np.float64),
        step_right_S=np.array([label > 0.5 for _, label in steps], dtype=bool),
    )


def _steps(key: tuple[str, int], scored: Mapping[str, Any], rule: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Score and label of each step, where both have them."""
    if scored["step_ends"] is None or rule["step_ends"] is None:
        return []
    if scored["step_ends"] != rule["step_ends"]:
        raise ValueError(
            f"output {key}: the model's steps end at {scored['step_ends']}, the rules' at {rule['step_ends']}; both must cut "
            "outputs alike"
        )
    return list(zip(scored["step_rewards"], rule["step_rewards"], strict=True))


def _measure(joined: _Joined, scoring: ScoringConfig, config: GaugeConfig) -> dict[str, _Measure]:
    from stages.kernels import gauges

    score, right, count = joined.score_N, joined.right_N, len(joined.score_N)
    interval = gauges.auc_interval(score, right, joined.question_N, resamples=config.resamples, seed=config.seed)
    score_length, rule_length = (gauges.spearman(each, joined.length_N) for each in (score, joined.rule_N))
    values = {
        "pair_accuracy": gauges.pair_accuracy(score, right, joined.question_N),
        "accuracy": _accuracy(score, right, scoring),
        "ece": gauges.calibration_error(_probability(score, scoring), right, bins=config.bins),
        "pearson": gauges.pearson(score, joined.rule_N),
        "spearman": gauges.spearman(score, joined.rule_N),
        "score_length": score_length,
        "rule_length": rule_length,
        "length_bias": None if score_length is None or rule_length is None else score_length - rule_length,
        "length_auc": gauges.auc(joined.length_N, right),
        "cut_auc": gauges.auc(~joined.cut_N, right),
        "score_mean": float(score.mean()) if count else None,
        "rule_mean": float(joined.rule_N.mean()) if count else None,
    }
    step_values = {
        "step_accuracy": _accuracy(joined.step_score_S, joined.step_right_S, scoring),
        "step_auc": gauges.auc(joined.step_score_S, joined.step_right_S),
    }
    return {
        "auc": _Measure.of(interval, count),
        **{name: _Measure(value, count) for name, value in values.items()},
        **{name: _Measure(value, len(joined.step_score_S)) for name, value in step_values.items()},
    }


def _accuracy(score: NDArray[np.float64], right: NDArray[np.bool_], scoring: ScoringConfig) -> float | None:
    middle = 0.0 if scoring.scale == "logit" else 0.5
    return float(((score > middle) == right).mean()) if len(score) else None


def _probability(score: NDArray[np.float64], scoring: ScoringConfig) -> NDArray[np.float64]:
    import numpy as np

    if scoring.scale == "sigmoid":
        return score
    # tanh neither overflows nor leaves [-1, 1].
    probability: NDArray[np.float64] = (1 + np.tanh(score / 2)) / 2
    return probability


def _metrics(measures: Mapping[str, _Measure]) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {}
    for name, measure in measures.items():
        metrics[f"rm/{name}"] = measure.value
        if measure.low is not None:
            metrics |= {f"rm/{name}_low": measure.low, f"rm/{name}_high": measure.high}
    return {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}
