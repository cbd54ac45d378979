"""The reward stage: outputs and questions in, one reward row per output out."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, ParamSpec

import numpy as np
import pyarrow as pa

from pipeline.stage import record_metrics, stage
from stages.join import KEY, align, group_rows, require_unique, written_rows
from stages.reward.components import score_component
from stages.reward.composition import (
    ComponentScore,
    Output,
    Part,
    Tally,
    answer_component,
    compose,
    compose_steps,
    outcome_components,
    unlearned_components,
)
from stages.reward.config import ComponentConfig, FormatConfig, FunctionConfig, RewardConfig
from stages.reward.functions import RewardFunctionError
from stages.reward.rules.accuracy import GoldError, read_gold
from stages.reward_metrics import RewardMetric
from stages.tables import Questions, Rewards, Rollouts

CHUNK_ROWS: Final = 4096
"""Outputs that are scored at a time; no verdict depends on which are together. Rewards by functions, and by patterns that may
need processes, see all at once."""

P = ParamSpec("P")


def _as_strict_as_asked(call: Callable[P, Rewards]) -> Callable[P, Rewards]:
    """Refuse rewards of the store that were written under a larger `max_errors`, which is not part of the key."""
    signature = inspect.signature(call)

    @functools.wraps(call)
    def strict(*args: P.args, **kwargs: P.kwargs) -> Rewards:
        rewards = call(*args, **kwargs)
        limit = signature.bind(*args, **kwargs).arguments["config"].max_errors
        share = rewards.metrics.get(RewardMetric.FAILED, 0.0)
        if share > limit:
            raise RewardFunctionError(
                f"the stored rewards {rewards} were written under a larger reward.max_errors: a function failed on {share:.3g} "
                f"of the outputs, and {limit:g} may be. `cohort forget {rewards.digest[:12]}`, and the same command asks again"
            )
        return rewards

    return strict


@_as_strict_as_asked
@stage(version="9")
def score(outputs: Rollouts, questions: Questions, config: RewardConfig) -> Rewards:
    """Score every output o_i of every question by rules and functions, as a whole and, with a component `steps`, line by line.

    The status is that of the first component that reads the answer, else of the first; one that only scores says `ok` above 0.
    Process supervision: rewards of steps are their labels, and at the last one also what is known of the output as a whole but
    its answer (`outcome_components`, `compose_steps`).

    Metrics: `reward/mean`, `reward/<component>` (means over rows that have a score; of `steps` over all steps),
    `reward/status_<status>`, `reward/screened`, `reward/missing` (shares of all rows), `reward/faults` (components that timed
    out or failed, per row), `reward/failed` (share of rows that one function failed on, the largest).

    Raises:
        ConfigError: a reward function that is not there, cannot be called, or answers with no list of scores.
        RewardFunctionError: a reward function that failed on more outputs than `config.max_errors` allows.
        ValueError: a rollout of a question that `questions` does not have, a repeated row, a score that is not finite.
        GoldError: a question without an answer, by its id.
        DataError: step rewards of a question that is not of the built-in world.
    """
    table = outputs.read([*KEY, "finish_reason", "text", "text_ends", "output_ids", "turns"])
    asked = _questions_of(table, questions)
    size = table.num_rows if _scores_together(config) else CHUNK_ROWS
    return Rewards.write(_parts((_read(chunk, asked) for chunk in _chunks(table, size)), config))


def _scores_together(config: RewardConfig) -> bool:
    """Return whether a component has a pool of processes with its patience for the whole batch, or wants to see all of it."""
    return any(
        isinstance(part, FunctionConfig) or (isinstance(part, FormatConfig) and part.form == "pattern")
        for part in config.components
    )


def _chunks(table: pa.Table, size: int) -> Iterator[pa.Table]:
    for start in range(0, table.num_rows, max(size, 1)):
        yield table.slice(start, size)


def _parts(chunks: Iterable[list[Output]], config: RewardConfig) -> Iterator[dict[str, Any]]:
    """Yield the table, a chunk at a time, and record the metrics at its end."""
    tally = _tally([], config.components)
    whole = outcome_components(config)
    for rows in chunks:
        columns = {component.name: score_component(rows, component, config) for component in config.components}
        rewards = [_reward({name: column[i] for name, column in columns.items()}, config) for i in range(len(rows))]
        _require_finite(rewards, rows)
        shown = columns[answer_component(config).name]
        statuses = [result.status or ("ok" if result.score else "wrong") for result in shown]
        # At most one component cuts outputs into steps.
        steps = [
            next((column[i].steps for column in columns.values() if column[i].steps), None) for i in range(len(rows))
        ]
        tally.take(rewards, statuses, columns)
        yield {
            "question_id": [row.question_id for row in rows],
            "sample": [row.sample for row in rows],
            "reward": rewards,
            "status": statuses,
            "extracted": [result.extracted for result in shown],
            "components": [[(name, column[i].score) for name, column in columns.items()] for i in range(len(rows))],
            **_steps(
                [(each.rewards, each.ends) if each else None for each in steps],
                [[_part(columns[part.name][i], part) for part in whole] for i in range(len(rows))],
                weight=1.0,
            ),
            "scorer": [None] * len(rows),
        }
    record_metrics(tally.metrics())


def _require_finite(rewards: Sequence[float | None], rows: Sequence[Output]) -> None:
    for reward, row in zip(rewards, rows, strict=True):
        if reward is not None and not math.isfinite(reward):
            raise ValueError(
                f"the reward of ({row.question_id!r}, {row.sample}) is {reward}: its weighted components add up to no finite "
                "number; score, or weigh, on a smaller scale"
            )


def _tally(scored: Sequence[str], components: Sequence[ComponentConfig]) -> Tally:
    functions = [component.name for component in components if isinstance(component, FunctionConfig)]
    return Tally([*scored, *(component.name for component in components)], functions)


def _part(result: ComponentScore, component: ComponentConfig) -> Part:
    return Part(result.score, component.weight, component.missing)


def _steps(
    steps: Sequence[tuple[Sequence[float], Sequence[int]] | None], others: Sequence[Sequence[Part]], *, weight: float
) -> dict[str, list[Any]]:
    """Return the columns of process supervision: the rewards of steps with the part of the whole, and where steps end."""
    rewards = [
        compose_steps(each[0], weight, parts) if each else None for each, parts in zip(steps, others, strict=True)
    ]
    ends = [each[1] if each and reward is not None else None for each, reward in zip(steps, rewards, strict=True)]
    return {"step_rewards": rewards, "step_ends": ends}


@_as_strict_as_asked
@stage(version="2")
def combine_rewards(
    scores: Rewards, outputs: Rollouts, questions: Questions, config: RewardConfig, *, weight: float, bounded: bool
) -> Rewards:
    """Combine the scores of reward models with the components that say something else, in the order of `outputs`.

        r = w s_model + sum_k w_k s_k

    The sum is over all components but those whose verdicts the model has learned to give (`unlearned_components`): form,
    language, length, functions. Missing scores count as in `score`. Process supervision: `compose_steps` of the process
    model's scores.

    A truncated output's model score is, by `config.truncated`: `as_is` what the model says; `no_reward` null, and all of the
    row with it; `as_unparseable` that of an unreadable answer: 0 where scores are probabilities (`bounded`), else the
    lowest of its question's scores. Its steps keep their scores, as under rules they keep their labels.

    Args:
        scores: made by `score_outputs`, with status and answer by the rules.
        outputs: the same outputs.
        questions: theirs.
        config: components and their weights, and what truncation does.
        weight: w, of the model's score.
        bounded: whether scores are probabilities.

    Metrics: those of `scores`, with `reward/mean` and `reward/model` as they count; `reward/<component>`; `reward/missing`,
    `reward/faults`, `reward/screened` as in `score`.

    Raises:
        ValueError: an output without a score. As `score`, for the components that are scored here.
    """
    table = outputs.read([*KEY, "finish_reason", "text", "text_ends", "output_ids", "turns"])
    asked = _questions_of(table, questions)
    size = table.num_rows if _scores_together(config) else CHUNK_ROWS
    found = align(table, scores.read(), "scores")
    _, question_N = group_rows(table["question_id"])
    lowest_Q = np.full(question_N.max(initial=-1) + 1, math.inf)
    np.fmin.at(lowest_Q, question_N, found["reward"].to_numpy())
    found = found.append_column("floor", pa.array(np.where(bounded, 0.0, lowest_Q[question_N])))
    parts = unlearned_components(config)
    tally = _tally(["model"], parts)

    def combined() -> Iterator[dict[str, Any]]:
        for chunk, scored in zip(_chunks(table, size), _chunks(found, size), strict=True):
            yield _combined(_read(chunk, asked), scored.to_pylist(), config, parts, weight, tally)
        record_metrics({**scores.metrics, **tally.metrics()})

    return Rewards.write(combined())


def _combined(
    rows: Sequence[Output],
    found: Sequence[Mapping[str, Any]],
    config: RewardConfig,
    parts: Sequence[ComponentConfig],
    weight: float,
    tally: Tally,
) -> dict[str, Any]:
    """Return some rows of the table.

    The column `floor` of `found` is what the model's score of a truncated output counts as under `as_unparseable`.
    """
    columns = {part.name: score_component(rows, part, config) for part in parts}
    whole = [[_part(columns[part.name][i], part) for part in parts] for i in range(len(rows))]
    counted = {"as_is": "reward", "as_unparseable": "floor"}
    names = [counted.get(config.truncated if row.truncated else "as_is") for row in rows]
    model = [None if name is None else score[name] for name, score in zip(names, found, strict=True)]
    rewards = [compose([Part(score, weight, "no_reward"), *whole[i]]) for i, score in enumerate(model)]
    _require_finite(rewards, rows)
    tally.take(
        rewards, [score["status"] for score in found], {"model": [ComponentScore(score) for score in model], **columns}
    )
    said = [dict(score["components"]) for score in found]
    steps = [
        None if model[i] is None or score["step_rewards"] is None else (score["step_rewards"], score["step_ends"])
        for i, score in enumerate(found)
    ]
    return {
        "question_id": [row.question_id for row in rows],
        "sample": [row.sample for row in rows],
        "reward": rewards,
        **{name: [score[name] for score in found] for name in ("status", "extracted", "scorer")},
        "components": [
            [*(said[i] | {"model": model[i]}).items(), *((name, column[i].score) for name, column in columns.items())]
            for i in range(len(rows))
        ],
        **_steps(steps, whole, weight=weight),
    }


def _read(table: pa.Table, asked: pa.Table) -> list[Output]:
    about = align(table, asked, "questions", to="rollouts", by=["question_id"], extra=True, several=True)
    for name in ("question", "answer", "solution"):
        table = table.append_column(name, about[name])
    rows = table.drop_columns("turns").to_pylist()
    for row in rows:
        if len(row["text_ends"]) != len(row["output_ids"]):
            raise ValueError(
                f"rollout ({row['question_id']!r}, {row['sample']}): expected one of text_ends for each of "
                f"{len(row['output_ids'])} tokens, found {len(row['text_ends'])}"
            )
    return [Output(**row, written=written) for row, written in zip(rows, written_rows(table), strict=True)]


def _questions_of(outputs: pa.Table, questions: Questions) -> pa.Table:
    """Return the questions that have outputs; each has a gold answer."""
    require_unique(outputs, "rollouts")
    wanted = pa.table({"question_id": outputs["question_id"].unique()})
    table = questions.read(["question_id", "question", "answer", "solution"])
    asked = align(wanted, table, "questions", to="rollouts", by=["question_id"], extra=True)
    for question_id, answer in zip(asked["question_id"].to_pylist(), asked["answer"].to_pylist(), strict=True):
        try:
            read_gold(answer)
        except GoldError as error:
            raise GoldError(f"question {question_id!r}: {error}") from None
    return asked


def _reward(result: Mapping[str, ComponentScore], config: RewardConfig) -> float | None:
    if all(part.status == "truncated" and part.score is None for part in result.values()):
        return None  # whatever the components declare: the row was taken out as a whole
    return compose([_part(result[c.name], c) for c in config.components])
