"""What a configuration has that the paper does not, and what it decides that the paper leaves open, on the screen."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.config import IterativeRLConfig
from flows.looking.difference_view import broken, column, titled
from flows.looking.faithful import choices, deviations
from flows.wording import number

__all__ = ["print_faithfulness"]

_WIDE: Final = 110
"""Characters from which on there is room for keys in one line."""


def print_faithfulness(config: IterativeRLConfig, console: Console) -> None:
    """Print every deviation from the paper with its section, then our choices where it is silent, with their reasons."""
    found = deviations(config)
    room = 28 if console.width < _WIDE else 56
    if found:
        table = _table("field", "paper", "section", "here")
        for part in found:
            table.add_row(broken(part.key, room), Text(part.paper), part.where, Text(_text(part.here)))
        fields = "field is" if len(found) == 1 else "fields are"
        console.print(titled(f"{len(found)} {fields} not as in DeepSeekMath (arXiv 2402.03300)", table))
    else:
        console.print("\nevery number of DeepSeekMath (arXiv 2402.03300) that concerns this configuration is as there")
    table = _table("field", "here", "our choice")
    for choice in choices(config):
        table.add_row(broken(choice.key, room), Text(_text(choice.here)), Text(choice.reason))
    console.print(titled("the paper gives no value for (what others do: docs/decisions.md)", table))


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in headings:
        column(table, heading, fold=heading not in ("field", "section"))
    return table


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, BaseModel):
        return ", ".join(f"{name} {_text(part)}" for name, part in value)
    if isinstance(value, tuple):
        return ", ".join(str(getattr(part, "kind", part)) for part in value)
    return number(value)
