"""The reward stage: outputs and questions in, one reward row per output out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from pipeline.stage import record_metrics, stage
from stages.keys import repeated_key
from stages.reward.composition import Part, compose
from stages.reward.config import AccuracyConfig, FormatConfig, FunctionConfig, OverlongConfig, RewardConfig
from stages.reward.judge import Judged, Output, judge
from stages.reward.rules.accuracy import GoldError, read_gold
from stages.reward.tally import STATUSES, Tally
from stages.tables import Questions, Rewards, Rollouts

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["CHUNK_ROWS", "STATUSES", "score"]

CHUNK_ROWS: Final = 4096
"""Outputs that are judged at a time; no verdict depends on which are together. Rewards by functions, and by patterns that may
need processes, see all at once."""

_KEY: Final = ("question_id", "sample")


@stage(version="4")
def score(outputs: Rollouts, questions: Questions, config: RewardConfig) -> Rewards:
    """Score every output o_i of every question by rules and functions, as a whole and, with a component `steps`, line by line.

    The status is that of the first component that reads the answer, else of the first; one that only scores says `ok` above 0.

    Metrics: `reward/mean`, `reward/<component>` (means over rows that have a score; of `steps` over all steps),
    `reward/status_<status>`, `reward/screened`, `reward/missing` (shares of all rows), `reward/faults` (components that timed
    out or failed, per row).

    Raises:
        ConfigError: a reward function that is not there, cannot be called, or answers with no list of scores.
        RewardFunctionError: a reward function that failed on more outputs than `config.max_errors` allows.
        ValueError: a rollout of a question that `questions` does not have, a repeated row, a score that is not finite.
        GoldError: a question without an answer, by its id.
        DataError: step rewards of a question that is not of the built-in world.
    """
    table = outputs.read([*_KEY, "finish_reason", "text", "text_ends", "output_ids"])
    asked = _questions_of(table, questions)
    size = table.num_rows if _judges_together(config) else CHUNK_ROWS
    return Rewards.write(_parts((_read(chunk, asked) for chunk in _chunks(table, size)), config))


def _judges_together(config: RewardConfig) -> bool:
    """Whether a component has a pool of processes with its patience for the whole batch, or wants to see all of it."""
    return any(
        isinstance(part, FunctionConfig) or (isinstance(part, FormatConfig) and part.form == "pattern")
        for part in config.components
    )


def _chunks(table: pa.Table, size: int) -> Iterator[pa.Table]:
    for start in range(0, table.num_rows, max(size, 1)):
        yield table.slice(start, size)


def _parts(chunks: Iterable[list[Output]], config: RewardConfig) -> Iterator[dict[str, Any]]:
    """The table, a chunk at a time; the metrics at its end."""
    tally = Tally([component.name for component in config.components])
    for rows in chunks:
        columns = {component.name: judge(rows, component, config) for component in config.components}
        rewards = [_reward({name: column[i] for name, column in columns.items()}, config) for i in range(len(rows))]
        shown = columns[_shown(config)]
        statuses = [judged.status or ("ok" if judged.score else "wrong") for judged in shown]
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
            "extracted": [judged.extracted for judged in shown],
            "components": [[(name, column[i].score) for name, column in columns.items()] for i in range(len(rows))],
            "step_rewards": [each and each.rewards for each in steps],
            "step_ends": [each and each.ends for each in steps],
            "scorer": [None] * len(rows),
        }
    record_metrics(tally.metrics())


def _read(table: pa.Table, asked: Mapping[str, Mapping[str, Any]]) -> list[Output]:
    rows = table.to_pylist()
    for row in rows:
        if len(row["text_ends"]) != len(row["output_ids"]):
            raise ValueError(
                f"rollout ({row['question_id']!r}, {row['sample']}): expected one of text_ends for each of "
                f"{len(row['output_ids'])} tokens, found {len(row['text_ends'])}"
            )
    return [
        Output(
            question_id=row["question_id"],
            sample=row["sample"],
            question=asked[row["question_id"]]["question"],
            gold=asked[row["question_id"]]["answer"],
            solution=asked[row["question_id"]]["solution"],
            text=row["text"],
            output_ids=row["output_ids"],
            text_ends=row["text_ends"],
            finish_reason=row["finish_reason"],
        )
        for row in rows
    ]


def _questions_of(outputs: pa.Table, questions: Questions) -> Mapping[str, Mapping[str, Any]]:
    """Rows of `questions` by id; those that have outputs have a gold answer."""
    twice = repeated_key(outputs)
    if twice:
        raise ValueError(f"rollouts hold {twice} more than once; a row is one (question_id, sample)")
    table = questions.read(["question_id", "question", "answer", "solution"])
    asked = {row["question_id"]: row for row in table.to_pylist()}
    if len(asked) < table.num_rows:
        raise ValueError("questions hold a question_id more than once")
    wanted = outputs["question_id"].unique().to_pylist()
    unknown = [question_id for question_id in wanted if question_id not in asked]
    if unknown:
        raise ValueError(
            f"rollouts of {len(unknown)} questions that are not in the table, first {unknown[0]!r}; "
            "score with the questions that were sampled"
        )
    for question_id in wanted:
        try:
            read_gold(asked[question_id]["answer"])
        except GoldError as error:
            raise GoldError(f"question {question_id!r}: {error}") from None
    return asked


def _shown(config: RewardConfig) -> str:
    """Name of the component whose status is the row's."""
    reading = [component for component in config.components if not isinstance(component, OverlongConfig)]
    return next((c.name for c in reading if isinstance(c, AccuracyConfig)), reading[0].name)


def _reward(judged: Mapping[str, Judged], config: RewardConfig) -> float | None:
    if all(part.status == "truncated" and part.score is None for part in judged.values()):
        return None  # whatever the components declare: the row was taken out as a whole
    return compose([Part(judged[c.name].score, c.weight, c.missing) for c in config.components])
