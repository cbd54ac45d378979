"""Step labels by Monte-Carlo completion (Math-Shepherd, Wang et al. 2023b, arXiv 2312.08935): what becomes of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, assert_never

from pipeline.stage import record_metrics, stage
from stages.reward_training.config import MonteCarloConfig
from stages.tables import VERDICTS, RewardLabels, Rewards, StepPrefixes

__all__ = ["estimate_step_labels"]

_Key = tuple[str, int]


@stage(version="1")
def estimate_step_labels(
    labels: RewardLabels, prefixes: StepPrefixes, rewards: Rewards, config: MonteCarloConfig
) -> RewardLabels:
    """`labels` with the step labels that N continuations of each step estimate, in place of any they have.

        y_j = 1 if any of the continuations of step j is right, else 0        (`existence`: hard estimation)
        y_j = the share of them that are right                                (`share`: soft estimation)

    Right is what the rules say `ok` to; continuations without a verdict do not count. The step that ends an output is not
    continued: its label is the output's own, whether the output stopped or was cut. An output of which a step has no
    continuation with a verdict has no step labels, and so has one that `prefixes` leaves out.

    Args:
        labels: of whole outputs, by rules.
        prefixes: where the steps of these outputs end, and which of their prefixes are equal.
        rewards: of the continuations, by rules; number n of prefix p has `sample` = p * N + n.

    Metrics: `rm/right_steps_share` (mean label), `rm/unlabelled_outputs` (share of all); where `labels` have exact step labels
    `rm/step_agreement` and, over the steps that were continued, `rm/continued_step_agreement`: the share of steps on whose side
    of 0.5 both are (0.5 counts as right).

    Raises:
        ValueError: by row: another number of continuations than N, or rewards of a model.
    """
    verdicts = _verdicts(rewards, config.samples)
    steps = _steps(prefixes)
    rows = labels.rows()
    estimated = [{**row, **_estimate(row, steps, verdicts, config)} for row in rows]
    record_metrics(_metrics(rows, estimated, steps))
    return RewardLabels.write(estimated)


def _verdicts(rewards: Rewards, samples: int) -> dict[_Key, list[float]]:
    """For each prefix of a question 1 or 0 for every continuation that has a verdict.

    Raises:
        ValueError: a prefix has not all its continuations, or a model rewarded them.
    """
    table = rewards.read().select(["question_id", "sample", "reward", "status", "scorer"])
    counts: dict[_Key, int] = {}
    found: dict[_Key, list[float]] = {}
    for row in table.to_pylist():
        if row["scorer"] is not None:
            raise ValueError(
                f"continuation {(row['question_id'], row['sample'])} was rewarded by a model ({row['scorer'][:12]}); step "
                "labels are what the rules say of continuations"
            )
        prefix = (row["question_id"], row["sample"] // samples)
        counts[prefix] = counts.get(prefix, 0) + 1
        known = found.setdefault(prefix, [])
        if row["reward"] is not None and row["status"] in VERDICTS:
            known.append(float(row["status"] == "ok"))
    for prefix, count in counts.items():
        if count != samples:
            raise ValueError(
                f"prefix {prefix}: expected {samples} continuations, found {count}; estimate with as many samples as were drawn"
            )
    return found


def _steps(prefixes: StepPrefixes) -> dict[_Key, list[Mapping[str, Any]]]:
    """The steps of each output, in order."""
    steps: dict[_Key, list[Mapping[str, Any]]] = {}
    for row in prefixes.rows():
        steps.setdefault((row["question_id"], row["sample"]), []).append(row)
    return {key: sorted(each, key=lambda row: int(row["step"])) for key, each in steps.items()}


def _estimate(
    row: Mapping[str, Any],
    steps: Mapping[_Key, Sequence[Mapping[str, Any]]],
    verdicts: Mapping[_Key, Sequence[float]],
    config: MonteCarloConfig,
) -> dict[str, Any]:
    """The columns of one output's step labels."""
    key = (row["question_id"], row["sample"])
    if key not in steps:
        return {"step_ends": None, "step_labels": None}
    ends = [step["end"] for step in steps[key]]
    if ends[-1] != len(row["output_ids"]) - 1:
        raise ValueError(
            f"output {key} has {len(row['output_ids'])} tokens, its steps end at {ends}; were the prefixes cut from others?"
        )
    labels = []
    for step in steps[key]:
        prefix = (key[0], step["prefix"])
        if step["prefix"] is not None and prefix not in verdicts:
            raise ValueError(
                f"output {key}: no continuation of its step {step['step']} (prefix {step['prefix']}) is there"
            )
        right = [row["label"]] if step["prefix"] is None else verdicts[prefix]
        if not right:
            return {"step_ends": None, "step_labels": None}
        labels.append(_label(right, config))
    return {"step_ends": ends, "step_labels": labels}


def _label(right: Sequence[float], config: MonteCarloConfig) -> float:
    match config.estimate:
        case "existence":
            return max(right)
        case "share":
            return fmean(right)
        case _:
            assert_never(config.estimate)


def _metrics(
    exact: Sequence[Mapping[str, Any]],
    estimated: Sequence[Mapping[str, Any]],
    steps: Mapping[_Key, Sequence[Mapping[str, Any]]],
) -> dict[str, float | None]:
    labels = [label for row in estimated for label in row["step_labels"] or []]
    unlabelled = sum(row["step_labels"] is None for row in estimated)
    agreements = [
        pair for before, after in zip(exact, estimated, strict=True) for pair in _compared(before, after, steps)
    ]
    continued = [agrees for agrees, is_continued in agreements if is_continued]
    return {
        "rm/right_steps_share": fmean(labels) if labels else None,
        "rm/unlabelled_outputs": unlabelled / len(estimated) if estimated else None,
        "rm/step_agreement": fmean(agrees for agrees, _ in agreements) if agreements else None,
        "rm/continued_step_agreement": fmean(continued) if continued else None,
    }


def _compared(
    exact: Mapping[str, Any], estimated: Mapping[str, Any], steps: Mapping[_Key, Sequence[Mapping[str, Any]]]
) -> Iterator[tuple[bool, bool]]:
    """For each step that both label: whether they agree, and whether it was continued."""
    if not exact["step_ends"] or exact["step_ends"] != estimated["step_ends"]:
        return
    own = steps[exact["question_id"], exact["sample"]]
    for true, label, step in zip(exact["step_labels"], estimated["step_labels"], own, strict=True):
        yield (true >= 0.5) == (label >= 0.5), step["prefix"] is not None
