"""Parts of a configuration that are right by themselves and wrong side by side; the others are in `test_config.py`."""

from __future__ import annotations

from typing import Any

import pytest

from flows.config import IterativeRLConfig
from flows.methods import method_settings
from flows.recipes import arithmetic_smoke, deepseekmath_7b
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
