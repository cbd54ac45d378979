"""The body of a stage executed by other processes: the call and its result as JSON.

Artifacts travel as digests, configs as their values; their classes are among those that the function is annotated with, which
both sides have. An order holds no code and nothing pickled; the receiver looks the function up among those that it
offers. Cache, locks and the record of the call stay with the process that gives the order.
"""

from __future__ import annotations

import functools
import inspect
import os
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from pipeline.artifact import Artifact
from pipeline.config import Config
from pipeline.progress import listen
from pipeline.stage import describe
from pipeline.store import Store, current_store, use_store
from pipeline.store.context import Call, current_call, record_metrics, running

_OURS: Final = tuple(str(Path(__file__).parents[2] / package) + os.sep for package in ("pipeline", "stages"))


def order_of(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the order to call `function`, which the other side knows as `name`, for the running stage and its store.

    Raise TypeError for an argument that is not of the class its parameter is annotated with.
    """
    kinds, call = _kinds(function), current_call()
    return {
        "function": name,
        "store": str(current_store().root),
        "trusted": sorted(current_store().trusted),
        "call": call and {"stage": call.stage, "version": call.version, "arguments": call.arguments},
        "arguments": {parameter: _written(parameter, value, kinds) for parameter, value in arguments.items()},
        "described": {parameter: describe(value) for parameter, value in arguments.items()},
    }


def perform(
    order: Mapping[str, Any], function: Callable[..., Artifact], report: Callable[[str, dict[str, Any]], None]
) -> dict[str, Any]:
    """Execute an order: call `function` on what it names and pass on its progress.

    Raise ValueError where the arguments are not those that were sent: the two sides run different code.
    """
    kinds, given = _kinds(function), order["arguments"]
    arguments = {parameter: _read(value, kinds[parameter]) for parameter, value in given.items()}
    if {parameter: describe(value) for parameter, value in arguments.items()} != order["described"]:
        raise ValueError(
            f"{order['function']}: arguments differ from those that were sent; was the code changed since?"
        )
    store = _store(order["store"])
    store.trusted = set(order["trusted"])  # what this order's configuration pins, and none before it
    call = Call(**(order["call"] or {"stage": order["function"], "version": "", "arguments": {}}))
    with running(call), use_store(store), listen(report), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        result = function(**arguments)
    ours = [str(warning.message) for warning in caught if warning.filename.startswith(_OURS)]
    return {"digest": result.digest, "metrics": call.metrics, "warnings": list(dict.fromkeys(ours))}


def accept(reply: Mapping[str, Any], function: Callable[..., Any]) -> Any:
    """Return the artifact that a reply names; record its metrics and repeat its warnings as if `function` had run here."""
    for text in reply["warnings"]:
        warnings.warn(text, stacklevel=2)
    record_metrics(reply["metrics"])
    return _kinds(function)["return"](reply["digest"])


def _written(parameter: str, value: Any, kinds: Mapping[str, Any]) -> Any:
    if not isinstance(value, Artifact | Config):
        return {"value": value}
    name = type(value).__name__
    if type(value) is not _classes(kinds[parameter]).get(name):
        raise TypeError(f"{parameter}: expected {kinds[parameter]}, found {name}")
    if isinstance(value, Artifact):
        return {"artifact": value.digest, "action": value.action, "class": name}
    return {"config": value.model_dump(mode="json"), "class": name}


def _read(written: Mapping[str, Any], kind: Any) -> Any:
    match written:
        case {"artifact": digest, "action": action, "class": name}:
            return _classes(kind)[name](digest, action)
        case {"config": values, "class": name}:
            return _classes(kind)[name].parse(values)
        case {"value": value}:
            return value
        case _:
            raise ValueError(f"expected an artifact, a config or a value, found {written!r:.100}")


def _classes(kind: Any) -> dict[str, Any]:
    """Return the classes of artifacts and configs that an annotation allows, by name."""
    parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return {part.__name__: part for part in parts if inspect.isclass(part) and issubclass(part, Artifact | Config)}


_kinds = functools.cache(typing.get_type_hints)
_store = functools.cache(Store)  # one for all orders: what it has verified stays so
