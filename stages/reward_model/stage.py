"""Scoring by reward models as a stage: outputs in, rewards out."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, assert_never

from pipeline.stage import record_metrics, stage
from stages.models import Checkpoint, RewardKind, check_lengths, reward_kind, same_vocabulary
from stages.reward_metrics import RewardMetric, status_metric
from stages.reward_model.config import ScoringConfig
from stages.tables import Rewards, Rollouts
from stages.text import step_ends

__all__ = ["score_outputs"]

UNJUDGED = "unjudged"
"""Status where no rule has looked at the output."""


@stage(version="1")
def score_outputs(
    outputs: Rollouts,
    policy: Checkpoint,
    models: list[Checkpoint],
    config: ScoringConfig,
    rules: Rewards | None = None,
) -> Rewards:
    """r_phi of every output, in the order of `outputs` (Algorithm 1, line 8).

    An outcome model gives the `reward`; a process model gives `step_rewards`, and the reward where it is alone
    (`process_score`). Steps are lines (`step_ends`). Models read the very ids that were sampled, at the tokens named,
    and score every output, truncated ones included: their status says so. `components`: `model` (the reward), `process` (the
    process model's score of the output, where both score) and `rule`. `scorer` is the model's digest, of two models both,
    joined by `+`.

    Args:
        outputs: o_i with their ids.
        policy: who sampled them; its tokenizer must be that of the models.
        models: one, or one of each kind.
        config: scale and batching.
        rules: rewards of the same outputs by rules, which give status and extracted answer; without, the status is `unjudged`.

    Metrics: `reward/mean`, `reward/model`, `reward/process`, `reward/rule`, `reward/status_<status>`, `time/scoring`.

    Raises:
        ValueError: models of one kind or of none; a model with another tokenizer; by row: an input beyond a model's window, an
            output without a rule's reward, a score that is not finite.
    """
    started = time.perf_counter()
    chosen = _by_kind(models, policy)
    columns = ["question_id", "sample", "prompt_ids", "output_ids", "text", "text_ends"]
    rows = outputs.read().select(columns).to_pylist()
    verdicts = _verdicts(rows, rules)
    scored = {kind: _scores(rows, model, kind, config) for kind, model in chosen.items()}
    rewards = [
        _reward(row, verdict, {kind: scores[place] for kind, scores in scored.items()}, config)
        for place, (row, verdict) in enumerate(zip(rows, verdicts, strict=True))
    ]
    scorer = "+".join(model.digest for model in chosen.values())
    record_metrics({**_metrics(rewards), "time/scoring": time.perf_counter() - started})
    return Rewards.write([{**reward, "scorer": scorer} for reward in rewards])


def _by_kind(models: Sequence[Checkpoint], policy: Checkpoint) -> dict[RewardKind, Checkpoint]:
    kinds = [reward_kind(model) for model in models]
    if not kinds or len(set(kinds)) < len(kinds):
        raise ValueError(f"expected one reward model, or one of each kind, found {kinds}")
    for model in models:
        if not same_vocabulary(policy, model):
            raise ValueError(
                f"the reward {model} has another tokenizer than the policy {policy} that sampled: the same ids are other "
                "tokens to it; make the reward model from a model that shares the policy's tokenizer"
            )
    return dict(sorted(zip(kinds, models, strict=True)))  # outcome before process


def _verdicts(rows: Sequence[Mapping[str, Any]], rules: Rewards | None) -> list[Mapping[str, Any]]:
    """What the rules say of each row."""
    if rules is None:
        return [{"status": UNJUDGED, "extracted": None, "reward": None}] * len(rows)
    by_key = {(row["question_id"], row["sample"]): row for row in rules.rows()}
    for row in rows:
        key = (row["question_id"], row["sample"])
        if key not in by_key:
            raise ValueError(f"output {key} has no reward by rules; were they given for other rollouts?")
        if by_key[key]["scorer"] is not None:
            raise ValueError(f"output {key}: expected the reward of rules, found one by a model; score by rules first")
    return [by_key[(row["question_id"], row["sample"])] for row in rows]


def _scores(
    rows: Sequence[dict[str, Any]], model: Checkpoint, kind: RewardKind, config: ScoringConfig
) -> list[tuple[list[int], list[float]]]:
    """Where each row was read, and its scores there on the scale asked for."""
    from stages.reward_model.scoring import Input, scores_of
    from stages.training import threads

    check_lengths(model, rows)
    places = [_places(row, kind) for row in rows]
    inputs = [
        Input(tuple(row["prompt_ids"]), tuple(row["output_ids"]), tuple(read))
        for row, read in zip(rows, places, strict=True)
    ]
    with threads(config.threads):
        logits = scores_of(model, inputs, config)
    for row, found in zip(rows, logits, strict=True):
        if not all(map(math.isfinite, found)):
            key = (row["question_id"], row["sample"])
            raise ValueError(f"reward {model}: a score of output {key} is not finite; continue from an earlier model")
    return [(read, [_scaled(logit, config) for logit in found]) for read, found in zip(places, logits, strict=True)]


def _places(row: Mapping[str, Any], kind: RewardKind) -> list[int]:
    tokens, ends = len(row["output_ids"]), row["text_ends"]
    if kind == "outcome":
        return [tokens - 1]
    if len(ends) != tokens:
        key = (row["question_id"], row["sample"])
        raise ValueError(f"output {key}: expected one of text_ends for each of {tokens} tokens, found {len(ends)}")
    return step_ends(row["text"], ends)


def _scaled(logit: float, config: ScoringConfig) -> float:
    if config.scale == "logit":
        return logit
    # Both branches are exact where the other would overflow.
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def _reward(
    row: Mapping[str, Any],
    verdict: Mapping[str, Any],
    scored: Mapping[RewardKind, tuple[list[int], list[float]]],
    config: ScoringConfig,
) -> dict[str, Any]:
    ends, steps = scored.get("process", (None, None))
    process = None if steps is None else _of_steps(steps, config)
    reward = scored["outcome"][1][0] if "outcome" in scored else process
    both = {"process": process} if len(scored) > 1 else {}
    return {
        "question_id": row["question_id"],
        "sample": row["sample"],
        "reward": reward,
        "status": verdict["status"],
        "extracted": verdict["extracted"],
        "components": list({"model": reward, **both, "rule": verdict["reward"]}.items()),
        "step_rewards": steps,
        "step_ends": ends,
    }


def _of_steps(steps: Sequence[float], config: ScoringConfig) -> float:
    match config.process_score:
        case "min":
            return min(steps)
        case "mean":
            return fmean(steps)
        case "last":
            return steps[-1]
        case _:
            assert_never(config.process_score)


def _metrics(rewards: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    columns: dict[str, list[float]] = {RewardMetric.MEAN: [row["reward"] for row in rewards]}
    for row in rewards:
        for name, value in row["components"]:
            columns.setdefault(f"reward/{name}", []).extend([] if value is None else [value])
    statuses = Counter(row["status"] for row in rewards)
    shares = {status_metric(status): count / len(rewards) for status, count in statuses.items()}
    return {name: fmean(values) for name, values in columns.items() if values} | shares
