"""A reward function as it runs in a worker process: loaded once, called with lists, its answer made plain."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping
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
    if not callable(function):
        return f"expected a function, found {type(function).__name__}"
    try:
        inspect.signature(function).bind(**dict.fromkeys(arguments))
    except (TypeError, ValueError) as error:
        return f"cannot be called with {', '.join(arguments)}: {error}; name fewer `columns` or accept **kwargs"
    return None


def call_function(source: FunctionSource, arguments: Mapping[str, list[Any]]) -> list[float | None] | str:
    """A score for each row, None where the function abstains; or, in words, why its answer is no list of scores.

    An awaitable is awaited. What the scores are is looked at again where they arrive: here runs the function's own process.

    Raises:
        Whatever the function raises.
    """
    rows = len(arguments["completions"])  # the function may change its lists
    conversational = isinstance(arguments["completions"][0], list)
    try:
        answer = load_function(source)(**arguments)
        if inspect.isawaitable(answer):
            answer = _event_loop().run(_awaited(answer))
    except (AttributeError, TypeError) as error:
        if not (hint := _other_form(str(error), conversational=conversational)):
            raise
        raise (AttributeError if isinstance(error, AttributeError) else TypeError)(f"{error}{hint}") from error
    try:
        scores = _listed(answer)
        if len(scores) != rows:
            raise _NoScoresError(f"{len(scores)}; one score is never taken for several outputs")
        return [_number(score, place) for place, score in enumerate(scores)]
    except _NoScoresError as error:
        return f"expected a list of {rows} scores, one for each completion, found {error}"


class _NoScoresError(Exception):
    """What was found in the place of scores."""


@lru_cache(maxsize=1)
def _event_loop() -> asyncio.Runner:
    """One for all calls: a client that a function keeps belongs to the loop it was made in."""
    return asyncio.Runner()


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


def _listed(answer: Any) -> list[Any]:
    if isinstance(answer, list | tuple):
        return list(answer)
    if hasattr(answer, "tolist") and hasattr(answer, "shape"):  # numpy, torch, pandas
        if len(answer.shape) != 1:
            raise _NoScoresError(f"{type(answer).__name__} of shape {tuple(answer.shape)}")
        return list(answer.tolist())
    raise _NoScoresError(type(answer).__name__)


def _number(score: Any, place: int) -> float | None:
    """The score as a plain number; infinite where it is too large for one."""
    if score is None:
        return None
    shaped = getattr(score, "shape", ()) != () or "complex" in str(getattr(score, "dtype", ""))
    if isinstance(score, str | bytes) or not hasattr(score, "__float__") or shaped:
        raise _NoScoresError(f"{type(score).__name__} as score {place}; a score is a number or None")
    try:
        return float(score)
    except OverflowError:
        return float("inf")


def _other_form(said: str, *, conversational: bool) -> str:
    """What to set where the function seems to be written for the other form of completions."""
    if conversational:
        return "; does it read completions as texts? Set `conversational: false`" if "list" in said else ""
    reads_messages = "string indices must be integers" in said or "'str' object has no attribute 'get'" in said
    return "; does it read completions as lists of messages? Set `conversational: true`" if reads_messages else ""
