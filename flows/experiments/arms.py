"""Experiments as runs: every arm with every seed as a configuration, checked before any runs, and how arms differ."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from flows.config import IterativeRLConfig
from flows.config.methods import check_method, without_method
from flows.config.resolve import Choice, choice_of, choose, read_overrides
from flows.runs.curve import COLOURS
from pipeline.config import Config, ConfigError, Override, flatten, parse_settings
from pipeline.experiment import Experiment, Trial, fitted_name, selected, trials
from pipeline.store import canonical_json, sha256_of

Changes = Mapping[str, tuple[Any, Any]]
"""Dotted key -> what it was, what it is."""
_NOT_SETTINGS: Final = ("name", "experiment", "seed")
"""Fields that distinguish runs and are no part of what an arm is."""


@dataclass(frozen=True)
class Arm:
    """One arm of an experiment with one seed: a run."""

    name: str
    seed: int
    choice: Choice
    also: tuple[str, ...] = ()
    """Further names of the arm: arms that came to the same configuration."""

    @property
    def label(self) -> str:
        """All its names."""
        return " = ".join([self.name, *self.also])

    @property
    def plan(self) -> str:
        """How much it trains."""
        config = self.choice.config
        batch = f"{config.questions_per_step} questions x {config.rollout.G} outputs"
        return f"{config.iterations} x {config.steps} steps of {batch}"


@dataclass(frozen=True)
class PlannedExperiment:
    """An experiment whose arms were found to be valid."""

    experiment: Experiment
    arms: tuple[Arm, ...]
    """Every arm with every seed, seed by seed. Each choice is compared with the recipe."""
    chosen: tuple[Arm, ...]
    """Those of them that are to run."""

    @property
    def names(self) -> list[str]:
        """The arms, equal ones once."""
        return list(dict.fromkeys(arm.name for arm in self.arms))

    def against_baseline(self, arm: Arm) -> Choice:
        """Compare the arm's configuration with that of the baseline with the same seed."""
        baseline = self.experiment.baseline
        (other,) = (one for one in self.arms if one.seed == arm.seed and baseline in (one.name, *one.also))
        return replace(arm.choice, base=other.choice.config)

    def differences(self, arm: Arm) -> Changes:
        """Return what the arm sets otherwise than the baseline.

        Of a section of another kind, or that the baseline lacks, what is not its default; of the latter also its name, with
        `...` for what it is now.
        """
        choice = self.against_baseline(arm)
        known, changes = flatten(choice.base.model_dump(mode="json")), choice.differences()
        begun = {key: (None, "...") for key in known if any(name.startswith(f"{key}.") for name in changes)}
        return begun | {
            key: change
            for key, change in changes.items()
            if key not in _NOT_SETTINGS and (key in known or not _is_default(choice.config, key))
        }

    def settings(self, arm: Arm) -> dict[str, Any]:
        """Return what the arm sets otherwise than the baseline: MLflow's parameters `diff.*`."""
        return {key: now for key, (_, now) in self.differences(arm).items()}

    def tags(self, arm: Arm) -> dict[str, str]:
        """Return a run's tags in MLflow: arm, seed, colour, and the run it belongs to."""
        return {
            "arm": arm.name,
            "seed": str(arm.seed),
            "cohort.parent_key": self.experiment.name,
            "mlflow.runColor": COLOURS[self.names.index(arm.name) % len(COLOURS)],
        }


def plan(
    experiment: Experiment,
    *,
    files: Sequence[Path] = (),
    settings: Sequence[str] = (),
    only: Sequence[str] = (),
    own_names: bool = True,
) -> PlannedExperiment:
    """Plan every arm with every seed as a run; all are checked before any runs.

    Args:
        files, settings: overrides for every arm, after its own.
        only: names of the arms to run; none means all.
        own_names: runs are named after the experiment, and MLflow's experiment is called so; else as the base says.

    Raises:
        ConfigError: whatever is wrong in any arm.
    """
    later = [change for file in files for change in read_overrides(file)] + parse_settings(settings)
    _refuse_methods_twice(experiment, later)
    if own_names:
        _refuse_seeds(later)
    choices: list[Choice] = []
    own = {"name": experiment.name, "experiment": experiment.name} if own_names else {}
    names = [Override(key, value, "the experiment") for key, value in own.items()]

    def configure(arm: list[Override]) -> IterativeRLConfig:
        choice = choose(experiment.base, files, settings, overrides=names + arm)
        choices.append(choice)
        # The method is the arm's, whose name is added to that of the run below.
        methods = any(change.key == "method" for change in arm)
        return choice.config.override({"name": without_method(choice.config.name)}) if methods else choice.config

    planned = trials(experiment, configure)
    wanted = selected(planned, only) if only else planned
    chosen = dict(zip(experiment.arms, choices, strict=True))
    arms = {(trial.arm, trial.seed): _arm(trial, chosen[trial.arm]) for trial in planned}
    return PlannedExperiment(experiment, tuple(arms.values()), tuple(arms[one.arm, one.seed] for one in wanted))


def _refuse_methods_twice(experiment: Experiment, later: Sequence[Override]) -> None:
    """Refuse a method for every arm, which would take their own methods away."""
    named = [arm for arm in experiment.arms if any(change.key == "method" for change in experiment.changes(arm))]
    for change in later:
        if named and change.key == "method":
            raise ConfigError(
                f"method={change.value} (from {change.source}) would replace that of the arms {', '.join(named)}; "
                "name methods in the arms, or with --method of `cohort compare`"
            )


def _refuse_seeds(later: Sequence[Override]) -> None:
    for change in later:
        if change.key == "seed":
            raise ConfigError(
                f"{change.source} seed: the seeds of an experiment are given by --seeds, for example --seeds 4,5"
            )


def _arm(trial: Trial[IterativeRLConfig], choice: Choice) -> Arm:
    """Make the run of a trial, named after its arm and seed, which come after all that was asked for."""
    config = trial.config.override({"name": fitted_name(f"{trial.config.name}-{trial.arm}-s{trial.seed}")})
    return Arm(trial.arm, trial.seed, choice_of(config, choice.asked, "the experiment", choice.base), trial.also)


def method_experiment(
    recipe: str, methods: Sequence[str], seeds: int, *, files: Sequence[Path] = (), settings: Sequence[str] = ()
) -> PlannedExperiment:
    """Plan the experiment whose arms are methods, from one supervised policy, with seeds counted up from the recipe's.

    Each arm is what `cohort run RECIPE --method METHOD` with the same files and settings would train.

    Raises:
        ConfigError: an unknown method, or one that the recipe or a setting does not fit.
    """
    for method in methods:
        check_method(method)
    arms = {method: {"method": method} for method in methods}
    first, name = 0, "methods"
    with contextlib.suppress(ConfigError):  # raised again below, with those of the other arms
        choice = choose(recipe, files, settings, method=methods[0])
        first, name = choice.config.seed, f"{choice.base.name[:40]}-methods"
    experiment = Experiment(
        name=name, asks="", base=recipe, arms=arms, baseline=methods[0], seeds=tuple(range(first, first + seeds))
    )
    planned = plan(experiment, files=files, settings=settings, own_names=False)
    # Another set of arms has results of its own.
    digest = sha256_of(canonical_json([arm.choice.config.identity() for arm in planned.arms]))
    return replace(planned, experiment=experiment.override({"name": f"{name}-{digest[:8]}"}))


def _is_default(config: Config, key: str) -> bool:
    """Return whether a dotted key has the value that its own part of the config begins with; never for a kind."""
    *parents, name = key.split(".")
    part: Any = config
    for parent in parents:
        part = part.get(parent) if isinstance(part, Mapping) else getattr(part, parent, None)
    if name == "kind" or not isinstance(part, Config):
        return False
    return bool(getattr(part, name) == type(part).model_fields[name].get_default(call_default_factory=True))
