"""The form of Prefect's user interface: the schema of `train`'s parameter, every field with its documentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["form_schema", "ready_for_form"]


def form_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The OpenAPI schema of a flow's parameters, as Prefect makes it, made ready for the form."""
    from prefect.utilities.callables import parameter_schema

    return ready_for_form(parameter_schema(function).model_dump_for_openapi())


def ready_for_form(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema in which unions are choices: Prefect's form shows sections for `anyOf`, and a box of JSON for the `oneOf` that
    pydantic writes. The `kind`s exclude one another either way."""
    made: dict[str, Any] = _any_of(schema)
    return made


def _any_of(part: Any) -> Any:
    if isinstance(part, list):
        return [_any_of(item) for item in part]
    if not isinstance(part, dict):
        return part
    kept = {name: _any_of(value) for name, value in part.items() if name != "discriminator" or "oneOf" not in part}
    if "oneOf" in kept:
        kept["anyOf"] = kept.pop("oneOf")
    if "anyOf" in kept:  # a union or nothing is one choice, not a choice within a choice
        kept["anyOf"] = [option for inner in kept["anyOf"] for option in inner.get("anyOf", [inner])]
    return kept
