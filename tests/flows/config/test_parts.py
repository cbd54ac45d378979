"""The configuration of a run: what does not fit is refused with the reason, and a method fits every recipe."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest

from flows.config import IterativeRLConfig
from flows.config.methods import METHODS, PAPER, method_settings
from flows.config.recipes import RECIPES, arithmetic_smoke
from flows.config.resolve import choose
from pipeline.config import ConfigError

Changes = dict[str, Any]


def become(base: IterativeRLConfig, method: str) -> IterativeRLConfig:
    return base.override(method_settings(method, base))


def refusal(changes: Changes, method: str = "grpo") -> str:
    """What is said of the smallest recipe, trained by `method`, with `changes`."""
    with pytest.raises(ConfigError) as caught:
        become(arithmetic_smoke(), method).override(changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"evaluation": {"samples": 0, "temperature": 0.7}}, "temperature"),
        ({"reward_model": {"retrain": False, "replay": {"share": 0.2}}}, "replay"),
        ({"reward_model": {"replay": {"share": 0, "share_of": "old_pool"}}}, "share_of"),
    ],
)
def test_a_setting_of_what_is_switched_off_is_refused(changes: Changes, key: str) -> None:
    assert f"{key}: " in refusal(changes)
    assert become(arithmetic_smoke(), "grpo").override({"evaluation": {"samples": 0}}).evaluation.temperature == 1.0


# ------------------------------------------------------------------------------------- the row of Table 10


def test_a_data_source_that_is_not_of_the_row_is_refused() -> None:
    assert "data_source: ppo learns from policy, found initial_policy" in refusal(
        {"data_source": "initial_policy"}, "ppo"
    )
    assert "data_source: sft learns from demonstrations, found policy" in refusal({"data_source": "policy"}, "sft")
    assert "data_source: grpo learns from policy or initial_policy, found demonstrations" in refusal(
        {"data_source": "demonstrations"}
    )


def test_an_advantage_that_is_not_of_the_row_is_refused() -> None:
    assert "advantage.kind: grpo takes group or batch, found pairs" in refusal({"advantage": {"kind": "pairs"}})
    assert "advantage.kind: rft takes correct, found group" in refusal({"advantage": {"kind": "group"}}, "rft")


def test_ppo_without_a_critic_is_refused() -> None:
    assert "critic: advantage.kind gae (PPO) needs one" in refusal({"critic": None}, "ppo")


def test_a_critic_that_nothing_uses_is_refused() -> None:
    assert "nothing else does; set critic={} or null" in refusal({"critic": {}})


def test_a_ratio_to_outputs_of_the_initial_policy_needs_that_policys_logprobs() -> None:
    message = refusal({"data_source": "initial_policy"})
    assert "needs that policy's log-probabilities in its ratio; set update.old_logprobs=rollout" in message
    with_them = {"data_source": "initial_policy", "update.old_logprobs": "rollout"}
    assert arithmetic_smoke().override(with_them).data_source == "initial_policy"


def test_what_does_not_fit_is_listed_all_at_once() -> None:
    message = refusal({"data_source": "demonstrations", "advantage": {"kind": "pairs"}, "rollout.G": 1})
    assert [part in message for part in ("data_source:", "advantage.kind:", "rollout.G:")] == [True] * 3


# ------------------------------------------------------------------------------------- where outputs come from


def test_dynamic_sampling_of_another_policys_outputs_is_refused() -> None:
    message = "dynamic_sampling: only outputs of the current policy can be drawn again"
    assert message in refusal({"dynamic_sampling": 2}, "rft")
    assert message in refusal({"dynamic_sampling": 2}, "sft")


@pytest.mark.parametrize("method", ["sft", "rft", "dpo"])
def test_a_correction_for_the_engine_is_refused_where_another_policy_made_the_outputs(method: str) -> None:
    message = f"correction: expected none for {method}, found level token"
    assert message in refusal({"update.correction.kind": "truncated"}, method)
    grpo = {"update.correction.kind": "truncated", "data_source": "initial_policy"}
    assert "update.correction: its weights compare" in refusal(grpo)


def test_demonstrations_have_no_logprobs_of_an_engine() -> None:
    assert "pi_old does not enter sft" in refusal({"update.old_logprobs": "rollout"}, "sft")


def test_a_temperature_of_the_update_other_than_the_outputs_is_refused() -> None:
    assert "update.temperature: 0.7 differs from that of the outputs, 1" in refusal({"update.temperature": 0.7})
    same = {"update.temperature": 0.7, "rollout.temperature": 0.7}
    assert arithmetic_smoke().override(same).update.temperature == 0.7
    # Demonstrations are recorded with 1, whatever outputs would be sampled at.
    assert "differs from that of the outputs, 1" in refusal(same, "sft")


def test_greedy_outputs_are_refused_unless_nothing_is_sampled_for_training() -> None:
    greedy = {"rollout.temperature": 0.0, "rollout.G": 1}
    assert "rollout.temperature: greedy outputs come from no distribution" in refusal(greedy, "ppo")
    assert become(arithmetic_smoke(), "sft").override(greedy).rollout.temperature == 0


# ------------------------------------------------------------------------------------- parts that must agree


@pytest.mark.claim("KL twice")
def test_a_kl_term_in_the_reward_and_in_the_loss_is_refused() -> None:
    message = refusal({"advantage.kl_in_reward": 0.1})
    assert "advantage.kl_in_reward=0.1 and update.objective.beta=0.04 would count the KL term twice" in message
    once = {"advantage.kl_in_reward": 0.1, "update.objective.beta": 0.0}
    assert arithmetic_smoke().override(once).advantage.kind == "group"


@pytest.mark.parametrize("method", ["grpo", "dpo", "rloo"])
def test_a_single_output_per_question_is_refused_where_outputs_are_compared(method: str) -> None:
    message = refusal({"rollout.G": 1}, method)
    assert "rollout.G: advantages within a group need at least 2 outputs per question, found 1" in message


@pytest.mark.parametrize("method", ["sft", "rft", "online_rft", "ppo", "reinforce_plus_plus"])
def test_a_single_output_per_question_is_enough_where_none_are_compared(method: str) -> None:
    assert become(arithmetic_smoke(), method).override({"rollout.G": 1}).rollout.G == 1


def test_process_supervision_without_rewards_of_steps_is_refused() -> None:
    message = refusal({"advantage.supervision": "process"})
    assert "process needs rewards of steps; add a component of kind `steps` to reward.components" in message


def test_k1_as_a_loss_is_refused() -> None:
    assert "k1 as a loss has gradient 0 in expectation" in refusal({"update.objective.divergence": "k1"})


def test_a_constant_divisor_and_its_length_belong_together() -> None:
    message = "aggregation constant and `length` belong together: set both or neither"
    assert message in refusal({"update.objective.aggregation": "constant"})
    assert message in refusal({"update.objective.length": 24})
    both = {"update.objective.aggregation": "constant", "update.objective.length": 24}
    assert arithmetic_smoke().override(both).update.objective.kind == "grpo"


def test_a_punishment_of_length_ends_where_outputs_end() -> None:
    components = [{"kind": "accuracy", "verifier": "exact"}, {"kind": "overlong", "max_tokens": 32, "buffer_tokens": 8}]
    message = refusal({"reward.components": components})
    assert "'overlong' punishes fully from max_tokens=32 on" in message
    assert "outputs end at rollout.max_output_tokens=24" in message
    fitting = {"reward.components": components, "rollout.max_output_tokens": 32}
    assert arithmetic_smoke().override(fitting).rollout.max_output_tokens == 32


# ------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_valid_config_of_every_recipe(recipe: str, method: str) -> None:
    config = become(RECIPES[recipe](), method)
    assert config.name == f"{recipe}-{method}"
    assert IterativeRLConfig.from_yaml(config.to_yaml()) == config


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(METHODS, 2)))
def test_a_method_leaves_nothing_of_the_one_before(first: str, second: str) -> None:
    base = arithmetic_smoke()
    assert become(become(base, first), second) == become(base, second)


def test_grpo_of_the_recipe_is_the_recipe() -> None:
    base = arithmetic_smoke()
    assert become(base, "grpo").override({"name": base.name}) == base


def test_the_methods_of_the_paper_come_first_and_are_rows_of_their_own() -> None:
    assert tuple(METHODS)[: len(PAPER)] == PAPER
    titles = [become(arithmetic_smoke(), method).update.objective.ROW.title for method in PAPER]
    assert titles == ["SFT", "RFT", "DPO", "Online RFT", "PPO", "GRPO"]


def test_process_supervision_adds_what_scores_steps_and_takes_only_its_own_away() -> None:
    base = arithmetic_smoke()
    process = become(base, "grpo_process")
    assert [component.kind for component in process.reward.components] == ["format", "accuracy", "steps"]
    weighted = base.override({"reward.components": [{"kind": "accuracy"}, {"kind": "steps", "weight": 0.5}]})
    assert become(weighted, "grpo_process").reward == weighted.reward
    assert become(weighted, "grpo").reward == weighted.reward


def test_methods_that_learn_from_others_outputs_drop_the_correction_for_the_engine() -> None:
    corrected = arithmetic_smoke().override({"update.correction": {"kind": "truncated", "level": "sequence"}})
    kinds = {method: become(corrected, method).update.correction.kind for method in METHODS}
    assert {method for method, kind in kinds.items() if kind == "none"} == {"sft", "rft", "dpo"}


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="method 'onlin_rft' is unknown; did you mean 'online_rft'"):
        method_settings("onlin_rft", arithmetic_smoke())
    with pytest.raises(ConfigError, match="methods: sft, rft"):
        method_settings("zzz", arithmetic_smoke())


# ------------------------------------------------------------------------------------- methods among other settings


def test_settings_come_after_the_method() -> None:
    config = choose("arithmetic_smoke", settings=["advantage.lam=0.5", "critic.mu=3"], method="ppo").config
    assert config.advantage.kind == "gae"
    assert config.advantage.lam == 0.5
    assert config.critic is not None
    assert config.critic.mu == 3


def test_settings_of_one_run_change_no_method() -> None:
    before = copy.deepcopy(METHODS)
    choose("arithmetic_smoke", settings=["update.objective.beta=0.5", "advantage.ddof=0"], method="grpo")
    assert before == METHODS


def test_what_a_method_takes_from_its_base_follows_the_settings() -> None:
    length = choose("arithmetic_smoke", settings=["rollout.max_output_tokens=30"], method="dr_grpo").config
    assert length.update.objective.kind == "dr_grpo"
    assert length.update.objective.length == 30
    rate = choose("arithmetic_smoke", settings=["update.training.optimizer.learning_rate=0.5"], method="ppo").config
    assert rate.critic is not None
    assert rate.critic.training.optimizer.learning_rate == 0.5


def test_a_file_that_tunes_its_own_method_may_be_trained_by_another(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: arithmetic_smoke\nupdate.objective.beta: 0.5\nseed: 3\n")
    config = choose(str(file), method="sft").config
    assert (config.update.objective.kind, config.seed) == ("sft", 3)


def test_what_differs_is_told_without_what_went_with_its_kind() -> None:
    assert choose("arithmetic_smoke", method="sft").differences() == {
        "name": ("arithmetic_smoke", "arithmetic_smoke-sft"),
        "data_source": ("policy", "demonstrations"),
        "advantage.kind": ("group", "one"),
        "update.objective.kind": ("grpo", "sft"),
    }
    assert choose("arithmetic_smoke", settings=["sft=null"]).differences() == {"sft": ("...", None)}


# ------------------------------------------------------------------------------------- learned rewards


PLAN = {"trunk": "initial_policy"}


@pytest.mark.claim("components ignored with a reward model")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"reward.components": [{"kind": "accuracy", "weight": 2.0}]},
            "'accuracy' has weight 2, and its verdicts are what the reward models learn to give, whose score stands in its "
            "place; set reward_model.weight, and this one to 1",
        ),
        ({"reward.components": [{"kind": "accuracy"}, {"kind": "steps", "weight": 0.5}]}, "'steps' has weight 0.5"),
        ({"reward.components": [{"kind": "format", "weight": 1.0}]}, "'format' has weight 1, and its verdicts are"),
        (
            {"rollout.G": 1, "advantage": {"kind": "batch"}, "update.objective": {"kind": "reinforce_plus_plus"}},
            "reward.truncated: as_unparseable gives a cut output the lowest logit of its question's outputs",
        ),
    ],
)
def test_what_a_reward_model_would_leave_without_effect_is_refused(changes: Changes, said: str) -> None:
    assert said in refusal({"reward_model": PLAN} | changes)


@pytest.mark.parametrize("method", ["sft", "rft", "dpo", "online_rft"])
def test_a_reward_model_is_refused_where_only_verdicts_are_learned_from(method: str) -> None:
    assert "reward_model: advantage.kind" in refusal({"reward_model": PLAN}, method)


@pytest.mark.parametrize(
    "changes",
    [
        {"reward.components": [{"kind": "accuracy"}, {"kind": "format", "weight": 0.3}, {"kind": "language"}]},
        {
            "reward.components": [{"kind": "accuracy"}, {"kind": "steps"}, {"kind": "format"}],
            "reward_model.models": [{"kind": "process"}],
        },
        {"reward.truncated": "no_reward"},
        {"reward_model.scoring.scale": "sigmoid", "reward_model.weight": 2.0},
    ],
)
def test_components_and_truncation_go_with_a_reward_model(changes: Changes) -> None:
    base = become(arithmetic_smoke(), "grpo").override({"reward_model": PLAN})
    assert base.override(changes) != base, "taken, and not ignored"


# ------------------------------------------------------------------------------------- reward functions


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("no_such_rewards:reward", "function 'no_such_rewards:reward': no module 'no_such_rewards' in"),
        ("my_rewards:rewrad", "it has no 'rewrad'; did you mean 'reward'?"),
        ("broken_rewards:reward", "not Python source"),
    ],
)
def test_a_reward_function_that_is_not_there_is_found_when_the_configuration_is_chosen(
    function: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text("def reward(completions, **columns):\n    raise SystemExit\n")
    (tmp_path / "broken_rewards.py").write_text("def reward(completions:\n")
    component = "[{kind: function, function: '%s'}]"
    with pytest.raises(ConfigError) as caught:
        choose("arithmetic_smoke", settings=["reward.components=" + component % function])
    assert said in str(caught.value)
    choose("arithmetic_smoke", settings=["reward.components=" + component % "my_rewards:reward"])
