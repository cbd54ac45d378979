"""A reward function as it runs in a worker process: loaded once, called with lists, its answer made plain."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from stages.reward.functions.source import FunctionSource

__all__ = ["call_function", "load_function", "objection_to"]


@lru_cache(maxsize=1)
def load_function(source: FunctionSource) -> Callable[..., Any]:
    """The function. What runs is the file whose digest is in the cache key, never a compiled copy of an older one.

    Raises:
        Whatever the module raises; AttributeError without such a function, RuntimeError where the file has changed since.
    """
    content = source.file.read_bytes()
    if hashlib.sha256(content).hexdigest() != source.digest:
        raise RuntimeError(f"{source.file} has changed since the run began; run again to score with the new version")
    if str(source.root) not in sys.path:
        sys.path.append(str(source.root))
    package = source.module.rpartition(".")[0]
    if package:
        importlib.import_module(package)
    folder = [str(source.file.parent)] if source.file.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(source.module, source.file, submodule_search_locations=folder)
    assert spec is not None, "a file of Python source has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[source.module] = module
    try:
        exec(compile(content, str(source.file), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[source.module]
        raise
    function: Callable[..., Any] = getattr(module, source.name)
    return function


def objection_to(source: FunctionSource, arguments: tuple[str, ...]) -> str | None:
    """Why the function cannot be called with these keyword arguments, or None."""
    try:
        function = load_function(source)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not callable(function) or inspect.iscoroutinefunction(function):
        return f"expected a plain function, found {type(function).__name__}" + " (async)" * callable(function)
    try:
        inspect.signature(function).bind(**dict.fromkeys(arguments))
    except (TypeError, ValueError) as error:
        return f"cannot be called with {', '.join(arguments)}: {error}; name fewer `columns` or accept **kwargs"
    return None


def call_function(source: FunctionSource, arguments: Mapping[str, list[Any]]) -> list[tuple[float | None, str | None]]:
    """For each row a score and what is wrong with it; no score and no fault where the function abstains with None.

    Raises:
        Whatever the function raises; TypeError or ValueError for an answer that is not one score for each row.
    """
    expected = len(arguments["completions"])
    answer = load_function(source)(**arguments)
    if answer is None or isinstance(answer, str | bytes | Mapping):
        raise TypeError(f"expected a list of {expected} scores, found {type(answer).__name__}")
    scores = list(answer)
    if len(scores) != expected:
        raise ValueError(f"expected {expected} scores, one for each completion, found {len(scores)}")
    return [_read(score) for score in scores]


def _read(score: Any) -> tuple[float | None, str | None]:
    if score is None:
        return None, None
    if isinstance(score, str | bytes) or not hasattr(score, "__float__"):
        return None, f"expected a number or None, found {type(score).__name__}"
    value = float(score)
    return (value, None) if math.isfinite(value) else (None, f"expected a finite number or None, found {value}")
