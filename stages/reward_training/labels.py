"""Labels that reward models learn from: the rules' of outputs, and of steps by Monte-Carlo completion.

Math-Shepherd (Wang et al. 2023b, arXiv 2312.08935): a step is as good as what becomes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Annotated, Any, Literal, assert_never

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from pipeline.config import Config
from pipeline.stage import record_metrics, stage
from stages.join import KEY, Ragged, align, key_at
from stages.models import Checkpoint, vocabulary_of
from stages.tables import VERDICTS, RewardLabels, Rewards, Rollouts, StepPrefixes

__all__ = ["MonteCarloConfig", "RuleStepsConfig", "StepLabelsConfig", "estimate_step_labels", "label_outputs"]


class RuleStepsConfig(Config):
    """Step labels are the rules' step rewards: the built-in world's own checker, by a reward component of kind `steps`."""

    kind: Literal["rules"] = "rules"
    """Discriminator."""


class MonteCarloConfig(Config):
    """Step labels by completion (Math-Shepherd, Wang et al. 2023b, arXiv 2312.08935): a step is as good as what the policy
    makes of it. Needs the rules' verdict on whole outputs only, and so works for any questions."""

    kind: Literal["monte_carlo"] = "monte_carlo"
    """Discriminator."""
    samples: int = Field(8, ge=1)
    """N, continuations of each distinct prefix (Math-Shepherd: 8). The cost: with `rollout.G` outputs of K steps each, up to
    G * (K - 1) * N continuations of a question, less where outputs begin alike."""
    estimate: Literal["existence", "share"] = "existence"
    """Label of a step. `existence`: 1 if any of its continuations comes to the right answer, else 0 (Math-Shepherd's hard
    estimation). `share`: the share of those that do (soft estimation)."""
    outputs_per_question: int | None = Field(None, ge=1)
    """Only so many outputs of each question get step labels, those sampled first; null: all. The others stay examples of the
    outcome model."""


StepLabelsConfig = Annotated[RuleStepsConfig | MonteCarloConfig, Field(discriminator="kind")]


@stage(version="1")
def label_outputs(outputs: Rollouts, rewards: Rewards, policy: Checkpoint) -> RewardLabels:
    """Label each output with the verdict of the rules, in the order of `outputs`: 1 where the status is `ok`, else 0.

    Left out is what the rules have no verdict on: time-outs, errors, rows without a reward. Step labels are the rules' step
    rewards, where they have them. The scored token is the last one of the output.

    Args:
        rewards: of the same outputs, by rules.
        policy: who sampled them: the `origin` of the labels and the vocabulary of the ids.

    Metrics: `rm/labelled` (rows), `rm/left_out` (share of all outputs), `rm/right_share` (of labelled rows),
    `rm/right_steps_share`.

    Raises:
        ValueError: by row: an output without a reward or without tokens, rewards of a model, step labels that do not fit their
            output.
    """
    import pyarrow.compute as pc

    table = outputs.read([*KEY, "prompt_ids", "output_ids"])
    verdicts = align(table, rewards.read([*KEY, "reward", "status", "scorer", "step_rewards", "step_ends"]), "rewards")
    length_N = pc.list_value_length(table["output_ids"]).to_numpy().astype(np.int64)
    _check_verdicts(verdicts, length_N)
    kept = pc.and_(verdicts["reward"].is_valid(), pc.is_in(verdicts["status"], pa.array(VERDICTS)))
    labelled, verdicts = table.filter(kept), verdicts.filter(kept)
    columns = {
        "scored_index": pa.array(length_N[kept.to_numpy()] - 1, pa.int32()),
        "label": pc.equal(verdicts["status"], "ok").cast(pa.float64()),
        "step_ends": verdicts["step_ends"],
        "step_labels": verdicts["step_rewards"],
        "origin": pa.array([policy.digest] * labelled.num_rows, pa.string()),
        "vocabulary": pa.array([vocabulary_of(policy)] * labelled.num_rows, pa.string()),
    }
    for name, column in columns.items():
        labelled = labelled.append_column(name, column)
    record_metrics(_label_metrics(labelled, table.num_rows))
    return RewardLabels.write(labelled)


def _check_verdicts(verdicts: pa.Table, length_N: NDArray[np.int64]) -> None:
    """Refuse outputs without tokens, rewards by a model, and steps that do not fit their output; names the row."""
    for row in np.flatnonzero(length_N == 0):
        raise ValueError(f"output {key_at(verdicts, row)} has no tokens; there is none to read its score at")
    for row in np.flatnonzero(verdicts["scorer"].is_valid()):
        raise ValueError(
            f"output {key_at(verdicts, row)} was rewarded by a model ({verdicts['scorer'][int(row)].as_py()[:12]}); labels are "
            "the rules' (DeepSeekMath, 5.2.1)"
        )
    ends, labels = Ragged.of(verdicts["step_ends"]), Ragged.of(verdicts["step_rewards"])
    for row in np.flatnonzero((ends.null != labels.null) | (ends.lengths != labels.lengths)):
        found = [verdicts[name][int(row)].as_py() for name in ("step_rewards", "step_ends")]
        raise ValueError(
            f"output {key_at(verdicts, row)}: expected one step reward for each step end, found {found[0]} and {found[1]}"
        )
    inside = (ends.values >= 0) & (ends.values < length_N[ends.row_of_value])
    for row in ends.row_of_value[~inside]:
        raise ValueError(
            f"output {key_at(verdicts, row)} has {length_N[row]} tokens, its steps end at {ends[row].tolist()}"
        )


def _label_metrics(labelled: pa.Table, outputs: int) -> dict[str, float | None]:
    rows, right = labelled.num_rows, float(labelled["label"].to_numpy().sum())
    steps = Ragged.of(labelled["step_labels"]).values.tolist()
    return {
        "rm/labelled": rows,
        "rm/left_out": 1 - rows / outputs if outputs else None,
        "rm/right_share": right / rows if rows else None,
        "rm/right_steps_share": sum(steps) / len(steps) if steps else None,
    }


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
    record_metrics(_estimate_metrics(rows, estimated, steps))
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


def _estimate_metrics(
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
