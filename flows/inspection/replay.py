"""Repeat a recorded stage call with other settings: its artifacts from the store, its configs as the run had them.

The arguments are rebuilt from the action record through the signature of the stage: artifacts by digest, configs typed. A
config in a record lacks what cannot change a result (worker counts, deadlines). That comes from the run's own configuration
where it holds an equal config, else from the defaults.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, create_model

import stages
from flows.config import IterativeRLConfig
from flows.inspection.history import BETWEEN_STEPS, History, PlacedCall, placed_calls
from pipeline.artifact import Artifact
from pipeline.config import Config, ConfigError, parse_settings
from pipeline.derivation.arguments import describe
from pipeline.lineage import inputs
from pipeline.store import Store

_CONFIG: Final = "config"
"""The parameter that settings belong to when they name none."""


@dataclass(frozen=True)
class Replay:
    """A call ready to be made."""

    stage: Callable[..., Artifact]
    arguments: dict[str, Any]
    recorded: dict[str, Any]
    """The record of the call it repeats."""

    def run(self) -> Artifact:
        """Make the call, cached like any other; raise StoreError, with the command to recompute it, where an input is gone."""
        return self.stage(**self.arguments)


def choose_call(run: History, stage: str, step: int, evaluation: str | None) -> PlacedCall:
    """Return the call of a stage at a step of a run, or in an evaluation (`in_domain/sampled`) after it.

    Raise ConfigError where there is no such stage (the nearest is named), or none there (the steps of its calls are named).
    """
    name = run.record.folder.name
    calls = placed_calls(run.ledger)
    of_stage = [call for call in calls if call.stage == stage]
    if not of_stage:
        known = list(dict.fromkeys(call.stage for call in calls))
        near = difflib.get_close_matches(stage, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it called {', '.join(known) or 'nothing yet'}"
        raise ConfigError(f"{stage}: {name} called no such stage; {hint}")
    here = [call for call in of_stage if call.step == step]
    if not here:
        raise ConfigError(f"--step {step}: {name} called {stage} at {_steps(call.step for call in of_stage)}")
    if evaluation is not None:
        found = [call for call in here if call.where == evaluation]
        if not found:
            raise ConfigError(f"--evaluation {evaluation}: expected one of {_evaluations(here) or 'none at this step'}")
        return found[-1]
    for where in ("", BETWEEN_STEPS):
        if found := [call for call in here if call.where == where]:
            return found[-1]
    if len(here) > 1:
        raise ConfigError(
            f"{stage} is part of several evaluations after step {step}: add --evaluation {_evaluations(here)}"
        )
    return here[0]


def prepare_replay(store: Store, run: History, call: PlacedCall, settings: Sequence[str]) -> Replay:
    """Return the call with `settings` (`key=value`) applied.

    A key is a dotted field of the stage's `config`, or begins with the name of a parameter: `seed=3`, `prompt.suffix=...`. An
    artifact is replaced by a digest or its beginning: `policy=06f5e3`.

    Raises:
        ConfigError: a field that does not exist (the nearest is named), or all that is wrong in the result.
    """
    recorded = store.action(call.key)
    function = _find_stage(call.stage)
    hints = typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    changes = parse_settings(settings)
    artifacts: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for name, value in recorded["arguments"].items():
        if name not in hints:
            raise ConfigError(f"{call.stage}: this version of the stage has no parameter {name!r}; its record is older")
        if any(True for _ in inputs({name: value})):
            artifacts[name] = _artifacts(store, value, hints[name])
        else:
            plain[name] = value
    replaceable = {name for name, artifact in artifacts.items() if isinstance(artifact, Artifact)}
    for change in (change for change in changes if change.key in replaceable):
        artifacts[change.key] = _artifact(store, store.resolve(str(change.value)), hints[change.key])
    values = _typed(call.stage, hints, plain, run.config)
    others = [change._replace(key=_dotted(change.key, values)) for change in changes if change.key not in replaceable]
    values = values.override(others, source=f"replay {call.stage}")
    return Replay(function, {**artifacts, **{name: getattr(values, name) for name in plain}}, recorded)


def _find_stage(name: str) -> Callable[..., Artifact]:
    """Return the stage of that name, wherever a package of `stages` offers it."""
    for module in pkgutil.iter_modules(stages.__path__):
        found = getattr(importlib.import_module(f"{stages.__name__}.{module.name}"), name, None)
        if inspect.isfunction(found) and hasattr(found, "__wrapped__"):
            return typing.cast("Callable[..., Artifact]", found)
    raise ConfigError(f"{name}: this version of Cohort has no such stage")


def _typed(stage: str, hints: Mapping[str, Any], plain: Mapping[str, Any], config: IterativeRLConfig) -> Config:
    """Return configs and plain values of a call as one config with a field per parameter."""
    fields: dict[str, Any] = {name: (hints[name], ...) for name in plain}
    model: type[Config] = create_model(stage, __base__=Config, **fields)
    known = list(_configs(config))
    values = {name: _values(value, known) for name, value in plain.items()}
    return model.parse(values, source=f"the recorded call of {stage}")


def _values(recorded: Any, known: Iterable[Config]) -> Any:
    """Return a recorded config as what it was made from; any other value as it is."""
    match recorded:
        case {"config": dict(key), **rest} if not rest:
            equal = (config.model_dump(mode="json") for config in known if describe(config) == recorded)
            return next(equal, key)
        case list():
            return [_values(part, known) for part in recorded]
    return recorded


def _configs(config: BaseModel) -> Iterator[Config]:
    """Yield a config and those in it."""
    if isinstance(config, Config):
        yield config
    for name in type(config).model_fields:
        value = getattr(config, name)
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else [value]
        for part in parts:
            if isinstance(part, BaseModel):
                yield from _configs(part)


def _artifacts(store: Store, value: Any, hint: Any) -> Any:
    """Return references in place of recorded digests, in the containers that the parameter has them in."""
    inner = [part for part in typing.get_args(hint) if part is not types.NoneType]
    match value:
        case {"artifact": str(digest)}:
            return _artifact(store, digest, hint)
        case dict():
            return {name: _artifacts(store, part, inner[-1]) for name, part in value.items()}
        case list():
            hints = inner if len(inner) == len(value) else inner[:1] * len(value)
            parts = [_artifacts(store, part, each) for part, each in zip(value, hints, strict=True)]
            return tuple(parts) if typing.get_origin(hint) is tuple else parts
    return value


def _artifact(store: Store, digest: str, hint: Any) -> Artifact:
    """Return the reference as what the parameter takes; of several classes, the one that the artifact is of."""
    parts = (part for part in (hint, *typing.get_args(hint)) if isinstance(part, type))
    kinds = [part for part in parts if issubclass(part, Artifact)]
    if len(kinds) > 1:
        made = store.manifest(digest).get("type")
        kinds = [kind for kind in kinds if kind.__name__ == made] or kinds
    return kinds[0](digest)


def _dotted(key: str, values: Config) -> str:
    """Return a key as it is if it begins with the name of a parameter, else below `config` (or the only config there is).

    Raise ConfigError where it begins with what is nearly the name of a parameter.
    """
    first = key.partition(".")[0]
    parameters = type(values).model_fields
    configs = [name for name in parameters if isinstance(getattr(values, name), Config)]
    if first in parameters or not configs:
        return key
    owner = _CONFIG if _CONFIG in configs else configs[-1]
    near = difflib.get_close_matches(first, parameters, n=1, cutoff=0.75)
    if near and first not in type(getattr(values, owner)).model_fields:
        raise ConfigError(f"--set {key}: the stage has no parameter {first!r}; did you mean {near[0]!r}?")
    return f"{owner}.{key}"


def _steps(steps: Iterable[int]) -> str:
    """Write `step 0 only`, `steps 1 to 40`, `steps 0, 10, 20`."""
    found = sorted(set(steps))
    if len(found) == 1:
        return f"step {found[0]} only"
    if found == list(range(found[0], found[-1] + 1)):
        return f"steps {found[0]} to {found[-1]}"
    return f"steps {', '.join(map(str, found))}"


def _evaluations(calls: Iterable[PlacedCall]) -> str:
    return " or ".join(dict.fromkeys(call.where for call in calls if call.where not in ("", BETWEEN_STEPS)))
