"""What an update says of the rollout engine: against log-probabilities that differ from the trainer's by known amounts."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from pipeline.residency import evict
from pipeline.store import Store
from stages.models import Checkpoint, load_model
from stages.tables import Advantages, Rollouts
from stages.update import (
    GRPOConfig,
    MismatchError,
    MismatchLimits,
    OnlineRFTConfig,
    RFTConfig,
    TruncatedCorrectionConfig,
    UpdateConfig,
    check_mismatch,
    staleness_limit,
    update_policy,
)
from stages.update.loss import MiniBatch
from stages.update.metrics import Mismatch
from stages.update.objectives import method_of
from tests.stages.update.exact import ExactEngine, in_lockstep, logprobs, policy_model
from tests.stages.update.test_coefficients import examples
from tests.stages.update.test_invariance import OBJECTIVES
from tests.stages.update.test_update import G, Q, exploration, sgd_like, tiny_policy

Rows = list[dict[str, Any]]


def recorded(policy: Checkpoint, *, distinct: bool = True) -> tuple[Rows, Advantages]:
    """Q x G outputs with the log-probabilities that the policy gives them, each row by itself."""
    outputs, advantages = exploration(distinct=distinct)
    model, rows = load_model(policy, dtype=torch.float32), outputs.rows()
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["output_ids"]])
        with torch.no_grad():
            table = model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
        row["logprobs"] = table.gather(-1, torch.tensor(row["output_ids"])[:, None]).squeeze(-1).tolist()
    return rows, advantages


def shift(row: dict[str, Any], number: int) -> list[float]:
    """By how much the engine's record of an output lies below the trainer's: another amount for each row."""
    return [0.05 * (number % 5) - 0.02 * token for token in range(len(row["output_ids"]))]


def wrong_by_known_amounts(rows: Rows) -> Rows:
    return [
        row | {"logprobs": [logp - d for logp, d in zip(row["logprobs"], shift(row, number), strict=True)]}
        for number, row in enumerate(rows)
    ]


def expected(rows: Rows, covered: list[int]) -> dict[str, float]:
    """The figures by their definitions, over the outputs `covered`."""
    given = [shift(rows[number], number) for number in covered]
    every = [d for output in given for d in output]
    weights = [math.exp(sum(output)) for output in given]
    return {
        "rollout/mismatch_mean": sum(map(abs, every)) / len(every),
        "rollout/mismatch_max": max(map(abs, every)),
        "rollout/mismatch_kl": sum(math.exp(d) - d - 1 for d in every) / len(every),
        "rollout/mismatch_ess": sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights)),
    }


def updated(policy: Checkpoint, rows: Rows, advantages: Advantages, config: UpdateConfig) -> Checkpoint:
    return update_policy(policy, policy, Rollouts.write(rows), advantages, config, seed=0)


def figures(policy: Checkpoint) -> dict[str, float]:
    return {name: value for name, value in policy.metrics.items() if "mismatch" in name}


@pytest.mark.claim("an engine that samples from another distribution")
@pytest.mark.parametrize("passes", [{}, {"mu": 2, "mini_batches": 2, "micro_batch_tokens": 12}])
def test_the_figures_are_those_of_the_differences_whatever_the_passes(store: Store, passes: dict[str, int]) -> None:
    policy = tiny_policy()
    rows, advantages = recorded(policy)
    found = figures(updated(policy, wrong_by_known_amounts(rows), advantages, sgd_like(**passes)))
    assert found == pytest.approx(expected(rows, list(range(Q * G))), rel=1e-4)


@pytest.mark.slow
def test_an_engine_that_computes_the_same_differs_by_rounding_only(store: Store) -> None:
    policy = tiny_policy()
    found = figures(updated(policy, *recorded(policy), sgd_like()))
    assert found["rollout/mismatch_max"] < 1e-5
    assert found["rollout/mismatch_kl"] < 1e-10
    assert found["rollout/mismatch_ess"] == pytest.approx(1.0, abs=1e-9)


@pytest.mark.claim("an engine that samples from another distribution")
def test_equal_outputs_are_computed_once_with_a_record_each(store: Store) -> None:
    policy = tiny_policy()
    rows, advantages = recorded(policy, distinct=False)
    merged = updated(policy, wrong_by_known_amounts(rows), advantages, sgd_like())
    assert merged.metrics["policy/outputs_computed"] == Q * G / 2
    assert figures(merged) == pytest.approx(expected(rows, list(range(Q * G))), rel=1e-4)


@pytest.mark.parametrize(("beta", "covered"), [(0.0, Q * (G - 1)), pytest.param(0.04, Q * G, marks=pytest.mark.slow)])
def test_outputs_that_are_not_computed_are_not_covered(store: Store, beta: float, covered: int) -> None:
    policy = tiny_policy()
    rows, advantages = recorded(policy)
    last = [number for number, row in enumerate(rows) if row["sample"] == G - 1]
    idle = [
        row | {"advantage": [0.0] * len(row["advantage"])} if row["sample"] == G - 1 else row
        for row in advantages.rows()
    ]
    computed = [number for number in range(Q * G) if beta or number not in last]
    assert len(computed) == covered
    config = sgd_like(objective=GRPOConfig(beta=beta))
    found = figures(updated(policy, wrong_by_known_amounts(rows), Advantages.write(idle), config))
    assert found == pytest.approx(expected(rows, computed), rel=1e-4)


def test_masked_outputs_and_those_without_a_record_are_not_covered(store: Store) -> None:
    policy = tiny_policy()
    rows, advantages = recorded(policy)
    masked = [row | {"advantage": None} if number == 2 else row for number, row in enumerate(advantages.rows())]
    wrong = wrong_by_known_amounts(rows)
    wrong[7]["logprobs"] = None
    found = figures(updated(policy, wrong, Advantages.write(masked), sgd_like()))
    assert found == pytest.approx(expected(rows, [n for n in range(Q * G) if n not in (2, 7)]), rel=1e-4)


@pytest.mark.claim("an engine that samples from another distribution")
@pytest.mark.parametrize("changes", [{"old_logprobs": "rollout"}, {"objective": RFTConfig()}])
def test_outputs_that_may_be_another_policys_have_no_figures(store: Store, changes: dict[str, Any]) -> None:
    policy = tiny_policy()
    assert figures(updated(policy, *recorded(policy), sgd_like(**changes))) == {}


def test_outputs_that_no_engine_sampled_pass_every_limit(store: Store) -> None:
    policy = tiny_policy()
    rows, advantages = recorded(policy)
    unrecorded = [row | {"logprobs": None} for row in rows]
    config = sgd_like(objective=OnlineRFTConfig(), mismatch=MismatchLimits(max_mean=1e-9))
    assert figures(updated(policy, unrecorded, advantages, config)) == {}


@pytest.mark.claim("an engine that samples from another distribution")
def test_a_limit_stops_the_update_before_its_step(store: Store) -> None:
    policy = tiny_policy()
    rows, advantages = recorded(policy)
    wrong = wrong_by_known_amounts(rows)
    evict()
    with pytest.raises(
        MismatchError, match=r"mean difference of nats per token of 0\.\d+ is above update\.mismatch\.max_mean"
    ):
        updated(policy, wrong, advantages, sgd_like(mismatch=MismatchLimits(max_mean=0.01)))
    # The same call without limits: under its key nothing was recorded, and the engine learned nothing meanwhile.
    after = updated(policy, wrong, advantages, sgd_like())
    evict()
    fresh = updated(policy, wrong, advantages, sgd_like(micro_batch_tokens=16383))
    assert after.content == fresh.content
    assert after.content != policy.content


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"max_mean": 0.01}, "mean difference of nats per token of 0.02 is above update.mismatch.max_mean=0.01"),
        ({"max_kl": 1e-4}, "divergence in nats per token of 0.0003 is above update.mismatch.max_kl=0.0001"),
        ({"min_ess": 0.9}, "effective sample size of 0.8 of the outputs is below update.mismatch.min_ess=0.9"),
    ],
)
def test_a_figure_beyond_its_limit_is_named_with_what_may_have_caused_it(limits: dict[str, float], named: str) -> None:
    found = {"rollout/mismatch_mean": 0.02, "rollout/mismatch_kl": 3e-4, "rollout/mismatch_ess": 0.8}
    with pytest.raises(MismatchError, match=re.escape(named)) as caught:
        check_mismatch(found, MismatchLimits(**limits))
    for cause in ("stale", "LoRA", "precision", "top-p", "temperature", "update.correction"):
        assert cause in str(caught.value)
    check_mismatch(found, MismatchLimits(max_mean=0.02, max_kl=3e-4, min_ess=0.8))
    check_mismatch({}, MismatchLimits(**limits))


@pytest.mark.parametrize(
    ("first", "exact", "limit"),
    [
        (None, False, 0.05),
        (1e-5, False, 0.002),
        (1e-3, False, 0.01),
        (0.02, False, 0.05),
        (None, True, 1e-3),
        (1e-14, True, 1e-9),
        (1e-8, True, 1e-5),
        (1e-5, True, 1e-3),
    ],
)
def test_the_limit_of_staleness_is_a_multiple_between_two_bounds(
    first: float | None, exact: bool, limit: float
) -> None:
    assert staleness_limit(first, exact=exact) == pytest.approx(limit)


def test_auto_is_no_number_before_the_run_has_resolved_it() -> None:
    assert MismatchLimits().given == {}
    assert MismatchLimits(max_kl=1, min_ess=0.5).given == {"max_kl": 1.0, "min_ess": 0.5}
    check_mismatch({"rollout/mismatch_kl": 9.0}, MismatchLimits())
    assert UpdateConfig(objective=RFTConfig()).mismatch.max_kl == "auto", "where nothing is measured it is no error"


def test_limits_decide_no_result_and_are_in_no_key() -> None:
    assert UpdateConfig(mismatch=MismatchLimits(max_mean=0.1)).key() == UpdateConfig().key()
    assert "mismatch" not in UpdateConfig().key()


def test_a_figure_that_is_no_number_passes_no_limit() -> None:
    with pytest.raises(MismatchError, match="nan is above"):
        check_mismatch({"rollout/mismatch_mean": math.nan}, MismatchLimits(max_mean=1.0))
    with pytest.raises(MismatchError, match="nan of the outputs is below"):
        check_mismatch({"rollout/mismatch_ess": math.nan}, MismatchLimits(min_ess=0.1))


def test_a_truncated_correction_weighs_by_the_recorded_column(store: Store) -> None:
    policy = tiny_policy()
    rows, advantages = recorded(policy)
    config = sgd_like(correction=TruncatedCorrectionConfig(cap=1.08))
    found = updated(policy, wrong_by_known_amounts(rows), advantages, config)
    weights = [[min(math.exp(d), 1.08) for d in shift(row, number)] for number, row in enumerate(rows)]
    mean = sum(sum(output) / len(output) for output in weights) / len(weights)
    assert found.metrics["policy/correction_mean"] == pytest.approx(mean, rel=1e-5)
    assert max(map(max, weights)) == 1.08
    # Measured from the same column and before truncation.
    assert figures(found) == pytest.approx(expected(rows, list(range(Q * G))), rel=1e-4)


@pytest.mark.claim("truncated importance weights")
@pytest.mark.parametrize(
    ("level", "weight"),
    [
        ("token", lambda shifts: [math.exp(shift) for shift in shifts]),
        ("sequence", lambda shifts: [math.exp(sum(shifts))] * len(shifts)),
        ("sequence_mean", lambda shifts: [math.exp(sum(shifts) / len(shifts))] * len(shifts)),
    ],
)
def test_the_weight_before_its_cap_and_the_share_that_was_cut_are_shown(store: Store, level: Any, weight: Any) -> None:
    policy = tiny_policy()
    rows, advantages = recorded(policy)
    found = updated(
        policy,
        wrong_by_known_amounts(rows),
        advantages,
        sgd_like(correction=TruncatedCorrectionConfig(level=level, cap=1.02)),
    ).metrics
    raw = [weight(shift(row, number)) for number, row in enumerate(rows)]

    def mean(values: list[list[float]]) -> float:
        return sum(sum(output) / len(output) for output in values) / len(values)

    cut = mean([[float(w > 1.02) for w in output] for output in raw])
    assert 0 < cut < 1
    assert found["policy/correction_raw_mean"] == pytest.approx(mean(raw), rel=1e-5)
    assert found["policy/correction_mean"] == pytest.approx(mean([[min(w, 1.02) for w in o] for o in raw]), rel=1e-5)
    assert found["policy/correction_clipped"] == pytest.approx(cut, rel=1e-5)


@pytest.mark.claim("an engine that samples from another distribution")
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_has_the_figures_of_all_outputs(world_size: int) -> None:
    given = examples("tokens", rollout=True)
    measured = [example.__class__(**(vars(example) | {"recorded": (example.rollout_logp,)})) for example in given]
    config = UpdateConfig(micro_batch_tokens=16)

    def measure(engine: ExactEngine) -> dict[str, float]:
        gauge, mini_batch = Mismatch(), MiniBatch.of(measured, engine, 1.0, config, method_of(config.objective))
        for part, logp_BO in zip(mini_batch.parts, mini_batch.logprobs(engine.model, engine), strict=True):
            if part.recorded is not None:
                gauge.add(logp_BO, part.batch.output_mask_BO, part.recorded.logp_RO, part.recorded.row_R)
        return gauge.figures(engine)

    found = in_lockstep(world_size, measure)
    d = [(logprobs(policy_model(), e).detach() - torch.tensor(e.rollout_logp)).tolist() for e in given]
    every, weights = [x for output in d for x in output], [math.exp(sum(output)) for output in d]
    by_hand = {
        "rollout/mismatch_mean": sum(map(abs, every)) / len(every),
        "rollout/mismatch_max": max(map(abs, every)),
        "rollout/mismatch_kl": sum(math.exp(x) - x - 1 for x in every) / len(every),
        "rollout/mismatch_ess": sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights)),
    }
    assert found == [pytest.approx(by_hand, rel=1e-6)] * world_size


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_config_says_like_the_method_whether_a_reference_is_needed(name: str) -> None:
    objective = OBJECTIVES[name][0]
    assert UpdateConfig(objective=objective).needs_reference == method_of(objective).needs_reference
