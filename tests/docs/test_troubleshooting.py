"""The page docs/troubleshooting.md: every symptom is a message, an error or a metric that the product has."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def said() -> str:
    """The product's code, in which strings that go on in the next line are one."""
    files = (file for package in ("pipeline", "stages", "flows") for file in (ROOT / package).rglob("*.py"))
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return re.sub(r"""(["'])\n\s*f?(["'])""", "", code)


def test_every_symptom_that_the_page_quotes_is_in_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    symptoms = [cell for line in page.splitlines() if line.startswith("| ") for cell in [line.split(" | ")[0]]]
    quoted = [part for cell in symptoms for span in re.findall(r"`([^`]+)`", cell) for part in span.split(" ... ")]
    code = said()
    assert len(quoted) > 30
    assert not [part for part in quoted if part not in code]
