"""How a worker process calls a user's reward function: TRL's signature, one number or None for each completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.workers.functions import FunctionSource, called, load_function


def prepare_calls(source: FunctionSource) -> None:
    """Load the function and, with this module, what its calls need: neither counts as a call's time or memory."""
    load_function(source)


def call_function(source: FunctionSource, arguments: Mapping[str, list[Any]]) -> list[float | None] | str:
    """Return a score for each row, None where the function abstains; or, in words, why its answer is no list of scores.

    What the scores are is looked at again where they arrive: here runs the function's own process.

    Raises:
        Whatever the function raises.
    """
    rows = len(arguments["completions"])  # the function may change its lists
    conversational = isinstance(arguments["completions"][0], list)
    try:
        answer = called(source, arguments)
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


def _listed(answer: Any) -> list[Any]:
    if isinstance(answer, list | tuple):
        return list(answer)
    if hasattr(answer, "tolist") and hasattr(answer, "shape"):  # numpy, torch, pandas
        if len(answer.shape) != 1:
            raise _NoScoresError(f"{type(answer).__name__} of shape {tuple(answer.shape)}")
        return list(answer.tolist())
    raise _NoScoresError(type(answer).__name__)


def _number(score: Any, place: int) -> float | None:
    """Return the score as a plain number; infinite where it is too large for one."""
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
    """Return what to set where the function seems to be written for the other form of completions."""
    if conversational:
        return "; does it read completions as texts? Set `conversational: false`" if "list" in said else ""
    reads_messages = "string indices must be integers" in said or "'str' object has no attribute 'get'" in said
    return "; does it read completions as lists of messages? Set `conversational: true`" if reads_messages else ""
