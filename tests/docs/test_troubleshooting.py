"""The page docs/troubleshooting.md: every symptom is a message, an error or a metric that the product has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def said() -> str:
    """All text that the product's code holds, and the names of its errors."""
    parts = []
    for package in ("pipeline", "stages", "flows"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                match node:
                    case ast.ClassDef(name=name):
                        parts.append(name)
                    case ast.JoinedStr(values=values):
                        parts.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in values))
                    case ast.Constant(value=str(text)):
                        parts.append(text)
    return "\n".join(parts)


def test_every_symptom_that_the_page_quotes_is_in_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    symptoms = [cell for line in page.splitlines() if line.startswith("| ") for cell in [line.split(" | ")[0]]]
    quoted = [part for cell in symptoms for span in re.findall(r"`([^`]+)`", cell) for part in span.split(" ... ")]
    code = said()
    assert len(quoted) > 30
    assert not [part for part in quoted if part not in code]
