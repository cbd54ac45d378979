"""Write what pages take from code: `python -m docs.generate`.

`docs/configuration.md` comes from the fields of the configs. In `docs/correctness.md` and `docs/paper-to-code.md` the last
column of each table names the tests that carry the mark `claim` with the first cell of the row.
"""

from __future__ import annotations

import ast
import json
import re
import typing
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

DOCS = Path(__file__).parent
TESTS = DOCS.parent / "tests"
CLAIMS = ("correctness.md", "paper-to-code.md")

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
    marked = claims()
    pages = {DOCS / name: with_tests((DOCS / name).read_text(encoding="utf-8"), marked) for name in CLAIMS}
    return {DOCS / "configuration.md": configuration()} | pages


def claims() -> dict[str, list[str]]:
    """Return the tests of each claim as `file::test`, by the marks in the folder of tests."""
    found: dict[str, list[str]] = defaultdict(list)
    for file in sorted(TESTS.rglob("test_*.py")):
        name, text = file.relative_to(TESTS).as_posix(), file.read_text(encoding="utf-8")
        for node in ast.parse(text).body if "mark.claim" in text else ():
            for mark in getattr(node, "decorator_list", []):
                if ast.unparse(getattr(mark, "func", mark)) == "pytest.mark.claim":
                    for row in mark.args:
                        found[row.value].append(f"{name}::{node.name}")
    return dict(found)


def cells(line: str) -> list[str]:
    """Return the cells of a row of a Markdown table; none for any other line, a heading or a ruler."""
    if not line.startswith("|") or line.startswith("|---"):
        return []
    found = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    return [] if found[-1] == "tests" else found


def with_tests(page: str, marked: dict[str, list[str]]) -> str:
    """Return a page whose tables name in the last column the tests of each row; text stays where a row has none."""
    lines = []
    for line in page.splitlines():
        row = cells(line)
        if row and (row[0] in marked or "::test_" in row[-1]):
            row[-1] = _named(marked.get(row[0], []))
            line = "| " + " | ".join(row) + " |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _named(tests: list[str]) -> str:
    """Return tests as a page names them: another one of a file without the file."""
    spans, last = [], ""
    for test in tests:
        file, name = test.split("::")
        spans.append(f"`::{name}`" if file == last else f"`{test}`")
        last = file
    return ", ".join(spans)


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
