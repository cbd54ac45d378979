"""Every table that stages exchange, on one page: the whole data flow at a glance.

    Questions ──> rollout ──> Rollouts ──> score ──> Rewards ──> estimate_advantages ──> Advantages ──> update_policy
        │                     │  │  │                   │              ^     ^                └──────> update_critic
        │                     │  │  └── estimate_values ── Values ─────┘     │            (PPO only)
        │                     │  └───── compare_policies ── Logprobs ────────┘    (where KL is part of the reward)
        │                     ├──────── score_reference ── ReferenceLogprobs ──> update_policy   (reference_pass: stage)
    Demonstrations ──> SFT    ├─────────────────────────┼────────────────────────> evaluate ──> Evaluation
                              │                         └── count_votes ── Votes ─────^
                              └── label_outputs ── RewardLabels ──> train_reward_model ──> score_outputs ──> Rewards

Step labels without a checker (Monte-Carlo completion), between label_outputs and train_reward_model:

    Rollouts ──> cut_into_prefixes ── StepPrefixes ──> continue_outputs ── Rollouts ──> score ── Rewards ──┐
                                          └────────────────────── RewardLabels ──> estimate_step_labels ───┴──> RewardLabels

Outputs of several turns, where an environment answers them:

    Rollouts ──> answer_calls ── ToolCalls ──> continue_dialogues ── Rollouts ──> ...

The questions of a step, where a curriculum chooses them:

    Questions, Rewards of earlier steps ──> draw_from_band ──> Questions

A row is keyed by `question_id` and, below a question, by `sample` (0 .. G-1); stages join by key, never by position. Ids are
the truth: what was sampled is `output_ids`; `text` is for people and for rewards that read text.
"""

from __future__ import annotations

import hashlib
from typing import Final

import pyarrow as pa

from pipeline.artifact import Table

VERDICTS: Final = ("ok", "wrong", "unparseable", "truncated")
"""The statuses of `Rewards` that are a verdict of the rules on an output; the others say why there is none."""


def has_verdict(rewards: pa.Table) -> pa.ChunkedArray:
    """Return whether the rules have a verdict on each output and a reward for it."""
    import pyarrow.compute as pc

    return pc.and_(rewards["reward"].is_valid(), pc.is_in(rewards["status"], pa.array(VERDICTS)))


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


_SPANS = pa.list_(pa.struct([_required("start", pa.int32()), _required("end", pa.int32())]))
_KEY = [_required("question_id", pa.string()), _required("sample", pa.int32())]


class Questions(Table):
    """Questions with their gold answers; `solution` where the data set has one."""

    schema = pa.schema(
        [
            _required("question_id", pa.string()),
            _required("question", pa.string()),
            _required("answer", pa.string()),
            pa.field("solution", pa.string()),
        ]
    )


class Demonstrations(Table):
    """Supervised examples: a question and one completion; `author` names its origin. A question may have several.

    `observed` has the parts of a completion, [start, end) in characters and in order, that an environment wrote: they are not
    imitated. Null: none.
    """

    optional = ("observed",)
    schema = pa.schema(
        [
            _required("question_id", pa.string()),
            _required("question", pa.string()),
            _required("completion", pa.string()),
            pa.field("author", pa.string()),
            pa.field("observed", _SPANS),
        ]
    )


class Solutions(Table):
    """Solutions that others wrote, several of a question, with its gold answer.

    `author` names who wrote it, `label` says whether the file itself calls it right; each is null where the file is silent.
    """

    schema = pa.schema(
        [
            *_KEY,
            _required("question", pa.string()),
            _required("answer", pa.string()),
            _required("solution", pa.string()),
            pa.field("author", pa.string()),
            pa.field("label", pa.bool_()),
        ]
    )


class Rollouts(Table):
    """Sampled outputs o_i of a policy, G per question; or demonstrations in their place, one per question.

    `logprobs` are the engine's own, of the distribution it sampled from (at `temperature`), one per output id; null where no
    engine sampled the row (a demonstration). The sampled end-of-sequence token is part of `output_ids`. `text_ends` has, for
    each output id, the length of `text` once that id is decoded: how a place in the text becomes the index of a token.
    `finish_reason` is `stop` or `length`; `call` while an output waits for its environment's answer. `seed` made this very row.

    `turns` has the parts of `output_ids` that the policy wrote, [start, end) each, in order; what lies between them the
    environment wrote (observations), and it has no log-probability: those elements of `logprobs` are null. A row without turns
    (null) is the policy's as a whole.
    """

    optional = ("turns",)

    schema = pa.schema(
        [
            *_KEY,
            _required("prompt_ids", pa.list_(pa.int32())),
            _required("output_ids", pa.list_(pa.int32())),
            pa.field("logprobs", pa.list_(pa.float32())),
            _required("finish_reason", pa.string()),
            _required("text", pa.string()),
            _required("text_ends", pa.list_(pa.int32())),
            _required("temperature", pa.float32()),
            _required("seed", pa.int64()),
            pa.field("turns", _SPANS),
        ]
    )


class ToolCalls(Table):
    """Calls that outputs made to their environment, with what it answered: one row per turn that ended in a call.

    `input` is what was called with (a program, an expression), `output` what it came to, `observation` the text that the
    policy reads, markers and cuts included. `status`: `ok`, `error`, `timeout`, `memory`, `refused`. `done` says that the
    environment ends the output with this answer. How long calls took is among the metrics: a table's content names it.
    """

    schema = pa.schema(
        [
            *_KEY,
            _required("turn", pa.int32()),
            _required("tool", pa.string()),
            _required("input", pa.string()),
            _required("output", pa.string()),
            _required("observation", pa.string()),
            _required("status", pa.string()),
            _required("done", pa.bool_()),
        ]
    )


class Rewards(Table):
    """One row per output, always. `reward` is null where there is no score (never 0 for it); `status` says why.

    `status`: `ok` (right answer), `wrong`, `unparseable`, `truncated`, `timeout`, `error`; `unjudged` where a model scored and
    no rule looked. `components` holds the score of each named component before weighting, null where it abstained.

    Process supervision (DeepSeekMath, 4.1.3): `step_rewards` holds r^index(j) of each step j, `step_ends` index(j), the place
    of the step's last token in `output_ids`; both null where outputs are scored as a whole. `scorer` is the digest of the
    reward model, null for rules: rewards of two models never meet in one group.
    """

    schema = pa.schema(
        [
            *_KEY,
            pa.field("reward", pa.float64()),
            _required("status", pa.string()),
            pa.field("extracted", pa.string()),
            _required("components", pa.map_(pa.string(), pa.float64())),
            pa.field("step_rewards", pa.list_(pa.float64())),
            pa.field("step_ends", pa.list_(pa.int32())),
            pa.field("scorer", pa.string()),
        ]
    )


class Values(Table):
    """V(q, o_<t) of a critic: the value before each output token, one per output id."""

    schema = pa.schema([*_KEY, _required("value", pa.list_(pa.float32()))])


class Logprobs(Table):
    """log pi(o_t | q, o_<t) of the outputs under two policies, in nats, at the temperature they were sampled at."""

    schema = pa.schema(
        [*_KEY, _required("policy", pa.list_(pa.float32())), _required("reference", pa.list_(pa.float32()))]
    )


class ReferenceLogprobs(Table):
    """log pi_ref(o_t | q, o_<t) of the outputs under the reference, in nats, at the temperature they were sampled at."""

    schema = pa.schema([*_KEY, _required("reference", pa.list_(pa.float32()))])


class Advantages(Table):
    """A-hat_{i,t}: one value per output token; null where the row is masked out of the loss.

    `returns` (PPO only) is what the critic shall predict before each token. `pair` (DPO only) numbers the preference that the
    row belongs to: its advantage is +1 in the preferred output, -1 in the other.
    """

    schema = pa.schema(
        [
            *_KEY,
            pa.field("advantage", pa.list_(pa.float32())),
            pa.field("returns", pa.list_(pa.float32())),
            pa.field("pair", pa.int32()),
        ]
    )


class Votes(Table):
    """Per question: what its samples vote for; right answers vote together, wrong ones by meaning, not by spelling.

    `wrong` counts the samples of each distinct wrong answer, most first; null where what they answered is not known. The other
    samples - correct - sum(wrong) samples stated no answer, or have no verdict, and do not vote.
    """

    schema = pa.schema(
        [
            _required("question_id", pa.string()),
            _required("samples", pa.int32()),
            _required("correct", pa.int32()),
            pa.field("wrong", pa.list_(pa.int32())),
        ]
    )


class Evaluation(Table):
    """Per question: how many of its samples are right, and whether their majority vote is (null where votes are not known)."""

    schema = pa.schema(
        [
            _required("question_id", pa.string()),
            _required("samples", pa.int32()),
            _required("correct", pa.int32()),
            pa.field("majority_correct", pa.bool_()),
            _required("status_counts", pa.map_(pa.string(), pa.int32())),
        ]
    )


class RewardLabels(Table):
    """What a reward model learns from: outputs of policies with the verdict of the rules, one row per labelled output.

    `label` is 1 for a right answer, 0 for any other. `scored_index` names the token of `output_ids` at which the output's score
    is read. `step_ends` and `step_labels` (share of credit of each step, 0 to 1) are null where there are no process labels.
    `origin` is the digest of the policy that sampled the row, `vocabulary` that of the tokens its ids stand for.
    """

    schema = pa.schema(
        [
            *_KEY,
            _required("prompt_ids", pa.list_(pa.int32())),
            _required("output_ids", pa.list_(pa.int32())),
            _required("scored_index", pa.int32()),
            _required("label", pa.float64()),
            pa.field("step_ends", pa.list_(pa.int32())),
            pa.field("step_labels", pa.list_(pa.float64())),
            _required("origin", pa.string()),
            _required("vocabulary", pa.string()),
        ]
    )


class StepPrefixes(Table):
    """From where the steps of outputs are continued (Math-Shepherd): one row per step of each output that is to be labelled.

    `step` counts the steps of an output from 0; `end` is index(j), the place of the step's last token in `output_ids`. `prefix`
    numbers the distinct prefixes of a question, which are what its outputs begin with, up to and including `end`: equal ones
    share a number and are continued once. It is null where the output itself ends: what the output comes to is known.
    """

    schema = pa.schema(
        [*_KEY, _required("step", pa.int32()), _required("end", pa.int32()), pa.field("prefix", pa.int32())]
    )


class RewardGauges(Table):
    """How a reward model's scores stand to the rules' verdicts: one row per gauge, null where it is undefined.

    `low` and `high` bound the 95 % interval of the gauges that have one; `rows` says from how many rows it was computed.
    """

    schema = pa.schema(
        [
            _required("gauge", pa.string()),
            pa.field("value", pa.float64()),
            pa.field("low", pa.float64()),
            pa.field("high", pa.float64()),
            _required("rows", pa.int32()),
        ]
    )


# ------------------------------------------------------------------------------------------------ questions by their text


class DataError(ValueError):
    """A data set that cannot be used; names the file, the row and the column at fault."""


def identify(question: str) -> str:
    """An id made from the question's text: 16 hexadecimal digits of its sha256, so that equal questions share it.

    64 bits: the chance that any two of a million questions collide is 3e-8, and a collision is refused as a duplicate.
    """
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def is_held_out(text: str, share: float) -> bool:
    """Whether `text` belongs to the held-out part, which holds about `share` of all texts.

    A function of the text alone: whatever order, seed or count a set is made with, train and held-out share nothing.
    """
    # A prefix of its own keeps the split independent of the ids, which hash the text itself.
    point = int.from_bytes(hashlib.sha256(b"split:" + text.encode()).digest()[:8], "big")
    return point < share * 2**64
