"""Describe experiments as data: named arms, each a set of overrides of one base config, times seeds.

    experiment = Experiment(name="eps", asks="Does the clip range matter?", base="demo", baseline="usual",
                            arms={"usual": {}, "wide": {"update.objective.eps": 0.4}}, seeds=(0, 1, 2))
    for trial in trials(experiment, demo.override):
        run(trial.config)

The DAG of an experiment is not declared: what trials have in common is what stages find in the store.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Self, TypeVar

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from pipeline.config import Config, ConfigError, Override, changes_of

C = TypeVar("C", bound=Config)

_LONGEST: Final = 64
_NAME: Final = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,{_LONGEST - 1}}}")


class Experiment(Config):
    """Named arms over a base config, and the seeds that each is run with.

    Overrides have dotted keys; nested mappings mean the same (`{rollout: {G: 8}}` is `{rollout.G: 8}`), an arm that is empty is
    the base. They are applied in the order written (`changes`). What the keys mean is for whoever turns them into a config.
    """

    name: str
    "Name of the study: up to 64 letters a-z, digits and ._-"
    asks: str
    "What it is to find out, in a sentence."
    base: str
    "The config that the arms override: a name or a file, resolved by whoever runs the experiment."
    common: dict[str, Any] = Field(default={})
    "Overrides of the base for every arm; those of an arm come after them."
    arms: dict[str, dict[str, Any]] = Field(min_length=1)
    "Overrides by arm."
    baseline: str
    "The arm that the others are compared with."
    seeds: tuple[NonNegativeInt, ...] = Field((0,), min_length=1)
    "Values of the config's field `seed`; every arm is run with each."

    @field_validator("common", mode="before")
    @classmethod
    def _none_is_empty(cls, overrides: Any) -> Any:
        return {} if overrides is None else overrides

    @field_validator("arms", mode="before")
    @classmethod
    def _no_override_is_empty(cls, arms: Any) -> Any:
        if not isinstance(arms, Mapping):
            return arms
        return {name: {} if overrides is None else overrides for name, overrides in arms.items()}

    def changes(self, arm: str) -> list[Override]:
        """Return what an arm changes in the base: the common overrides, then its own."""
        return [*changes_of(self.common, "common"), *changes_of(self.arms[arm], f"arm {arm}")]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        complaints = [
            f"{what}: expected up to 64 letters a-z, digits and ._-, found {name!r}"
            for what, name in [("name", self.name), *(("arms", name) for name in self.arms)]
            if not _NAME.fullmatch(name)
        ]
        complaints += [
            f"{where}.seed: the seeds of an experiment are its own dimension; set seeds"
            for where, overrides in [("common", self.common), *((f"arms.{n}", o) for n, o in self.arms.items())]
            if any(change.key == "seed" for change in changes_of(overrides))
        ]
        if self.baseline not in self.arms:
            complaints.append(f"baseline: {_unknown_arm(self.baseline, self.arms)}")
        repeated = {seed: count for seed, count in Counter(self.seeds).items() if count > 1}
        complaints += [f"seeds: {seed} occurs {count} times" for seed, count in repeated.items()]
        if complaints:
            raise ValueError("\n  ".join(complaints))
        return self


@dataclass(frozen=True)
class Trial(Generic[C]):
    """One arm with one seed."""

    arm: str
    also: tuple[str, ...]
    """Further arms that come to the same config: run once, as this one."""
    seed: int
    config: C


def trials(experiment: Experiment, configure: Callable[[list[Override]], C]) -> list[Trial[C]]:
    """Return every arm with every seed, seed by seed. Arms of equal configs are one trial under several names.

    Args:
        configure: returns the config that changes make of the base; its field `seed` is set here.

    Raises:
        ConfigError: what is wrong in any arm, all at once; what is wrong in the same way in several arms, once.
    """
    configs: dict[str, C] = {}
    complaints: dict[str, list[str]] = {}
    for arm in experiment.arms:
        try:
            configs[arm] = configure(experiment.changes(arm)).override({"seed": experiment.seeds[0]})
        except ConfigError as error:
            text = _without_source(str(error)).replace(f"(from arm {arm})", "(from the arm)")
            complaints.setdefault(text, []).append(arm)
    if complaints:
        lines = [f"  arm{'s' * (len(arms) > 1)} {', '.join(arms)}:\n    {what}" for what, arms in complaints.items()]
        raise ConfigError("\n".join([f"experiment {experiment.name}: nothing was run", *lines]))
    groups = _equal(configs, experiment.baseline)
    return [
        Trial(arm, also, seed, configs[arm].override({"seed": seed}))
        for seed in experiment.seeds
        for arm, also in groups.items()
    ]


def selected(planned: Sequence[Trial[C]], arms: Sequence[str]) -> list[Trial[C]]:
    """Return the trials of these arms, under any of their names; raise ConfigError, with the nearest, for an unknown arm."""
    known = {name: trial.arm for trial in planned for name in (trial.arm, *trial.also)}
    for arm in arms:
        if arm not in known:
            raise ConfigError(f"--arm: {_unknown_arm(arm, known)}")
    return [trial for trial in planned if trial.arm in {known[arm] for arm in arms}]


def fitted_name(text: str) -> str:
    """Return a name made of several parts; where it is too long, a digest of the whole replaces its middle."""
    if len(text) <= _LONGEST:
        return text
    side = (_LONGEST - 10) // 2
    return f"{text[:side]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}-{text[-side:]}"


def _equal(configs: Mapping[str, C], baseline: str) -> dict[str, tuple[str, ...]]:
    """Return arm -> the others that equal it; the first in the order of the arms represents them, or the baseline."""
    groups: list[list[str]] = []
    for arm, config in configs.items():
        group = next((group for group in groups if configs[group[0]] == config), None)
        if group is None:
            groups.append([arm])
        else:
            group.insert(0 if arm == baseline else len(group), arm)
    return {first: tuple(others) for first, *others in groups}


def _without_source(text: str) -> str:
    """Return an error of `Config.parse` without its first line, the count."""
    first, _, rest = text.partition("\n")
    return rest.strip().replace("\n", "\n  ") if rest else first


def _unknown_arm(name: str, arms: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, arms, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"arms: {', '.join(arms)}"
    return f"{name!r} is not an arm; {hint}"
