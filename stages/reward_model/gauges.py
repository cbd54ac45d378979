"""How far a reward model's scores can be trusted: compared with the verdicts of the rules on the same outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from pipeline.config import Config
from pipeline.stage import record_metrics, stage
from stages.join import KEY, Ragged, align, key_at
from stages.kernels import estimators
from stages.reward_metrics import gauge_metrics
from stages.reward_model.stage import ScoringConfig
from stages.tables import RewardGauges, Rewards, Rollouts, has_verdict


class GaugeConfig(Config):
    """How gauges are estimated."""

    resamples: int = Field(1000, ge=100)
    """Resamples of the questions for 95 % intervals."""
    seed: int = 0
    """Seed of the resampling; it decides the third digit of the bounds."""
    bins: int = Field(10, ge=2)
    """Bins of equal width for the calibration error."""


class GaugeLimits(Config):
    """Limits at which a run stops because its rewards no longer agree with the rules; null: never."""

    min_auc: float | None = Field(None, ge=0, le=1)
    """Least AUC of the reward model on the current policy's outputs. Ours; 0.5 is chance."""
    min_correlation: float | None = Field(None, ge=-1, le=1)
    """Least Pearson correlation of model reward and rule reward. Ours. It falls when the policy learns to please the model
    instead of being right (reward hacking)."""
    max_length_bias: float | None = Field(None, ge=0, le=2)
    """Most that the rank correlation of score and length may lie away from that of rule reward and length. Ours."""


class RewardModelError(ValueError):
    """A gauge of a reward model has passed the limits that the config sets."""


@stage(version="1")
def measure_reward_model(
    scores: Rewards, rules: Rewards, outputs: Rollouts, scoring: ScoringConfig, config: GaugeConfig
) -> RewardGauges:
    """Measure a reward model on outputs whose rule rewards are known; on outputs it was not trained on, its quality.

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
    record_metrics(gauge_metrics(measures))
    return RewardGauges.write([{"gauge": name, **measure} for name, measure in measures.items()])


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
            f"the reward model's scores no longer agree with the rules: {'; '.join(wrong)}. Train it on the current policy's "
            "outputs (reward_training, iterations), lower the learning rate or raise the KL coefficient; or change the limit"
        )


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
    import pyarrow.compute as pc

    steps = ("step_rewards", "step_ends")
    scored = scores.read([*KEY, "reward", *steps])
    rule = align(scored, rules.read([*KEY, "reward", "status", *steps]), "rule rewards", to="scores", extra=True)
    sampled = align(scored, outputs.read([*KEY, "output_ids"]), "outputs", to="scores", extra=True)
    length = pc.list_value_length(sampled["output_ids"])
    counts = pc.and_(has_verdict(rule), scored["reward"].is_valid())
    scored, rule, length = scored.filter(counts), rule.filter(counts), length.filter(counts)
    step_score_S, step_label_S = _steps(scored, rule)
    return _Joined(
        score_N=scored["reward"].to_numpy(),
        rule_N=rule["reward"].to_numpy(),
        right_N=pc.equal(rule["status"], "ok").to_numpy(),
        cut_N=pc.equal(rule["status"], "truncated").to_numpy(),
        length_N=length.to_numpy().astype(np.float64),
        question_N=scored["question_id"].to_pylist(),
        step_score_S=step_score_S,
        step_right_S=step_label_S > 0.5,
    )


def _steps(scored: pa.Table, rule: pa.Table) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return scores and labels of all steps of the rows in which both have them.

    Raises:
        ValueError: the two have steps that end at different tokens; names the row.
    """
    import pyarrow.compute as pc

    both = pc.and_(scored["step_ends"].is_valid(), rule["step_ends"].is_valid())
    scored, rule = scored.filter(both), rule.filter(both)
    ends, rule_ends = Ragged.of(scored["step_ends"]), Ragged.of(rule["step_ends"])
    for row in range(len(ends)):
        if not np.array_equal(ends[row], rule_ends[row]):
            raise ValueError(
                f"output {key_at(scored, row)}: the model's steps end at {ends[row].tolist()}, the rules' at "
                f"{rule_ends[row].tolist()}; both must cut outputs alike"
            )
    score, label = Ragged.of(scored["step_rewards"]), Ragged.of(rule["step_rewards"])
    wrong = np.flatnonzero((score.lengths != ends.lengths) | (label.lengths != ends.lengths))
    if len(wrong):
        row = wrong[0]
        raise ValueError(
            f"output {key_at(scored, row)}: expected one score and one label for each of {ends.lengths[row]} steps, found "
            f"{score.lengths[row]} and {label.lengths[row]}"
        )
    return score.values, label.values


def _measure(joined: _Joined, scoring: ScoringConfig, config: GaugeConfig) -> dict[str, dict[str, Any]]:
    score, right, count = joined.score_N, joined.right_N, len(joined.score_N)
    interval = estimators.auc_interval(score, right, joined.question_N, resamples=config.resamples, seed=config.seed)
    score_length, rule_length = (estimators.spearman(each, joined.length_N) for each in (score, joined.rule_N))
    values = {
        "pair_accuracy": estimators.pair_accuracy(score, right, joined.question_N),
        "accuracy": _accuracy(score, right, scoring),
        "ece": estimators.calibration_error(_probability(score, scoring), right, bins=config.bins),
        "pearson": estimators.pearson(score, joined.rule_N),
        "spearman": estimators.spearman(score, joined.rule_N),
        "score_length": score_length,
        "rule_length": rule_length,
        "length_bias": None if score_length is None or rule_length is None else score_length - rule_length,
        "length_auc": estimators.auc(joined.length_N, right),
        "cut_auc": estimators.auc(~joined.cut_N, right),
        "score_mean": float(score.mean()) if count else None,
        "rule_mean": float(joined.rule_N.mean()) if count else None,
    }
    step_values = {
        "step_accuracy": _accuracy(joined.step_score_S, joined.step_right_S, scoring),
        "step_auc": estimators.auc(joined.step_score_S, joined.step_right_S),
    }
    undefined = {"value": None, "low": None, "high": None}
    bounds = {} if interval is None else {"value": interval.estimate, "low": interval.low, "high": interval.high}
    return {
        "auc": {**undefined, **bounds, "rows": count},
        **{name: {**undefined, "value": value, "rows": count} for name, value in values.items()},
        **{
            name: {**undefined, "value": value, "rows": len(joined.step_score_S)} for name, value in step_values.items()
        },
    }


def _accuracy(score: NDArray[np.float64], right: NDArray[np.bool_], scoring: ScoringConfig) -> float | None:
    middle = 0.0 if scoring.scale == "logit" else 0.5
    return float(((score > middle) == right).mean()) if len(score) else None


def _probability(score: NDArray[np.float64], scoring: ScoringConfig) -> NDArray[np.float64]:
    if scoring.scale == "sigmoid":
        return score
    # tanh neither overflows nor leaves [-1, 1].
    probability: NDArray[np.float64] = (1 + np.tanh(score / 2)) / 2
    return probability
