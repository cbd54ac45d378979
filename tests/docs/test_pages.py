"""Pages that are made from code are fresh, and all pages together are short."""

from __future__ import annotations

import re

from docs.generate import DOCS, configuration, pages
from flows.config.recipes import RECIPES
from pipeline.config import flatten


def test_generated_pages_are_what_the_code_would_write() -> None:
    stale = [file.name for file, text in pages().items() if text != file.read_text(encoding="utf-8")]
    assert stale == [], "run `python -m docs.generate`"


def test_every_setting_of_every_recipe_has_a_documented_row() -> None:
    rows = re.findall(r"^\| \*?`(\w+)`\*? \| [^|]+ \| ([^ |].*) \|$", configuration().replace("\\|", ""), re.MULTILINE)
    settings = {name for recipe in RECIPES.values() for name in flatten(recipe().model_dump(mode="json"))}
    # Names of held-out sets and transformers' own configuration are the user's.
    ours = [re.sub(r"^(data\.evaluation\.)\w+\.|^(policy\.settings)\..*", r"\1\2.", setting) for setting in settings]
    named = {part for setting in ours for part in setting.split(".") if part not in ("", "kind")}
    assert len(named) > 100
    assert named <= {name for name, _ in rows}


def test_all_pages_written_by_hand_have_at_most_20_000_words() -> None:
    written = [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *DOCS.glob("*.md")]
    words = [len(page.read_text(encoding="utf-8").split()) for page in written if page.name != "configuration.md"]
    assert sum(words) <= 20_000
