"""The paper's numbers and Table 10 as settings: what an unchanged config says."""

from __future__ import annotations

import pytest

from flows.config import IterativeRLConfig
from flows.config.methods import METHODS, PAPER
from flows.config.recipes import arithmetic_smoke, deepseekmath_7b
from stages.advantage import GAEConfig, GroupConfig
from stages.rollout import RolloutConfig
from stages.training import AdamWConfig, DeepSpeedEngineConfig, TrainingConfig
from stages.update import DPOConfig, GRPOConfig, UpdateConfig
from tests.flows.short_runs import whole_method


@pytest.mark.claim("a schedule that decays by default", "4.2 numbers")
def test_the_defaults_are_the_numbers_of_section_4_2() -> None:
    assert AdamWConfig().learning_rate == 1e-6
    assert TrainingConfig().schedule == "constant"
    assert GRPOConfig().beta == GAEConfig().kl_in_reward == 0.04
    assert (RolloutConfig().G, RolloutConfig().max_output_tokens) == (64, 1024)
    assert (UpdateConfig().mu, UpdateConfig().mini_batches) == (1, 1)
    questions = IterativeRLConfig.model_fields["questions_per_step"].default
    assert questions * RolloutConfig().G == 1024


def test_the_default_objective_is_that_of_eq_3_and_4_on_outcome_supervision() -> None:
    config = UpdateConfig()
    assert isinstance(config.objective, GRPOConfig)
    assert (config.objective.aggregation, config.objective.divergence) == ("sequence_mean", "k3")
    assert (config.old_logprobs, config.correction.kind) == ("trainer", "none")
    assert (GroupConfig().supervision, GroupConfig().baseline, GroupConfig().scale) == ("outcome", "mean", "std")
    assert DPOConfig().length_normalised


def test_the_recipe_of_the_papers_run_has_its_numbers_on_eight_gpus() -> None:
    config = deepseekmath_7b()
    assert (config.rollout.G, config.questions_per_step * config.rollout.G) == (64, 1024)
    assert (config.rollout.max_output_tokens, config.update.mu, config.update.mini_batches) == (1024, 1, 1)
    assert isinstance(config.update.objective, GRPOConfig)
    assert config.update.objective.beta == 0.04
    assert config.iterations * config.steps * config.questions_per_step == 84_960  # of 144K questions, none twice
    assert config.reward_model is not None
    assert config.reward_model.replay.share == 0.1
    assert config.reward_model.retrain
    assert config.iterations - 1 == 2  # "two rounds of iteration": it is trained on between iterations
    trainings = config.update.training, config.reward_model.training.training
    assert [training.optimizer.learning_rate for training in trainings] == [1e-6, 2e-5]
    for training in trainings:
        assert training.engine == DeepSpeedEngineConfig(ranks=8, zero_stage=3, offload="optimizer")
        assert (training.precision, training.activation_checkpointing) == ("bf16", True)
    assert config.rollout.backend.kind == "vllm"


TABLE_10 = {
    "sft": ("SFT", "demonstrations", "-", "one"),
    "rft": ("RFT", "initial_policy", "Rule", "correct"),
    "dpo": ("DPO", "initial_policy", "Rule", "pairs"),
    "online_rft": ("Online RFT", "policy", "Rule", "correct"),
    "ppo": ("PPO", "policy", "Model", "gae"),
    "grpo": ("GRPO", "policy", "Model", "group"),
}


def trained_by(method: str) -> IterativeRLConfig:
    base = arithmetic_smoke()
    return base.override(whole_method(method, base))


@pytest.mark.claim("Eq. 11")
@pytest.mark.parametrize("method", TABLE_10)
def test_each_method_has_the_data_source_and_reward_of_its_row_of_table_10(method: str) -> None:
    config = trained_by(method)
    row = config.update.objective.ROW
    assert (row.title, config.data_source, row.reward, config.advantage.kind) == TABLE_10[method]
    assert row.sources[0] == config.data_source
    assert row.advantages[0] == config.advantage.kind
    assert (config.critic is not None) == (method == "ppo")


def test_the_rows_come_in_the_order_of_the_table_and_later_methods_behind_them() -> None:
    assert tuple(TABLE_10) == PAPER == tuple(METHODS)[:6]


def test_every_row_trains_with_a_single_update_per_exploration_stage() -> None:
    assert {trained_by(method).update.mu for method in METHODS} == {1}
