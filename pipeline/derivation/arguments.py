"""Arguments of stage calls: as part of a cache key, and as JSON from which another process, or a later one, calls again.

Artifacts travel by name, configs as their values; their classes are among those that the function is annotated with.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.artifact import Artifact
from pipeline.config import Config


def describe(value: Any) -> Any:
    """Return the part of a cache key for one argument: a name, the keyed part of a config, or a plain value.

    Raise TypeError for anything else: stages exchange values, not places or objects.
    """
    if isinstance(value, Artifact):
        return {"artifact": value.digest}
    if isinstance(value, Config):
        return {"config": value.key()}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [describe(part) for part in value]
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise TypeError("a mapping given to a stage has text keys only")
        return {name: describe(part) for name, part in value.items()}
    raise TypeError(f"a stage takes artifacts, configs and plain values, found {type(value).__name__}")


def write_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], *, keyed: bool) -> dict[str, Any]:
    """Return the arguments of a call of `function` as JSON.

    Args:
        keyed: of configs only the part that belongs to the cache key. What is left out can change no result, and may be a
            command: a record that others may have written must not bring one.

    Raises:
        TypeError: an argument is not of the class its parameter is annotated with.
    """
    kinds = kinds_of(function)
    return {parameter: _written(parameter, value, kinds, keyed=keyed) for parameter, value in arguments.items()}


def read_arguments(function: Callable[..., Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `write_arguments` wrote; raise ValueError for what it does not write, KeyError for another parameter."""
    kinds = kinds_of(function)
    return {parameter: _read(value, kinds[parameter]) for parameter, value in written.items()}


def _written(parameter: str, value: Any, kinds: Mapping[str, Any], *, keyed: bool) -> Any:
    if isinstance(value, list | tuple) and any(isinstance(part, Artifact) for part in value):
        (kind,) = typing.get_args(kinds[parameter]) or (None,)
        return {"list": [_written(parameter, part, {parameter: kind}, keyed=keyed) for part in value]}
    if not isinstance(value, Artifact | Config):
        return {"value": value}
    name = type(value).__name__
    if type(value) is not _classes(kinds[parameter]).get(name):
        raise TypeError(f"{parameter}: expected {kinds[parameter]}, found {name}")
    if isinstance(value, Artifact):
        return {"artifact": value.digest, "action": value.action, "class": name}
    return {"config": value.key() if keyed else value.model_dump(mode="json"), "class": name}


def _read(written: Mapping[str, Any], kind: Any) -> Any:
    match written:
        case {"artifact": digest, "action": action, "class": name}:
            return _classes(kind)[name](digest, action)
        case {"config": values, "class": name}:
            return _classes(kind)[name].parse(values)
        case {"value": value}:
            return value
        case {"list": [*parts]}:
            (kind,) = typing.get_args(kind)
            return [_read(part, kind) for part in parts]
        case _:
            raise ValueError(f"expected an artifact, a config or a value, found {written!r:.100}")


def _classes(kind: Any) -> dict[str, Any]:
    """Return the classes of artifacts and configs that an annotation allows, by name."""
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return {part.__name__: part for part in parts if inspect.isclass(part) and issubclass(part, Artifact | Config)}


kinds_of = functools.cache(typing.get_type_hints)
