"""Write the pages that are made from code: `python -m docs.generate`.

`docs/configuration.md` comes from the fields of the configs.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

DOCS = Path(__file__).parent

HEAD = """# Configuration

Every setting, made from the code by `python -m docs.generate`; do not edit. `cohort recipes NAME` prints a whole config,
`cohort check` finds errors. `required` has no default. A setting in *italics* is outside the cache key: it changes no result.
"""


def main() -> None:
    """Write the generated pages."""
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """Return each generated page with its text."""
    return {DOCS / "configuration.md": configuration()}


def configuration() -> str:
    """Return the page of all settings: runs, reward-model studies, experiments."""
    from flows.config import IterativeRLConfig
    from flows.reward_study.config import RewardModelStudyConfig
    from pipeline.experiment import Experiment

    seen: dict[type[BaseModel], str] = {}
    text = [HEAD]
    for title, config in (
        ("A run", IterativeRLConfig),
        ("A study of a reward model", RewardModelStudyConfig),
        ("An experiment", Experiment),
    ):
        text += [f"## {title}\n", *_sections(config, "", seen)]
    return "\n".join(text)


def _sections(config: type[BaseModel], path: str, seen: dict[type[BaseModel], str]) -> Iterator[str]:
    """Yield the table of a config, then those of its parts that no table has yet."""
    seen[config] = path
    kind = config.model_fields.get("kind")
    fields = {name: field for name, field in config.model_fields.items() if name != "kind"}
    if path:
        yield f"### `{path}`" + (f", kind `{kind.default}`" if kind else "") + "\n"
    if not fields:
        yield "No settings.\n"
        return
    yield "| setting | default | what |\n|---|---|---|"
    inner: list[tuple[type[BaseModel], str]] = []
    for name, field in fields.items():
        place = f"{path}.{name}" if path else name
        parts = list(dict.fromkeys(_parts(field.annotation)))
        inner += [(part, place) for part in parts if part not in seen]
        known = sorted({seen[part] for part in parts if part in seen})
        see = f" As `{'`, `'.join(known)}`." if known else ""
        label = f"*`{name}`*" if any(repr(mark) == "UNKEYED" for mark in field.metadata) else f"`{name}`"
        yield f"| {label} | {_default(field)} | {_what(field)}{see} |"
    yield ""
    for part, place in inner:
        if part not in seen:
            yield from _sections(part, place, seen)


def _parts(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the configs inside an annotation: every one of a union, those that a list or a dictionary holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _parts(part)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        kind = getattr(value, "kind", None)
        return f"`{kind}`" if kind else "a section"
    if isinstance(value, tuple | list) and any(isinstance(part, BaseModel) for part in value):
        return ", ".join(f"`{getattr(part, 'kind', type(part).__name__)}`" for part in value)
    return f"`{json.dumps(to_jsonable_python(value), ensure_ascii=False)}`".replace("|", "\\|")


def _what(field: FieldInfo) -> str:
    """Return the first sentence of a field's documentation."""
    text = " ".join((field.description or "").split())
    end = re.search(r"(?<=[^.\d][.])\s+(?=[A-Z0-9`])", text)
    return (text[: end.start()] if end else text).replace("|", "\\|")


if __name__ == "__main__":
    main()
