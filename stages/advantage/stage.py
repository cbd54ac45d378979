"""The advantage stage: tables in, one kernel, table out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, assert_never

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.stage import record_metrics, stage
from stages.advantage.config import (
    AdvantageConfig,
    BatchConfig,
    CorrectConfig,
    GAEConfig,
    GroupConfig,
    OneConfig,
    PairsConfig,
    TeacherConfig,
)
from stages.advantage.estimates import (
    Estimate,
    batch_advantages,
    critic_advantages,
    group_advantages,
    nearer_to_teacher,
    one_everywhere,
    one_where_right,
    pair_advantages,
    require_steps,
)
from stages.advantage.inputs import Exploration, Outputs, Scored, read_exploration, read_outputs, read_rewards
from stages.reward_metrics import RewardMetric
from stages.tables import Advantages, Logprobs, Rewards, Rollouts, Values


@stage(version="3")
def estimate_advantages(
    rewards: Rewards | None,
    outputs: Rollouts,
    config: AdvantageConfig,
    values: Values | None = None,
    logprobs: Logprobs | None = None,
) -> Advantages:
    """Estimate A-hat_{i,t} for every output token, from what `config` says (Algorithm 1, line 9).

    Tokens that an environment wrote are none of the output's: sums, returns and KL pass over them, and their value is 0. A step
    of process supervision ends with the last token of its line that the policy wrote; a line without any is no step.

    Rows come in the order of `outputs`; the other tables are joined by (question_id, sample). A row without reward keeps its
    slot with a null advantage and takes no part in any statistics.

    Args:
        rewards: needed by every kind but `one` and `teacher`.
        values: a critic's values, for kind `gae`.
        logprobs: of policy and reference, where the KL is part of the reward; of policy and teacher, for kind `teacher`.

    Metrics: `reward/frac_masked` (share of rows). Where there are rewards: `reward/frac_all_correct`, `reward/frac_all_wrong`
    (shares of questions). Kind `group`: `reward/std_within_group` (mean over questions) and `reward/frac_degenerate_groups`;
    with process supervision both are of step rewards, and `reward/steps_mean` counts the steps of an output. KL in the
    reward: `reward/kl_penalty`, the mean of beta * sum_t k1_t. Kind `pairs`: `reward/pairs`.

    Raises:
        ValueError: rows of one table that another lacks, incomplete groups, numbers that are not finite, rewards of two
            models in one group, steps outside their output, or a table that `config` needs and was not given; names the rows.
    """
    tables = read_exploration(outputs, rewards, values, logprobs)
    if isinstance(config, GroupConfig):
        require_steps(tables.rewards, config)
    return Advantages.write(advantages_of([tables] if _compares_all(config) else tables.chunks(), config))


def _compares_all(config: AdvantageConfig) -> bool:
    """Return whether a value depends on outputs of other questions."""
    return isinstance(config, BatchConfig) or (isinstance(config, GAEConfig) and config.whiten == "batch")


def advantages_of(chunks: Iterable[Exploration], config: AdvantageConfig) -> Iterator[pa.Table]:
    """Yield the table, a chunk at a time; record the metrics at its end."""
    means: dict[str, list[NDArray[Any]]] = {}
    pairs = 0
    for chunk in chunks:
        outputs = read_outputs(chunk.outputs)
        scored = None if chunk.rewards is None else read_rewards(chunk.rewards, outputs)
        estimate = _estimate(outputs, scored, chunk, config)
        answers = {} if scored is None else _answer_shares(outputs, scored)
        for name, values in (answers | estimate.means | {RewardMetric.MASKED: estimate.masked_N}).items():
            means.setdefault(name, []).append(values)
        yield _table(outputs, estimate, pairs)
        pairs += 0 if estimate.pair_N is None else int(estimate.pair_N.max()) + 1
    metrics = {name: float(np.concatenate(values).mean()) for name, values in means.items()}
    record_metrics(metrics | ({RewardMetric.PAIRS: pairs} if isinstance(config, PairsConfig) else {}))


def _estimate(outputs: Outputs, scored: Scored | None, chunk: Exploration, config: AdvantageConfig) -> Estimate:
    if isinstance(config, OneConfig):
        return one_everywhere(outputs)
    if isinstance(config, TeacherConfig):
        return nearer_to_teacher(outputs, chunk.logprobs)
    if scored is None:
        raise ValueError(f"advantage kind {config.kind} is made from rewards; pass `rewards` (made by score)")
    match config:
        case CorrectConfig():
            return one_where_right(outputs, scored)
        case GroupConfig():
            return group_advantages(outputs, scored, chunk.logprobs, config)
        case BatchConfig():
            return batch_advantages(outputs, scored, chunk.logprobs, config)
        case GAEConfig():
            return critic_advantages(outputs, scored, chunk.values, chunk.logprobs, config)
        case PairsConfig():
            return pair_advantages(outputs, scored)
        case _:
            assert_never(config)


def _answer_shares(outputs: Outputs, scored: Scored) -> dict[str, NDArray[Any]]:
    """Return whether all outputs of a question are right, and whether none is."""
    right_Q = np.bincount(outputs.group_N, weights=scored.right_N) / np.bincount(outputs.group_N)
    return {RewardMetric.ALL_CORRECT: right_Q == 1, RewardMetric.ALL_WRONG: right_Q == 0}


def _table(outputs: Outputs, estimate: Estimate, pairs: int) -> pa.Table:
    """Return the rows of `outputs`, with `pairs` preferences numbered before theirs."""
    pair_N = np.full(len(outputs.length_N), -1) if estimate.pair_N is None else estimate.pair_N
    columns = {
        "question_id": outputs.table["question_id"],
        "sample": outputs.table["sample"],
        "advantage": _column(outputs, estimate.advantage_M, estimate.masked_N),
        "returns": _column(outputs, estimate.return_M, estimate.masked_N),
        "pair": pa.array(pair_N + pairs, pa.int32(), mask=pair_N < 0),
    }
    return pa.table(columns)


def _column(outputs: Outputs, values_M: NDArray[np.float64] | None, masked_N: NDArray[np.bool_]) -> pa.Array:
    """Return the values of each row's ids as an Arrow list column, null for a masked row."""
    if values_M is None:
        return pa.nulls(len(outputs.length_N), pa.list_(pa.float32()))
    offsets = np.concatenate([[0], np.cumsum(np.where(masked_N, 0, outputs.ids_N))]).astype(np.int32)
    kept = outputs.of_ids(values_M)[np.repeat(~masked_N, outputs.ids_N)].astype(np.float32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(kept), mask=pa.array(masked_N))
