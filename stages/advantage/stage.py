"""The advantage stage: tables in, one kernel, table out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, assert_never

from pipeline.stage import record_metrics, stage
from stages.advantage.batch import batch_advantages
from stages.advantage.chunks import Exploration, read_exploration
from stages.advantage.config import (
    AdvantageConfig,
    BatchConfig,
    CorrectConfig,
    GAEConfig,
    GroupConfig,
    OneConfig,
    PairsConfig,
)
from stages.advantage.critic import critic_advantages
from stages.advantage.estimate import Estimate, answer_shares
from stages.advantage.group import group_advantages, require_steps
from stages.advantage.inputs import Outputs, Scored, read_outputs, read_rewards
from stages.advantage.pairs import pair_advantages
from stages.reward_metrics import RewardMetric
from stages.tables import Advantages, Logprobs, Rewards, Rollouts, Values

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

__all__ = ["advantages_of", "estimate_advantages"]


@stage(version="2")
def estimate_advantages(
    rewards: Rewards | None,
    outputs: Rollouts,
    config: AdvantageConfig,
    values: Values | None = None,
    logprobs: Logprobs | None = None,
) -> Advantages:
    """A-hat_{i,t} for every output token, from what `config` says (Algorithm 1, line 9).

    Rows come in the order of `outputs`; the other tables are joined by (question_id, sample). A row without reward keeps its
    slot with a null advantage and takes no part in any statistics.

    Args:
        rewards: needed by every kind but `one`.
        outputs: what was sampled.
        config: the kind of advantage.
        values: a critic's values, for kind `gae`.
        logprobs: of policy and reference, where the KL is part of the reward.

    Metrics: `reward/frac_masked` (share of rows). Where there are rewards: `reward/frac_all_correct`, `reward/frac_all_wrong`
    (shares of questions). Kind `group`: `reward/std_within_group` (mean over questions) and
    `reward/frac_degenerate_groups`; with process supervision both are of step rewards, and `reward/steps_mean` counts the steps
    of an output. KL in the reward: `reward/kl_penalty`, the mean of beta * sum_t k1_t. Kind `pairs`: `reward/pairs`.

    Raises:
        ValueError: rows of one table that another lacks, incomplete groups, numbers that are not finite, rewards of two models
            in one group, steps outside their output, or a table that `config` needs and nobody gave; names the rows.
    """
    tables = read_exploration(outputs, rewards, values, logprobs)
    if isinstance(config, GroupConfig):
        require_steps(tables.rewards, config)
    return Advantages.write(advantages_of([tables] if _compares_all(config) else tables.chunks(), config))


def _compares_all(config: AdvantageConfig) -> bool:
    """Whether a value depends on outputs of other questions."""
    return isinstance(config, BatchConfig) or (isinstance(config, GAEConfig) and config.whiten == "batch")


def advantages_of(chunks: Iterable[Exploration], config: AdvantageConfig) -> Iterator[pa.Table]:
    """The table, a chunk at a time; the metrics at its end."""
    import numpy as np

    means: dict[str, list[NDArray[Any]]] = {}
    pairs = 0
    for chunk in chunks:
        outputs = read_outputs(chunk.outputs)
        scored = None if chunk.rewards is None else read_rewards(chunk.rewards, outputs)
        estimate = _estimate(outputs, scored, chunk, config)
        answers = {} if scored is None else answer_shares(outputs, scored)
        for name, values in (answers | estimate.means | {RewardMetric.MASKED: estimate.masked_N}).items():
            means.setdefault(name, []).append(values)
        yield _table(outputs, estimate, pairs)
        pairs += max((pair + 1 for pair in estimate.pair_N or () if pair is not None), default=0)
    metrics = {name: float(np.concatenate(values).mean()) for name, values in means.items()}
    record_metrics(metrics | ({RewardMetric.PAIRS: pairs} if isinstance(config, PairsConfig) else {}))


def _estimate(outputs: Outputs, scored: Scored | None, chunk: Exploration, config: AdvantageConfig) -> Estimate:
    if isinstance(config, OneConfig):
        return _everywhere_one(outputs)
    if scored is None:
        raise ValueError(f"advantage kind {config.kind} is made from rewards; pass `rewards` (made by score)")
    match config:
        case CorrectConfig():
            return _one_where_right(outputs, scored)
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


def _everywhere_one(outputs: Outputs) -> Estimate:
    import numpy as np

    return Estimate(np.ones(outputs.length_N.sum()), np.zeros(len(outputs.length_N), dtype=bool))


def _one_where_right(outputs: Outputs, scored: Scored) -> Estimate:
    import numpy as np

    return Estimate(np.repeat(scored.right_N.astype(np.float64), outputs.length_N), np.isnan(scored.reward_N))


def _table(outputs: Outputs, estimate: Estimate, pairs: int) -> pa.Table:
    """The rows of `outputs`, with `pairs` preferences numbered before theirs."""
    import pyarrow as pa

    numbers = None if estimate.pair_N is None else [n if n is None else n + pairs for n in estimate.pair_N]
    columns = {
        "question_id": outputs.table["question_id"],
        "sample": outputs.table["sample"],
        "advantage": _column(outputs, estimate.advantage_M, estimate.masked_N),
        "returns": _column(outputs, estimate.return_M, estimate.masked_N),
        "pair": pa.nulls(len(outputs.length_N), pa.int32()) if numbers is None else pa.array(numbers, pa.int32()),
    }
    return pa.table(columns)


def _column(outputs: Outputs, values_M: NDArray[np.float64] | None, masked_N: NDArray[np.bool_]) -> pa.Array:
    """The values of each row's tokens as an Arrow list column, null for a masked row."""
    import numpy as np
    import pyarrow as pa

    if values_M is None:
        return pa.nulls(len(outputs.length_N), pa.list_(pa.float32()))
    offsets = np.concatenate([[0], np.cumsum(np.where(masked_N, 0, outputs.length_N))]).astype(np.int32)
    kept = values_M[np.repeat(~masked_N, outputs.length_N)].astype(np.float32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(kept), mask=pa.array(masked_N))
