"""Parts of a configuration that are right by themselves and wrong side by side; the others are in `test_parts.py`."""

from __future__ import annotations

import re
from typing import Any

import pytest

from flows.config import IterativeRLConfig
from flows.config.methods import method_settings
from flows.config.recipes import arithmetic_smoke, deepseekmath_7b
from pipeline.config import ConfigError
from stages.critic import CriticConfig
from stages.reward_training import RewardTrainingConfig

ENGINE = {"kind": "deepspeed", "zero_stage": 2}
FULL = {"optimizer": {"kind": "adamw"}, "precision": "fp32"}


def refusal(base: IterativeRLConfig, changes: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        base.override(changes)
    return str(caught.value)


def ranks(count: int) -> dict[str, Any]:
    return {"update.training.engine": ENGINE | {"ranks": count}}


def test_more_ranks_than_a_mini_batch_has_outputs_are_refused_and_as_many_are_not() -> None:
    base = arithmetic_smoke().override({"questions_per_step": 5, "rollout.G": 2})
    assert base.override(ranks(10)).questions_per_step == 5
    said = refusal(base, ranks(11))
    assert "update.training.engine.ranks: expected at most 10, the outputs of a mini-batch, found 11" in said
    # Five questions in two mini-batches: two of them in the smaller one.
    halves = {"update.mini_batches": 2}
    assert "expected at most 4" in refusal(base, ranks(5) | halves)
    assert base.override(ranks(4) | halves).update.mini_batches == 2


def test_ranks_that_do_not_divide_the_batch_are_no_error() -> None:
    assert arithmetic_smoke().override({"questions_per_step": 4, "rollout.G": 4} | ranks(3)).rollout.G == 4


def test_more_ranks_than_any_other_batch_has_rows_are_refused() -> None:
    base = arithmetic_smoke()
    sft = {"sft.training": {**FULL, "engine": ENGINE | {"ranks": 65}}, "sft.batch_size": 64}
    assert "sft.training.engine.ranks: expected at most 64, the demonstrations of a batch, found 65" in refusal(
        base, sft
    )
    ppo = base.override(method_settings("ppo", base))
    critic = {"critic.training": {**FULL, "engine": ENGINE | {"ranks": 17}}}
    assert "critic.training.engine.ranks: expected at most 16, the outputs of a mini-batch, found 17" in refusal(
        ppo, critic
    )
    # 8 ranks, and a reward model that learns from one question of 4 outputs at a time.
    small = {"rollout.G": 4, "reward_model.training.questions_per_update": 1}
    said = refusal(deepseekmath_7b(), small)
    assert "reward_model.training.training.engine.ranks: expected at most 4, the outputs of an update, found 8" in said


@pytest.mark.parametrize("config", [CriticConfig, RewardTrainingConfig])
def test_an_adapter_is_refused_where_a_new_head_is_learned(config: type[CriticConfig | RewardTrainingConfig]) -> None:
    with pytest.raises(ConfigError, match=r"training\.adapter: a .* learns a new head and is trained in full"):
        config.parse({"training": {"adapter": {"r": 8}}})
    assert config().training.adapter is None


def test_a_method_with_a_critic_trains_it_in_full_where_the_policy_has_an_adapter() -> None:
    adapted = arithmetic_smoke().override({"update.training.adapter.r": 8})
    ppo = adapted.override(method_settings("ppo", adapted))
    assert ppo.update.training.adapter is not None
    assert ppo.critic is not None
    assert ppo.critic.training == arithmetic_smoke().update.training


def test_an_adapter_of_a_runs_reward_model_is_refused_by_its_key() -> None:
    said = refusal(deepseekmath_7b(), {"reward_model.training.training.adapter.r": 8})
    assert "reward_model.training: Value error, training.adapter: a reward model learns a new head" in said
    adapted = deepseekmath_7b().override({"update.training.adapter.r": 8})
    assert adapted.update.training.adapter is not None


# ------------------------------------------------------------------------------------- settings that mean nothing together

STEPS = {"reward.components": [{"kind": "accuracy", "verifier": "exact"}, {"kind": "steps"}]}
LEARNED = {"reward_model": {"trunk": "initial_policy"}}


@pytest.mark.parametrize(
    ("method", "changes", "complaint"),
    [
        (
            "dr_grpo",
            {"advantage.scale": "std"},
            "advantage.scale: dr_grpo takes none, found std; dividing by the standard",
        ),
        ("dr_grpo", {"update.objective.length": 23}, "update.objective.length: expected at least .*=24, found 23"),
        (
            "grpo",
            {"update.objective": {"kind": "grpo", "aggregation": "constant", "length": 8}},
            "length: expected at least",
        ),
        (
            "rloo",
            {"advantage.baseline": "mean"},
            "advantage.baseline: rloo takes leave_one_out, found mean; an output is one",
        ),
        ("rloo", {"advantage": {"kind": "group"}}, "advantage.scale: rloo takes none, found std"),
        ("rloo", {"update.mu": 2}, "mu and mini_batches: rloo has no ratio .* expected 1 and 1, found 2 and 1"),
        ("rloo", {"update.mini_batches": 2}, "mu and mini_batches: rloo has no ratio .* found 1 and 2"),
        ("online_rft", {"update.mu": 2}, "mu and mini_batches: online_rft has no ratio"),
        ("rloo", STEPS | {"advantage.supervision": "process"}, "supervision process"),
        ("dapo", {"advantage.scale": "none"}, "advantage.scale: dapo takes std, found none; its advantage is"),
        (
            "gspo",
            {"update.correction": {"kind": "truncated", "level": "token"}},
            "correction: expected none or sequence or",
        ),
        (
            "dpo",
            {"data_source": "policy", "update.correction": {"kind": "truncated"}},
            "correction: expected none for dpo",
        ),
        ("online_rft", {"update.old_logprobs": "rollout"}, "old_logprobs: pi_old does not enter online_rft"),
        ("rft", {"update.mismatch.max_kl": 0.1}, "mismatch.max_kl: nothing is measured where"),
        (
            "grpo",
            {"update.old_logprobs": "rollout", "update.mismatch.min_ess": 0.5},
            "mismatch.min_ess: nothing is measured",
        ),
        (
            "online_rft",
            LEARNED,
            "reward_model: no score of a model reaches the gradient of online_rft: its coefficient is",
        ),
        ("dpo", LEARNED, "reward_model: no score of a model reaches the gradient of dpo"),
        ("sft", LEARNED, "reward_model: no score of a model reaches the gradient of sft"),
        ("dapo", LEARNED, "dynamic_sampling: a model's scores of two outputs are hardly ever equal"),
        (
            "grpo_process",
            {"dynamic_sampling": 2},
            "dynamic_sampling: outputs of equal rewards may differ in the",
        ),
        (
            "rloo",
            {"dynamic_sampling": 2},
            "dynamic_sampling: with advantage.kl_in_reward no two outputs have equal rewards",
        ),
        (
            "online_rft",
            {"dynamic_sampling": 2},
            "dynamic_sampling: groups of equal rewards are no loss to .* correct",
        ),
        ("ppo", {"dynamic_sampling": 2}, "dynamic_sampling: groups of equal rewards are no loss to advantage.kind gae"),
        ("ppo", {"update.mini_batches": 4}, "critic.mini_batches: expected 4, as update.mini_batches, found 1"),
        (
            "grpo",
            {"update.objective": {"kind": "grpo", "beta": 0.0, "divergence": "k2"}},
            "divergence k2 has no effect",
        ),
        ("dapo", {"reference_pass": "stage"}, "reference_pass: update.objective dapo reads no reference here"),
        ("grpo", {"update.mini_batches": 5}, "update.mini_batches: expected at most questions_per_step=4, found 5"),
        ("dr_grpo", {"advantage.ddof": 0}, "ddof = 0 is of the std, and scale none divides by none"),
        ("grpo", {"update.training.warmup_steps": 5}, "update.training.warmup_steps: the run makes 4 updates"),
        (
            "grpo",
            {"update.training.schedule": "linear", "update.training.total_steps": 3},
            "update.training.total_steps: the run makes 4 updates, and those beyond would have a rate of 0",
        ),
        ("grpo", {"update.training.total_steps": 3}, "total_steps has no effect where schedule is constant"),
        ("ppo", {"critic.training.warmup_steps": 5}, "critic.training.warmup_steps: the run makes 4 updates"),
        (
            "reinforce_plus_plus",
            {"advantage.baseline": "group_mean", "rollout.G": 1},
            "rollout.G: advantages within a group need at least 2 outputs",
        ),
    ],
)
def test_what_means_nothing_together_is_refused_with_the_reason(
    method: str, changes: dict[str, Any], complaint: str
) -> None:
    base = arithmetic_smoke()
    run = base.override(method_settings(method, base))
    assert re.search(complaint, refusal(run, changes))


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("gspo", STEPS | {"advantage.supervision": "process"}),
        ("dr_grpo", {"update.objective.length": 24}),
        ("rft", {"update.mu": 2}),
        ("dpo", {"update.mini_batches": 2}),
        ("ppo", {"update.mini_batches": 4, "critic.mini_batches": 4}),
        ("grpo", {"update.training.warmup_steps": 4}),
        ("grpo", {"update.training.schedule": "linear", "update.training.total_steps": 4}),
        ("dapo", {"dynamic_sampling": 2}),
    ],
)
def test_what_stands_right_beside_it_is_accepted(method: str, changes: dict[str, Any]) -> None:
    base = arithmetic_smoke()
    assert base.override(method_settings(method, base)).override(changes).update.objective.kind
