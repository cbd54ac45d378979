"""The methods of the unified paradigm as settings: each row of Table 10, and later methods, over one and the same base.

A method is three choices (DeepSeekMath, 5.2.1): a data source, what the gradient coefficient is made of, and the objective it
enters. `cohort methods` prints the table; `cohort run RECIPE --method NAME` trains one; `cohort compare` trains several.
"""

from __future__ import annotations

import copy
import difflib
from typing import Any, Final

from flows.config import IterativeRLConfig, RewardModelPlan
from pipeline.config import ConfigError
from stages.critic import CriticConfig
from stages.reward import StepsConfig
from stages.reward.config import ComponentConfig

__all__ = ["METHODS", "PAPER", "check_method", "method_settings"]

PAPER: Final = ("sft", "rft", "dpo", "online_rft", "ppo", "grpo")
"""The rows of Table 10, in its order."""

_BY_RULE: Final = ("sft", "rft", "dpo", "online_rft")
"""The rows whose reward is the rule (Table 10), also where a recipe has a reward model for the others."""

METHODS: Final[dict[str, dict[str, Any]]] = {
    # Table 10.
    "sft": {"data_source": "demonstrations", "advantage": {"kind": "one"}, "update.objective": {"kind": "sft"}},
    "rft": {"data_source": "initial_policy", "advantage": {"kind": "correct"}, "update.objective": {"kind": "rft"}},
    "dpo": {"data_source": "initial_policy", "advantage": {"kind": "pairs"}, "update.objective": {"kind": "dpo"}},
    "online_rft": {
        "data_source": "policy",
        "advantage": {"kind": "correct"},
        "update.objective": {"kind": "online_rft"},
    },
    "ppo": {
        "data_source": "policy",
        "advantage": {"kind": "gae"},
        "update.objective": {"kind": "ppo"},
    },
    "grpo": {"data_source": "policy", "advantage": {"kind": "group"}, "update.objective": {"kind": "grpo"}},
    # Process supervision (4.1.3); the reward needs a component that scores steps.
    "grpo_process": {
        "data_source": "policy",
        "advantage": {"kind": "group", "supervision": "process"},
        "update.objective": {"kind": "grpo"},
    },
    # Later methods.
    "dr_grpo": {"advantage": {"kind": "group", "scale": "none"}, "update.objective": {"kind": "dr_grpo"}},
    "dapo": {"dynamic_sampling": 3, "advantage": {"kind": "group"}, "update.objective": {"kind": "dapo"}},
    "gspo": {"advantage": {"kind": "group"}, "update.objective": {"kind": "gspo"}},
    "cispo": {"advantage": {"kind": "group"}, "update.objective": {"kind": "cispo"}},
    "rloo": {
        "advantage": {"kind": "group", "baseline": "leave_one_out", "scale": "none", "kl_in_reward": 0.04},
        "update.objective": {"kind": "rloo"},
    },
    "reinforce_plus_plus": {
        "advantage": {"kind": "batch"},
        "update.objective": {"kind": "reinforce_plus_plus"},
    },
}
"""Overrides by method; a section given whole starts from its own defaults."""


def check_method(name: str) -> None:
    """Refuse what is not a method.

    Raises:
        ConfigError: no such method; the nearest is named.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"methods: {', '.join(METHODS)}"
        raise ConfigError(f"method {name!r} is unknown; {hint}")


def method_settings(name: str, base: IterativeRLConfig) -> dict[str, Any]:
    """What turns `base` into a run of the method, whatever method it was.

    Raises:
        ConfigError: no such method; the nearest is named.
    """
    check_method(name)
    before, _, method = base.name.rpartition("-")
    settings: dict[str, Any] = {
        "name": f"{before if method in METHODS else base.name}-{name}",
        "data_source": "policy",
        "dynamic_sampling": 0,
        "critic": None,
        "reward.components": _components(base, steps=name == "grpo_process" and _rules_know_steps(base)),
        "update.old_logprobs": "trainer",
    }
    if name in _BY_RULE:
        settings["reward_model"] = None
    if name == "grpo_process" and base.reward_model:
        settings |= _process_model(base, base.reward_model)
    settings |= copy.deepcopy(METHODS[name])  # an override may write into it
    if settings["data_source"] != "policy":
        settings["update.correction"] = {"kind": "none"}  # it compares engine and trainer for the current policy
    if name == "ppo":
        settings["critic"] = (base.critic or _critic_like(base)).model_dump(mode="json")
    if name == "dr_grpo":
        settings["update.objective"] = {"kind": "dr_grpo", "length": base.rollout.max_output_tokens}
    return settings


def _components(base: IterativeRLConfig, *, steps: bool) -> list[dict[str, Any]]:
    """The base's components; with `steps` one that scores steps, without it none whose only use is process supervision."""
    used: list[ComponentConfig] = [component for component in base.reward.components if component != StepsConfig()]
    if steps and not any(component.kind == "steps" for component in used):
        used.append(StepsConfig())
    return [component.model_dump(mode="json") for component in used or base.reward.components]


def _rules_know_steps(base: IterativeRLConfig) -> bool:
    """Of the built-in world's questions; of others' only a model that learned from completions of each step."""
    return base.data.kind == "arithmetic" or base.reward_model is None


def _process_model(base: IterativeRLConfig, plan: RewardModelPlan) -> dict[str, Any]:
    """The plan's models and, where none of them is one, a process model."""
    models = [model.model_dump(mode="json") for model in plan.models]
    if any(model["kind"] == "process" for model in models):
        labels = plan.step_labels.kind
    else:
        models.append({"kind": "process"})
        labels = "rules" if base.data.kind == "arithmetic" else "monte_carlo"
    return {"reward_model.models": models, "reward_model.step_labels.kind": labels}


def _critic_like(base: IterativeRLConfig) -> CriticConfig:
    """A critic trained as the policy is: same engine, optimizer and learning rate (ours; the paper gives none)."""
    training = base.update.training.model_copy(update={"adapter": None})  # a critic is trained in full
    return CriticConfig(mu=base.update.mu, micro_batch_tokens=base.update.micro_batch_tokens, training=training)
