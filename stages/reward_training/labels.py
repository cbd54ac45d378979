"""Labels that reward models learn from: the rules' of outputs, and of steps by Monte-Carlo completion.

Math-Shepherd (Wang et al. 2023b, arXiv 2312.08935): a step is as good as what becomes of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Any, Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from pipeline.config import Config
from pipeline.stage import record_metrics, stage
from stages.join import KEY, Ragged, align, key_at
from stages.models import Checkpoint, vocabulary_of
from stages.tables import RewardLabels, Rewards, Rollouts, StepPrefixes, has_verdict


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

_PREFIX: Final = ["question_id", "prefix"]
"""Columns that name a prefix."""


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
    kept = has_verdict(verdicts)
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


@stage(version="1")
def estimate_step_labels(
    labels: RewardLabels, prefixes: StepPrefixes, rewards: Rewards, config: MonteCarloConfig
) -> RewardLabels:
    """Replace the step labels of `labels` by those that N continuations of each step estimate.

        y_j = 1 if any of the continuations of step j is right, else 0        (`existence`: hard estimation)
        y_j = the share of them that are right                                (`share`: soft estimation)

    Right is status `ok`; continuations without a verdict do not count. The step that ends an output is not continued: its label
    is the output's own, whether the output stopped or was cut. An output has no step labels where a step has no continuation
    with a verdict, or where `prefixes` leaves the output out.

    Args:
        labels: of whole outputs, by rules.
        prefixes: where the steps of these outputs end, and which of their prefixes are equal.
        rewards: of the continuations, by rules; number n of prefix p has `sample` = p * N + n.

    Metrics: `rm/right_steps_share` (mean label), `rm/unlabelled_outputs` (share of all); where `labels` have exact step labels
    `rm/step_agreement` and, over the steps that were continued, `rm/continued_step_agreement`: the share of steps on whose side
    of 0.5 both are (0.5 counts as right).

    Raises:
        JoinError: a step without continuations.
        ValueError: by row: another number of continuations than N, or rewards of a model.
    """
    exact = labels.read()
    steps = _labelled_steps(exact, prefixes.read(), _labels_of_prefixes(rewards, config))
    length_N = np.bincount(steps.row_S, minlength=exact.num_rows)
    unknown_N = np.bincount(steps.row_S, weights=np.isnan(steps.label_S), minlength=exact.num_rows) > 0
    steps = steps.keep(~unknown_N[steps.row_S])
    length_N[unknown_N] = 0
    estimated = exact
    for name, values in (("step_ends", steps.end_S), ("step_labels", steps.label_S)):
        place = estimated.schema.get_field_index(name)
        estimated = estimated.set_column(place, name, _lists(values, length_N))
    record_metrics(_estimate_metrics(exact, estimated, steps))
    return RewardLabels.write(estimated)


@dataclass(frozen=True)
class _Steps:
    """Steps of outputs that have a label, output by output, S of them."""

    row_S: NDArray[np.int64]
    """Row of the output among the labels."""
    end_S: NDArray[np.int32]
    label_S: NDArray[np.float64]
    """NaN where no continuation has a verdict."""
    continued_S: NDArray[np.bool_]

    def keep(self, mask_S: NDArray[np.bool_]) -> _Steps:
        return _Steps(self.row_S[mask_S], self.end_S[mask_S], self.label_S[mask_S], self.continued_S[mask_S])


def _labels_of_prefixes(rewards: Rewards, config: MonteCarloConfig) -> pa.Table:
    """Return the estimate for each prefix (`estimate`), null where none of its continuations has a verdict.

    Raises:
        ValueError: a prefix has not all its continuations, or a model rewarded them.
    """
    import pyarrow.compute as pc

    table = rewards.read([*KEY, "reward", "status", "scorer"])
    for row in np.flatnonzero(table["scorer"].is_valid()):
        raise ValueError(
            f"continuation {key_at(table, row)} was rewarded by a model ({table['scorer'][int(row)].as_py()[:12]}); step "
            "labels are what the rules say of continuations"
        )
    right = pc.equal(table["status"], "ok").cast(pa.float64())
    columns = {
        "question_id": table["question_id"],
        "prefix": pa.array(table["sample"].to_numpy() // config.samples, pa.int32()),
        "right": pc.if_else(has_verdict(table), right, pa.scalar(None, pa.float64())),
    }
    estimate = {"existence": "max", "share": "mean"}[config.estimate]
    grouped = pa.table(columns).group_by(_PREFIX, use_threads=False)
    found = grouped.aggregate([("right", estimate), ("right", "count", pc.CountOptions("all"))])
    for row in np.flatnonzero(found["right_count"].to_numpy() != config.samples):
        raise ValueError(
            f"prefix {key_at(found, row, _PREFIX)}: expected {config.samples} continuations, found "
            f"{found['right_count'][int(row)]}; estimate with as many samples as were drawn"
        )
    return found.select(_PREFIX).append_column("estimate", found[f"right_{estimate}"])


def _labelled_steps(labels: pa.Table, prefixes: pa.Table, estimates: pa.Table) -> _Steps:
    """Return the steps of the outputs that have a label, in order.

    Raises:
        JoinError: a step without continuations.
        ValueError: an output whose steps end elsewhere than its tokens; names the row.
    """
    place = pa.array(np.arange(labels.num_rows))
    known = labels.select([*KEY, "label"]).append_column("row", place)
    output = align(prefixes, known, "labels", to="steps", missing=True, extra=True, several=True)
    prefixes, output = prefixes.filter(output["row"].is_valid()), output.filter(output["row"].is_valid())
    continued_S = prefixes["prefix"].is_valid().to_numpy()
    asked = prefixes.filter(prefixes["prefix"].is_valid())
    found = align(asked, estimates, "continuations", to="steps", by=_PREFIX, extra=True, several=True)
    label_S = output["label"].to_numpy().copy()
    label_S[continued_S] = found["estimate"].to_numpy()
    row_S, end_S = output["row"].to_numpy(), prefixes["end"].to_numpy()
    order = np.lexsort((prefixes["step"].to_numpy(), row_S))
    steps = _Steps(row_S[order], end_S[order], label_S[order], continued_S[order])
    last = np.append(np.diff(steps.row_S) > 0, True)[: len(order)]
    length_N = Ragged.of(labels["output_ids"]).lengths
    for row in steps.row_S[last][steps.end_S[last] != length_N[steps.row_S[last]] - 1]:
        raise ValueError(
            f"output {key_at(labels, row)} has {length_N[row]} tokens, its steps end at "
            f"{steps.end_S[steps.row_S == row].tolist()}; were the prefixes cut from others?"
        )
    return steps


def _lists(values: NDArray[Any], length_N: NDArray[np.int64]) -> pa.ListArray:
    """Return a column of lists of these lengths; null where there are no values."""
    offsets = np.concatenate([[0], np.cumsum(length_N)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=pa.array(length_N == 0))


def _estimate_metrics(exact: pa.Table, estimated: pa.Table, steps: _Steps) -> dict[str, float | None]:
    true, made = ([Ragged.of(table[name]) for name in ("step_ends", "step_labels")] for table in (exact, estimated))
    same_N = np.array([len(ends) > 0 and np.array_equal(ends, made[0][row]) for row, ends in enumerate(true[0])], bool)
    agrees = (true[1].values[same_N[true[1].row_of_value]] >= 0.5) == (steps.label_S[same_N[steps.row_S]] >= 0.5)
    shares = {
        "rm/right_steps_share": steps.label_S,
        "rm/unlabelled_outputs": made[0].null,
        "rm/step_agreement": agrees,
        "rm/continued_step_agreement": agrees[steps.continued_S[same_N[steps.row_S]]],
    }
    return {name: fmean(values.tolist()) if len(values) else None for name, values in shares.items()}
