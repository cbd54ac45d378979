"""The paper's numbers and Table 10 as settings: what a config says that nobody changed."""

from __future__ import annotations

import pytest

from flows.config import IterativeRLConfig
from flows.methods import METHODS, PAPER, method_settings
from flows.recipes import arithmetic_smoke
from stages.advantage import GAEConfig, GroupConfig
from stages.rollout import RolloutConfig
from stages.training import TrainingConfig
from stages.training.config import AdamWConfig
from stages.update import DPOConfig, GRPOConfig, UpdateConfig


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
    return base.override(method_settings(method, base))


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
