"""The methods of the unified paradigm as settings: each row of Table 10, and later methods, over one and the same base.

A method is three choices (DeepSeekMath, 5.2.1): a data source, what the gradient coefficient is made of, and the objective it
enters. `cohort methods` prints the table; `cohort run RECIPE --method NAME` trains one; `cohort compare` trains several.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any, Final, TypeVar, get_args

from flows.config import IterativeRLConfig, RewardModelPlan
from pipeline.config import Config, ConfigError
from pipeline.experiment import fitted_name
from stages.critic import CriticConfig
from stages.reward import RewardConfig, StepsConfig
from stages.rollout import RolloutConfig
from stages.update import ObjectiveConfig, Row, UpdateConfig

C = TypeVar("C", bound=Config)

PAPER: Final = ("sft", "rft", "dpo", "online_rft", "ppo", "grpo")
"""The rows of Table 10, in its order."""

_BY_RULE: Final = ("sft", "rft", "dpo", "online_rft", "dapo", "distillation")
"""The rows whose reward is the rule or none (Table 10), also where a recipe has a reward model for the others; and DAPO, whose
dynamic sampling asks how many outputs of a question are right."""

_WITH_REFERENCE: Final = ("dpo", "grpo", "grpo_process")
"""The methods whose update reads log pi_ref."""

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
    # On-policy distillation; whose, `teacher` says.
    "distillation": {"advantage": {"kind": "teacher"}, "update.objective": {"kind": "distillation"}},
}
"""Overrides by method; a section given whole starts from its own defaults."""


def check_method(name: Any) -> None:
    """Refuse what is not a method.

    Raises:
        ConfigError: no such method; the nearest is named.
    """
    if not isinstance(name, str) or name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"methods: {', '.join(METHODS)}"
        raise ConfigError(f"method {name!r} is unknown; {hint}")


def method_settings(name: str, base: IterativeRLConfig) -> dict[str, Any]:
    """Return what turns `base` into a run of the method, whatever method it was; raises as `settings_among`."""
    values = base.model_dump(mode="json")
    return settings_among(name, values, values)


def settings_among(name: str, before: Mapping[str, Any], settled: Mapping[str, Any]) -> dict[str, Any]:
    """Return what turns a configuration into a run of the method, as nested values that need not be valid yet.

    Args:
        before: the configuration that the method is applied to.
        settled: the same with the later changes too. What a method takes from other settings (the longest output, the
            policy's optimizer) is what they come to.

    Raises:
        ConfigError: no such method; the nearest is named.
    """
    check_method(name)
    learned = settled.get("reward_model")
    rules_know_steps = _built_in(settled) or not learned  # of others' questions only a model of completions does
    settings: dict[str, Any] = {
        "name": fitted_name(f"{without_method(str(before.get('name')))}-{name}"),
        "data_source": "policy",
        "dynamic_sampling": 0,
        "critic": None,
        "reward.components": _components(settled, steps=name == "grpo_process" and rules_know_steps),
        "update.old_logprobs": "rollout" if _lags(name, settled) else "trainer",
    }
    if name != "distillation":
        settings["teacher"] = None
    if name not in _WITH_REFERENCE:
        settings["reference_pass"] = "inline"
    if name in _BY_RULE:
        settings["reward_model"] = None
    if name == "grpo_process" and isinstance(learned, Mapping):
        settings |= _process_model(settled, learned)
    settings |= copy.deepcopy(METHODS[name])  # an override may write into it
    if settings["data_source"] != "policy":
        settings["update.correction"] = {"kind": "none"}  # it compares engine and trainer for the current policy
    if name == "ppo":
        settings["critic"] = before.get("critic") or _critic_like(settled)
    if name == "dr_grpo":
        longest = _fields(RolloutConfig, settled.get("rollout"), "max_output_tokens").max_output_tokens
        settings["update.objective"] = {"kind": "dr_grpo", "length": longest}
    return settings


def _lags(name: str, values: Mapping[str, Any]) -> bool:
    """Return whether the method's ratio is what accounts for outputs of an earlier policy (`overlap`): no correction does."""
    update = values.get("update")
    correction = update.get("correction") if isinstance(update, Mapping) else None
    corrected = isinstance(correction, Mapping) and correction.get("kind", "none") != "none"
    return values.get("overlap") == 1 and row_of(name).uses_ratio and not corrected


def row_of(name: str) -> Row:
    """Return what the method is in the table."""
    objectives = {each.model_fields["kind"].default: each for each in get_args(get_args(ObjectiveConfig)[0])}
    row: Row = objectives[METHODS[name]["update.objective"]["kind"]].ROW
    return row


def without_method(name: str) -> str:
    """Return the name of a run without that of the method at its end."""
    before, _, method = name.rpartition("-")
    return before if before and method in METHODS else name


def _fields(model: type[C], section: Any, *names: str) -> C:
    """Return some fields of a section; the defaults where it is not valid, which is reported with the whole."""
    given = section if isinstance(section, Mapping) else {}
    try:
        return model.parse({name: given[name] for name in names if name in given})
    except ConfigError:
        return model()


def _built_in(values: Mapping[str, Any]) -> bool:
    data = values.get("data")
    return isinstance(data, Mapping) and data.get("kind") == "arithmetic"


def _components(values: Mapping[str, Any], *, steps: bool) -> list[dict[str, Any]]:
    """Return the components; with `steps` one that scores steps, without it none whose only use is process supervision."""
    reward = _fields(RewardConfig, values.get("reward"), "components")
    used = [component for component in reward.components if component != StepsConfig()]
    if steps and not any(component.kind == "steps" for component in used):
        used.append(StepsConfig())
    return [component.model_dump(mode="json") for component in used or reward.components]


def _process_model(values: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan's models and, where none of them is one, a process model."""
    found = _fields(RewardModelPlan, plan, "models", "step_labels", "training")
    models = [model.model_dump(mode="json") for model in found.models]
    if any(model["kind"] == "process" for model in models):
        labels: str = found.step_labels.kind
    else:
        models.append({"kind": "process"})
        labels = "rules" if _built_in(values) else "monte_carlo"
    return {"reward_model.models": models, "reward_model.step_labels.kind": labels}


def _critic_like(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a critic trained as the policy is: same engine, optimizer and learning rate (ours; the paper gives none)."""
    update = _fields(UpdateConfig, values.get("update"), "mu", "mini_batches", "micro_batch_tokens", "training")
    critic = CriticConfig(
        mu=update.mu,
        mini_batches=update.mini_batches,
        micro_batch_tokens=update.micro_batch_tokens,
        training=update.training.model_copy(update={"adapter": None}),  # a critic is trained in full
    )
    return critic.model_dump(mode="json")
