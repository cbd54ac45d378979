"""Write a configuration as YAML that people read: a section a line, with the reason above it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import yaml

from flows.wording import visible

_WIDTH: Final = 100
_BLOCKS: Final = ("data", "update")
"""Sections whose parts have a line each."""


def page(head: Sequence[str], values: Mapping[str, Any], reasons: Mapping[str, Sequence[str]]) -> str:
    """Return YAML.

    Args:
        head: sentences at the top.
        values: the configuration, nested.
        reasons: what is to be said above a section, by its name.
    """
    lines = [line for sentence in head for line in _comment(sentence)]
    for name, value in values.items():
        lines += [line for sentence in reasons.get(name, ()) for line in _comment(sentence)]
        if name in _BLOCKS and isinstance(value, Mapping):
            lines.append(f"{name}:")
            lines += [f"  {key}: {_flow(part)}" for key, part in value.items()]
        else:
            lines.append(f"{name}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _comment(sentence: str) -> Iterator[str]:
    """Yield a sentence as comments; what a model or a file says in it must not end the line."""
    for line in textwrap.wrap(visible(sentence), _WIDTH - 2, break_long_words=False):
        yield f"# {line}"


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf"))
    return text.removesuffix("...\n").strip()


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted key as nested mappings, in their order."""
    made: dict[str, Any] = {}
    for key, value in settings.items():
        place = made
        *outer, last = key.split(".")
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = value
    return made
