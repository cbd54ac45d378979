"""The advantage stage: tables in, one kernel, table out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_never

from pipeline.stage import record_metrics, stage
from stages.advantage.batch import batch_advantages
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
from stages.advantage.estimate import Estimate, answer_metrics
from stages.advantage.group import group_advantages
from stages.advantage.inputs import Outputs, Scored, read_outputs, read_rewards
from stages.advantage.pairs import pair_advantages
from stages.tables import Advantages, Logprobs, Rewards, Rollouts, Values

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["estimate_advantages"]


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
    read = read_outputs(outputs)
    scored = None if rewards is None else read_rewards(rewards, read)
    estimate = _estimate(read, scored, config, values, logprobs)
    answers = {} if scored is None else answer_metrics(read, scored)
    record_metrics(answers | estimate.metrics | {"reward/frac_masked": float(estimate.masked_N.mean())})
    return Advantages.write(
        {
            "question_id": [question_id for question_id, _ in read.keys],
            "sample": [sample for _, sample in read.keys],
            "advantage": _column(read, estimate.advantage_M, estimate.masked_N),
            "returns": _column(read, estimate.return_M, estimate.masked_N),
            "pair": estimate.pair_N or [None] * len(read.keys),
        }
    )


def _estimate(
    outputs: Outputs, scored: Scored | None, config: AdvantageConfig, values: Values | None, logprobs: Logprobs | None
) -> Estimate:
    if isinstance(config, OneConfig):
        return _everywhere_one(outputs)
    if scored is None:
        raise ValueError(f"advantage kind {config.kind} is made from rewards; pass `rewards` (made by score)")
    match config:
        case CorrectConfig():
            return _one_where_right(outputs, scored)
        case GroupConfig():
            return group_advantages(outputs, scored, logprobs, config)
        case BatchConfig():
            return batch_advantages(outputs, scored, logprobs, config)
        case GAEConfig():
            return critic_advantages(outputs, scored, values, logprobs, config)
        case PairsConfig():
            return pair_advantages(outputs, scored)
        case _:
            assert_never(config)


def _everywhere_one(outputs: Outputs) -> Estimate:
    import numpy as np

    return Estimate(np.ones(outputs.length_N.sum()), np.zeros(len(outputs.keys), dtype=bool))


def _one_where_right(outputs: Outputs, scored: Scored) -> Estimate:
    import numpy as np

    return Estimate(np.repeat(scored.right_N.astype(np.float64), outputs.length_N), np.isnan(scored.reward_N))


def _column(outputs: Outputs, values_M: NDArray[np.float64] | None, masked_N: NDArray[np.bool_]) -> Any:
    """The values of each row's tokens as an Arrow list column, null for a masked row."""
    import numpy as np
    import pyarrow as pa

    if values_M is None:
        return [None] * len(outputs.keys)
    offsets = np.concatenate([[0], np.cumsum(np.where(masked_N, 0, outputs.length_N))]).astype(np.int32)
    kept = pa.array(values_M[~masked_N[outputs.output_of_token]].astype(np.float32))
    return pa.ListArray.from_arrays(pa.array(offsets), kept, mask=pa.array(masked_N))
