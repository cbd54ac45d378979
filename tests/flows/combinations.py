"""Every combination of the settings that make a method, read from the configuration classes; which are refused, and why.

An axis is a field of type Literal or bool, with all its values, or a number at which something begins to exist (a KL term, a
second optimizer step). Nothing here lists methods or values by hand, so that a new one is a new combination.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from flows.config import IterativeRLConfig, PretrainedPolicy, RewardModelPlan
from flows.config.combinations import unsupported_combinations
from flows.config.recipes import arithmetic_smoke
from pipeline.config import Config, ConfigError
from stages.advantage import AdvantageConfig
from stages.critic import CriticConfig
from stages.environment import EnvironmentConfig, ToolCallsConfig
from stages.reward_training import RewardModelConfig
from stages.update import DataSource, ObjectiveConfig, TruncatedCorrectionConfig, UpdateConfig

NUMBERS: Final[dict[str, tuple[float, ...]]] = {"kl_in_reward": (0.0, 0.1), "beta": (0.0, 0.5)}
"""Fields of numbers where 0 is another method than what is above it; a field may refuse one of them."""
NEEDED: Final = {"constant": {"length": 32}}
"""What a value of an axis cannot be without."""
TEACHER: Final = PretrainedPolicy(path="teacher")
_OTHERS: Final = 7
"""Of so many refused combinations one is asked for every complaint, the others for the first: a quarter of the time, and each
complaint is still met."""
STATISTICS: Final = ("ddof", "degenerate", "truncated")
"""Fields of advantages that nothing outside them depends on."""


def axes(model: type[Config], fixed: tuple[str, ...] = ()) -> dict[str, tuple[Any, ...]]:
    """The axes of a configuration class: what each of its fields may be."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, hint in get_type_hints(model).items():
        if name not in model.model_fields or name == "kind" or name in fixed:
            continue
        if get_origin(hint) is Literal:
            found[name] = get_args(hint)
        elif hint is bool:
            found[name] = (False, True)
        elif name in NUMBERS:
            found[name] = NUMBERS[name]
    return found


def variants(union: Any, fixed: tuple[str, ...] = ()) -> Iterator[Config | None]:
    """Each class of a union with each combination of its axes; None for one that the class refuses."""
    for model in get_args(get_args(union)[0]):
        given = axes(model, fixed)
        for values in itertools.product(*given.values()):
            settings = dict(zip(given, values, strict=True))
            for value in values:
                settings |= NEEDED.get(value, {}) if isinstance(value, str) else {}
            yield made(model, settings)


def made(model: type[Config], settings: dict[str, Any]) -> Any:
    """The configuration, or None where the class refuses it, which it must say why."""
    try:
        return model.parse(settings)
    except ConfigError as error:
        if "unknown" in str(error):
            raise  # no refusal, but a setting that does not exist
        return None


@dataclass(frozen=True)
class Space:
    """All values of all axes, None standing for what a part of the configuration refuses by itself."""

    objectives: list[Any]
    advantages: list[Any]
    steps: list[tuple[int, int]]
    """mu and mini_batches."""
    old_logprobs: tuple[str, ...]
    corrections: list[dict[str, Any]]
    sources: tuple[DataSource, ...]
    rewards: list[RewardModelPlan | None]
    """None: rules."""
    environments: list[Any]
    """None: outputs of one turn."""
    dynamic: tuple[int, ...] = (0, 1)

    @property
    def size(self) -> int:
        """The number of combinations."""
        size = 1
        for axis in vars(self).values():
            size *= len(axis)
        return size

    def updates(self) -> Iterator[UpdateConfig]:
        """Every update that its own class accepts."""
        for objective in filter(None, self.objectives):
            for (mu, mini_batches), old, correction in itertools.product(
                self.steps, self.old_logprobs, self.corrections
            ):
                settings = {"mu": mu, "mini_batches": mini_batches, "old_logprobs": old, "correction": correction}
                update = made(UpdateConfig, {"objective": objective.model_dump(mode="json"), **settings})
                if update is not None:
                    yield update

    def allowed(self) -> Iterator[IterativeRLConfig]:
        """Every combination that a run accepts, as its configuration: without an environment first, then with each.

        An environment refuses more and allows nothing: what is refused without one is asked with one now and then.
        """
        base, said, place = base_run(), set[str](), itertools.count()
        advantages = [advantage for advantage in self.advantages if advantage is not None]
        critics = {number: CriticConfig(mini_batches=number) for _, number in self.steps}
        for update in self.updates():
            for advantage, source, plan, dynamic in itertools.product(
                advantages, self.sources, self.rewards, self.dynamic
            ):
                parts = {
                    "update": update,
                    "advantage": advantage,
                    "data_source": source,
                    "reward_model": plan,
                    "dynamic_sampling": dynamic,
                    "critic": critics[update.mini_batches] if advantage.kind == "gae" else None,
                    "teacher": TEACHER if "teacher" in (advantage.kind, source) else None,
                }
                config = base.model_copy(update=parts)
                complaints = unsupported_combinations(config)
                if (first := next(complaints, None)) is None:
                    for environment in self.environments:
                        turns = with_turns(config, environment)
                        if not (found := set(unsupported_combinations(turns))):
                            yield turns
                        said |= found
                    continue
                said.add(first)
                if (number := next(place)) % _OTHERS == 0:
                    others = {first, *complaints}
                    said |= others
                    if number % (10 * _OTHERS) == 0:
                        for environment in self.environments:
                            assert others <= set(unsupported_combinations(with_turns(config, environment)))
        assert all(re.match(r"[a-z_.]+[:=].{30}", complaint) for complaint in said), said


def with_turns(config: IterativeRLConfig, environment: Any) -> IterativeRLConfig:
    """The configuration with an environment, and with the template that writes its answers where it needs one."""
    chat = "tokenizer" if isinstance(environment, ToolCallsConfig) else "none"
    prompt = config.prompt.model_copy(update={"chat": chat})
    return config.model_copy(update={"environment": environment, "prompt": prompt})


@functools.cache
def base_run() -> IterativeRLConfig:
    """A run in the built-in world, whose rules know steps."""
    steps = [{"kind": "accuracy", "verifier": "exact"}, {"kind": "steps"}]
    return arithmetic_smoke().override({"reward.components": steps, "sft": None})


def space(*, whole: bool) -> Space:
    """The whole space, or without the fields of advantages that nothing else depends on."""
    kinds = get_args(get_type_hints(RewardModelConfig)["kind"])
    levels = axes(TruncatedCorrectionConfig)["level"]
    return Space(
        objectives=list(variants(ObjectiveConfig)),
        advantages=list(variants(AdvantageConfig, () if whole else STATISTICS)),
        steps=[(1, 1), (2, 1), (1, 2), (2, 2)],
        old_logprobs=axes(UpdateConfig)["old_logprobs"],
        corrections=[{"kind": "none"}, *({"kind": "truncated", "level": level} for level in levels)],
        sources=get_args(DataSource),
        # A function and an environment of verifiers need what is the user's.
        environments=[None, *filter(None, variants(EnvironmentConfig))],
        rewards=[None, *(RewardModelPlan.parse({"models": [{"kind": kind}]}) for kind in kinds)],
    )
