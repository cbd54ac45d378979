"""Replay: fresh labels with a sample of earlier ones, so that a reward model keeps what it learned (DeepSeekMath, 4.1.4)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import assert_never

import pyarrow as pa

from pipeline.stage import record_metrics, stage
from stages.reward_training.config import ReplayConfig
from stages.tables import RewardLabels

__all__ = ["mix_with_history"]


@stage(version="1")
def mix_with_history(
    fresh: RewardLabels, history: list[RewardLabels], config: ReplayConfig, *, seed: int
) -> RewardLabels:
    """All fresh labels, then n of the history.

        n = share / (1 - share) * fresh rows    or    share * history rows        (`share_of`), rounded, all there are at most

    Questions are drawn at random with all their rows of one table, the last one perhaps in part: single rows would seldom
    bring a right and a wrong output of one question, and there would be no pairs to compare.

    Args:
        fresh: labels of the current policy's outputs.
        history: the *fresh* labels of earlier iterations, oldest first; not their mixtures, which would count replayed rows
            twice.
        seed: draws the sample.

    Metrics: `rm/fresh`, `rm/replayed`, `rm/history` (rows), `rm/replayed_share` (of the mixture), and `rm/replayed_from_<i>`
    for each table of the history.

    Raises:
        ValueError: labels of another vocabulary in the history.
    """
    tables = [fresh.read(), *(part.read() for part in history)]
    _check_vocabulary(tables)
    pool = [(source, group) for source, table in enumerate(tables[1:], start=1) for group in _questions(table)]
    wanted = _wanted(config, fresh=tables[0].num_rows, old=sum(table.num_rows for table in tables[1:]))
    taken: dict[int, list[int]] = {source: [] for source in range(1, len(tables))}
    uniform = random.Random(f"replay/{seed}").random
    for source, group in sorted(pool, key=lambda _: uniform()):
        left = wanted - sum(map(len, taken.values()))
        taken[source] += group[:left]
    replayed = {source: pa.array(sorted(rows), pa.int64()) for source, rows in taken.items()}
    record_metrics(
        {
            "rm/fresh": tables[0].num_rows,
            "rm/replayed": wanted,
            "rm/replayed_share": wanted / max(wanted + tables[0].num_rows, 1),
            "rm/history": sum(table.num_rows for table in tables[1:]),
            **{f"rm/replayed_from_{source - 1}": len(rows) for source, rows in replayed.items()},
        }
    )
    return RewardLabels.write(pa.concat_tables([tables[0], *(tables[s].take(rows) for s, rows in replayed.items())]))


def _wanted(config: ReplayConfig, *, fresh: int, old: int) -> int:
    match config.share_of:
        case "training_set":
            wanted = config.share / (1 - config.share) * fresh
        case "old_pool":
            wanted = config.share * old
        case _:
            assert_never(config.share_of)
    return min(round(wanted), old)


def _questions(table: pa.Table) -> list[list[int]]:
    """Row numbers of each question."""
    groups: dict[str, list[int]] = {}
    for row, question_id in enumerate(table["question_id"].to_pylist()):
        groups.setdefault(question_id, []).append(row)
    return list(groups.values())


def _check_vocabulary(tables: Sequence[pa.Table]) -> None:
    found = {name for table in tables for name in table["vocabulary"].to_pylist()}
    if len(found) > 1:
        raise ValueError(
            f"labels of {len(found)} vocabularies; the ids of one mean other tokens in another: replay only what policies with "
            "the current policy's tokenizer sampled"
        )
