"""Parts of a configuration that are right by themselves and wrong together, and the nearest ones that are not.

`test_combinations.py` enumerates the settings that make a method; here stand the values and the sections beyond them.
"""

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
from tests.flows.short_runs import whole_method

Changes = dict[str, Any]

ENGINE = {"kind": "deepspeed", "zero_stage": 2}
FULL = {"optimizer": {"kind": "adamw"}, "precision": "fp32"}
ACCURACY = {"kind": "accuracy", "verifier": "exact"}
STEPS = {"reward.components": [ACCURACY, {"kind": "steps"}]}
OVERLONG = {"reward.components": [ACCURACY, {"kind": "overlong", "max_tokens": 32, "buffer_tokens": 8}]}
LEARNED = {"reward_model": {"trunk": "initial_policy"}}
TRUNCATED = {"update.correction.kind": "truncated"}
WARMER = {"update.temperature": 0.7, "rollout.temperature": 0.7}
OVERLAP = {"overlap": 1, "update.old_logprobs": "rollout"}
CONCURRENT = OVERLAP | {"side_by_side": "always"}
CORRECTED = {"overlap": 1, "update.old_logprobs": "trainer"} | TRUNCATED
GREEDY = {"rollout.temperature": 0.0, "rollout.G": 1}
TAUGHT = {"teacher": {"path": "teacher"}}
CALCULATOR = {"environment": {"kind": "calculator"}}
COMPLETED = {"reward_model": {"models": [{"kind": "process"}], "step_labels": {"kind": "monte_carlo"}}}
JSON_CALLS = {"environment": {"kind": "tool_calls"}}
PROCESS = {"advantage.supervision": "process"}


def ranks(count: int) -> Changes:
    """Ranks for ten outputs: five questions of two."""
    return {"questions_per_step": 5, "rollout.G": 2, "update.training.engine": ENGINE | {"ranks": count}}


def objective(kind: str, **fields: Any) -> Changes:
    return {"update.objective": {"kind": kind} | fields}


def become(method: str) -> IterativeRLConfig:
    base = arithmetic_smoke()
    return base.override(whole_method(method, base))


def refusal(base: IterativeRLConfig, changes: Changes) -> str:
    with pytest.raises(ConfigError) as caught:
        base.override(changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "changes", "complaint"),
    [
        # A teacher.
        ("distillation", {"teacher": None}, "teacher: advantage.kind teacher .* found null; set teacher.path"),
        ("sft", {"data_source": "teacher"}, "teacher: data_source teacher .* found null; set teacher.path"),
        ("grpo", TAUGHT, "teacher: grpo .* policy learns from none.* set teacher=null"),
        ("sft", TAUGHT, "teacher: sft .* demonstrations learns from none"),
        ("distillation", LEARNED, "reward_model: .* distillation: it learns from what a teacher says"),
        ("distillation", {"dynamic_sampling": 1}, "dynamic_sampling: .* advantage.kind teacher"),
        ("distillation", {"data_source": "teacher"}, "data_source: distillation .* policy, found teacher"),
        ("distillation", {"advantage": {"kind": "group"}}, "advantage.kind: distillation .* teacher, found group"),
        ("grpo", TAUGHT | {"advantage": {"kind": "teacher"}}, "advantage.kind: grpo .* group or batch, found teacher"),
        ("distillation", {"reference_pass": "stage"}, "reference_pass: .* distillation reads no reference"),
        # Tools.
        ("grpo", JSON_CALLS, "environment.kind: .* set prompt.chat=tokenizer"),
        ("grpo", {"prompt": {"chat": "tokenizer", "tools": ["python"]}}, "prompt.tools: python is shown"),
        ("grpo", JSON_CALLS | {"prompt": {"chat": "tokenizer", "tools": ["calculator"]}}, "prompt.tools: calculator"),
        ("grpo", PROCESS | CALCULATOR | COMPLETED, "reward_model.step_labels: .*kind=rules, or environment=null"),
        # What is switched off.
        ("grpo", {"evaluation": {"samples": 0, "temperature": 0.7}}, "temperature: .*0.7"),
        ("grpo", {"reward_model": {"retrain": False, "replay": {"share": 0.2}}}, "replay: "),
        ("grpo", {"reward_model": {"replay": {"share": 0, "share_of": "old_pool"}}}, "share_of: "),
        # The row of Table 10.
        ("ppo", {"data_source": "initial_policy"}, "data_source: ppo .* policy, found initial_policy"),
        ("sft", {"data_source": "policy"}, "data_source: sft .* demonstrations or teacher, found policy"),
        ("grpo", {"data_source": "demonstrations"}, "data_source: grpo .* policy or initial_policy, found demonstr"),
        ("grpo", {"advantage": {"kind": "pairs"}}, "advantage.kind: grpo .* group or batch, found pairs"),
        ("rft", {"advantage": {"kind": "group"}}, "advantage.kind: rft .* correct, found group"),
        ("ppo", {"critic": None}, "critic: "),
        ("grpo", {"critic": {}}, "critic: "),
        ("grpo", {"data_source": "initial_policy"}, "update.old_logprobs: grpo .* set update.old_logprobs=rollout"),
        ("dr_grpo", {"advantage.scale": "std"}, "advantage.scale: dr_grpo .* none, found std"),
        ("rloo", {"advantage": {"kind": "group"}}, "advantage.scale: rloo .* none, found std"),
        ("rloo", {"advantage.baseline": "mean"}, "advantage.baseline: rloo .* leave_one_out, found mean"),
        ("dapo", {"advantage.scale": "none"}, "advantage.scale: dapo .* std, found none"),
        ("rloo", STEPS | PROCESS, "advantage.group: .* supervision process with baseline leave_one_out"),
        # Where outputs come from.
        ("rft", {"dynamic_sampling": 2}, "dynamic_sampling: only outputs of the current policy"),
        ("sft", {"dynamic_sampling": 2}, "dynamic_sampling: only outputs of the current policy"),
        ("dapo", LEARNED, "dynamic_sampling: a model's scores"),
        ("grpo_process", {"dynamic_sampling": 2}, "dynamic_sampling: .* process supervision"),
        ("rloo", {"dynamic_sampling": 2}, "dynamic_sampling: with advantage.kl_in_reward"),
        ("online_rft", {"dynamic_sampling": 2}, "dynamic_sampling: .* advantage.kind correct"),
        ("ppo", {"dynamic_sampling": 2}, "dynamic_sampling: .* advantage.kind gae"),
        # Questions by earlier rewards.
        ("distillation", {"curriculum": {}}, "curriculum: distillation computes no rewards"),
        ("sft", {"curriculum": {}}, "curriculum: demonstrations have no rewards"),
        ("grpo", {"curriculum": {"window": 3}, "keep.rollouts": 2}, "keep.rollouts: .* curriculum.window=3, found 2"),
        ("grpo", {"curriculum": {"window": 1, "rewards": ["0" * 12, "1" * 12]}}, "window: .* at least 2, .* found 1"),
        ("grpo", {"curriculum.rewards": ["last"]}, "curriculum.rewards"),
        ("grpo", {"curriculum.band": {"low": 0, "high": 1}}, "low and high: .* found 0 and 1"),
        ("sft", TRUNCATED, "correction: .* none for sft, found level token"),
        ("rft", TRUNCATED, "correction: .* none for rft, found level token"),
        ("dpo", TRUNCATED, "correction: .* none for dpo, found level token"),
        ("dpo", {"data_source": "policy"} | TRUNCATED, "correction: .* none for dpo"),
        ("gspo", TRUNCATED | {"update.correction.level": "token"}, "correction: expected none or sequence or"),
        ("grpo", TRUNCATED | {"data_source": "initial_policy"}, "update.correction: .*data_source: initial_policy"),
        ("sft", {"update.old_logprobs": "rollout"}, "old_logprobs: .* sft"),
        ("online_rft", {"update.old_logprobs": "rollout"}, "old_logprobs: .* online_rft"),
        ("rft", {"update.mismatch.max_kl": 0.1}, "mismatch.max_kl: "),
        ("grpo", {"update.old_logprobs": "rollout", "update.mismatch.min_ess": 0.5}, "mismatch.min_ess: "),
        ("grpo", {"update.temperature": 0.7}, "update.temperature: 0.7 .* 1$"),
        ("sft", WARMER, "update.temperature: 0.7 .* 1$"),  # demonstrations are recorded with 1
        ("ppo", GREEDY, "rollout.temperature: "),
        # Outputs of the policy before the last update.
        ("grpo", {"overlap": 1}, "update.old_logprobs: with overlap=1 .* set update.old_logprobs=rollout"),
        ("grpo", {"overlap": 2}, "overlap: .* 0 or 1"),
        ("grpo", OVERLAP | {"steps": 1}, "overlap: .* less than steps=1, found 1"),
        ("grpo", OVERLAP | {"data_source": "initial_policy"}, "overlap: outputs of data_source initial_policy"),
        ("grpo", CORRECTED | {"update.mismatch.max_kl": 0.1}, "update.mismatch.max_kl: with overlap=1 "),
        ("rft", {"overlap": 1}, "overlap: outputs of data_source initial_policy"),
        ("dpo", {"overlap": 1}, "overlap: outputs of data_source initial_policy"),
        ("dpo", {"overlap": 1, "data_source": "policy"}, "overlap: dpo has no ratio"),
        ("sft", {"overlap": 1}, "overlap: outputs of data_source demonstrations"),
        *((method, {"overlap": 1}, f"overlap: {method} has no ratio") for method in ("online_rft", "rloo")),
        ("grpo", {"side_by_side": "always"}, "side_by_side: with overlap=0 "),
        ("grpo", CONCURRENT | {"rollout.backend.threads": "auto"}, "side_by_side: expected .* found auto and 1"),
        ("grpo", CONCURRENT | {"rollout.backend": {"kind": "vllm"}}, "side_by_side: expected .*kind=hf, found vllm"),
        ("dapo", CONCURRENT | {"dynamic_sampling": 1}, "side_by_side: dynamic_sampling draws again"),
        # Parts that must agree.
        ("grpo", {"rollout.G": 1}, "rollout.G: .* at least 2 .* found 1"),
        ("dpo", {"rollout.G": 1}, "rollout.G: .* at least 2 .* found 1"),
        ("rloo", {"rollout.G": 1}, "rollout.G: .* at least 2 .* found 1"),
        ("reinforce_plus_plus", {"advantage.baseline": "group_mean", "rollout.G": 1}, "rollout.G: .* at least 2"),
        ("grpo", PROCESS, "advantage.supervision: process needs rewards of steps"),
        ("grpo", {"update.objective.divergence": "k1"}, "k1 as a loss"),
        ("grpo", objective("grpo", beta=0.0, divergence="k2"), "divergence k2 has no effect"),
        ("grpo", {"update.objective.aggregation": "constant"}, "aggregation constant and `length`"),
        ("grpo", {"update.objective.length": 24}, "aggregation constant and `length`"),
        ("grpo", objective("grpo", aggregation="constant", length=8), "length: .* at least .*=24, found 8"),
        ("dr_grpo", {"update.objective.length": 23}, "update.objective.length: .* at least .*=24, found 23"),
        ("dr_grpo", {"advantage.ddof": 0}, "ddof = 0 is of the std"),
        ("grpo", OVERLONG, "'overlong' .*max_tokens=32 .*max_output_tokens=24"),
        ("dapo", {"reference_pass": "stage"}, "reference_pass: .* dapo"),
        ("rloo", {"update.mu": 2}, "mu and mini_batches: rloo .* expected 1 and 1, found 2 and 1"),
        ("rloo", {"update.mini_batches": 2}, "mu and mini_batches: rloo .* found 1 and 2"),
        ("online_rft", {"update.mu": 2}, "mu and mini_batches: online_rft "),
        ("ppo", {"update.mini_batches": 4}, "critic.mini_batches: expected 4, .* found 1"),
        ("grpo", {"update.mini_batches": 5}, "update.mini_batches: .* questions_per_step=4, found 5"),
        ("grpo", {"update.training.warmup_steps": 5}, "update.training.warmup_steps: the run makes 4 updates"),
        ("ppo", {"critic.training.warmup_steps": 5}, "critic.training.warmup_steps: the run makes 4 updates"),
        ("grpo", {"update.training.total_steps": 3}, "total_steps has no effect where schedule is constant"),
        (
            "grpo",
            {"update.training.schedule": "linear", "update.training.total_steps": 3},
            "update.training.total_steps: .* at least 4, found 3",
        ),
        # More ranks than rows.
        ("grpo", ranks(11), "update.training.engine.ranks: .* at most 10, .* found 11"),
        (
            "grpo",
            ranks(5) | {"update.mini_batches": 2},
            "update.training.engine.ranks: .* at most 4",
        ),  # 2 of 5 questions
        (
            "grpo",
            {"sft.training": {**FULL, "engine": ENGINE | {"ranks": 65}}, "sft.batch_size": 64},
            "sft.training.engine.ranks: .* at most 64, .* found 65",
        ),
        (
            "ppo",
            {"critic.training": {**FULL, "engine": ENGINE | {"ranks": 17}}},
            "critic.training.engine.ranks: .* at most 16, .* found 17",
        ),
        # Methods that read verdicts only.
        *((method, LEARNED, "reward_model: advantage.kind") for method in ("sft", "rft", "dpo", "online_rft")),
        *((method, LEARNED, f"reward_model: .* {method}: ") for method in ("sft", "dpo", "online_rft")),
    ],
)
def test_what_means_nothing_together_is_refused(method: str, changes: Changes, complaint: str) -> None:
    assert re.search(complaint, refusal(become(method), changes), re.MULTILINE)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("grpo", {"evaluation": {"samples": 0}}),
        ("grpo", {"data_source": "initial_policy", "update.old_logprobs": "rollout"}),
        ("grpo", WARMER),
        ("sft", GREEDY),
        ("dapo", OVERLAP | {"dynamic_sampling": 2}),
        ("grpo", JSON_CALLS | {"prompt": {"chat": "tokenizer", "tools": ["python"]}}),
        *((method, OVERLAP) for method in ("grpo", "ppo", "dr_grpo", "gspo", "cispo", "reinforce_plus_plus")),
        ("grpo", CORRECTED),
        ("grpo", CONCURRENT),
        ("dapo", OVERLAP | {"dynamic_sampling": 1, "side_by_side": "auto"}),
        ("gspo", CORRECTED | {"update.correction.level": "sequence"}),
        *((method, {"rollout.G": 1}) for method in ("sft", "rft", "online_rft", "ppo", "reinforce_plus_plus")),
        ("grpo", {"update.objective.aggregation": "constant", "update.objective.length": 24}),
        ("grpo", OVERLONG | {"rollout.max_output_tokens": 32}),
        ("grpo", ranks(10)),
        ("grpo", ranks(4) | {"update.mini_batches": 2}),
        ("grpo", ranks(3)),  # which does not divide the batch
        ("gspo", STEPS | PROCESS),
        ("rft", {"update.mu": 2}),
        ("dpo", {"update.mini_batches": 2}),
        ("ppo", {"update.mini_batches": 4, "critic.mini_batches": 4}),
        ("grpo", {"update.training.warmup_steps": 4}),
        ("grpo", {"update.training.schedule": "linear", "update.training.total_steps": 4}),
        ("dapo", {"dynamic_sampling": 2}),
        ("rft", {"curriculum": {}}),
        ("dapo", OVERLAP | {"curriculum": {"window": 2}, "keep.rollouts": 2}),
        ("grpo", LEARNED | {"reward.components": [ACCURACY, {"kind": "format", "weight": 0.3}, {"kind": "language"}]}),
        ("grpo", LEARNED | STEPS | {"reward_model.models": [{"kind": "process"}]}),
        ("grpo", LEARNED | {"reward.truncated": "no_reward"}),
        ("grpo", LEARNED | {"reward_model.scoring.scale": "sigmoid", "reward_model.weight": 2.0}),
    ],
)
def test_the_nearest_that_means_something_is_accepted_and_not_ignored(method: str, changes: Changes) -> None:
    assert become(method).override(changes) != become(method)


@pytest.mark.claim("KL twice")
def test_a_kl_term_in_the_reward_and_in_the_loss_is_refused() -> None:
    base, twice = arithmetic_smoke(), {"advantage.kl_in_reward": 0.1}
    assert re.search(r"advantage.kl_in_reward=0.1 and update.objective.beta=0.04 .* twice", refusal(base, twice))
    assert base.override(twice | {"update.objective.beta": 0.0}).advantage.kind == "group"


@pytest.mark.claim("components ignored with a reward model")
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"reward.components": [{"kind": "accuracy", "weight": 2.0}]},
            "reward.components: 'accuracy' has weight 2, .* 1$",
        ),
        (
            {"reward.components": [ACCURACY, {"kind": "steps", "weight": 0.5}]},
            "reward.components: 'steps' has weight 0.5",
        ),
        ({"reward.components": [{"kind": "format", "weight": 1.0}]}, "reward.components: 'format' has weight 1"),
        (
            {"rollout.G": 1, "advantage": {"kind": "batch"}} | objective("reinforce_plus_plus"),
            "reward.truncated: as_unparseable .* rollout.G=1",
        ),
    ],
)
def test_what_a_reward_model_would_leave_without_effect_is_refused(changes: Changes, complaint: str) -> None:
    assert re.search(complaint, refusal(become("grpo"), LEARNED | changes), re.MULTILINE)


def test_what_does_not_fit_is_listed_all_at_once() -> None:
    said = refusal(become("grpo"), {"data_source": "demonstrations", "advantage": {"kind": "pairs"}, "rollout.G": 1})
    assert [part in said for part in ("data_source:", "advantage.kind:", "rollout.G:")] == [True] * 3


@pytest.mark.parametrize("config", [CriticConfig, RewardTrainingConfig])
def test_an_adapter_is_refused_where_a_new_head_is_learned(config: type[CriticConfig | RewardTrainingConfig]) -> None:
    with pytest.raises(ConfigError, match=r"training\.adapter: a "):
        config.parse({"training": {"adapter": {"r": 8}}})
    assert config().training.adapter is None


def test_a_runs_reward_models_have_no_adapter_and_no_idle_ranks() -> None:
    said = refusal(deepseekmath_7b(), {"reward_model.training.training.adapter.r": 8})
    assert re.search(r"reward_model\.training: .*training\.adapter: a reward model", said)
    assert deepseekmath_7b().override({"update.training.adapter.r": 8}).update.training.adapter is not None
    # 8 ranks, and a reward model that learns from one question of 4 outputs at a time.
    said = refusal(deepseekmath_7b(), {"rollout.G": 4, "reward_model.training.questions_per_update": 1})
    assert re.search(r"reward_model\.training\.training\.engine\.ranks: .* at most 4, .* found 8", said)


def test_a_critic_is_trained_in_full_where_the_policy_has_an_adapter() -> None:
    adapted = arithmetic_smoke().override({"update.training.adapter.r": 8})
    ppo = adapted.override(method_settings("ppo", adapted))
    assert ppo.update.training.adapter is not None
    assert ppo.critic is not None
    assert ppo.critic.training == arithmetic_smoke().update.training
