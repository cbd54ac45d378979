"""The pages cannot rot: every file, function, test, setting, command and link that they name exists."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from docs.generate import CLAIMS, cells, claims
from flows.config.recipes import RECIPES
from flows.config.resolve import choose
from pipeline.config import flatten
from pipeline.store import Store
from stages.tables import Rollouts
from tests.stages.rows import rollout_row

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"([\w./-]+\.py)(?:: ([\w., ]+)|::(test_\w+))?")
LINK = re.compile(r"\]\(([^)#:]+)\)")
SETTING = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")


def spans(page: Path) -> list[str]:
    """Text in backticks, outside of code blocks."""
    return SPAN.findall(FENCE.sub("", page.read_text(encoding="utf-8")))


def file_of(name: str) -> Path | None:
    """Paths are given from the project's root; those of tests from `tests/` too."""
    return next((path for path in (ROOT / name, ROOT / "tests" / name) if path.is_file()), None)


@cache
def names_in(path: Path) -> frozenset[str]:
    """Functions, classes and constants of a module, and `Class.member`."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        own = set(bound_by(node))
        found |= own
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for member in node.body for name in bound_by(member)}
    return frozenset(found)


def bound_by(node: ast.stmt) -> Iterator[str]:
    match node:
        case ast.FunctionDef() | ast.ClassDef():
            yield node.name
        case ast.Assign():
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name


def missing(page: Path) -> Iterator[str]:
    """References of a page to code that is not there. "`file`, new:" introduces one that the reader is to write."""
    last: Path | None = None
    written = set(re.findall(r"`([^`\n]+)`, new:", page.read_text(encoding="utf-8")))
    for span in spans(page):
        if span in written:
            continue
        if re.fullmatch(r"::test_\w+", span):  # another test of the file named before
            if last is None or span[2:] not in names_in(last):
                yield span
            continue
        found = FILE.fullmatch(span)
        if found is None:
            continue
        name, members, test = found.groups()
        last = file_of(name)
        wanted = [test] if test else [member.strip() for member in (members or "").split(",") if member.strip()]
        if last is None or not set(wanted) <= names_in(last):
            yield span


def parts(annotation: Any) -> Iterator[type[BaseModel]]:
    """The configs inside an annotation: of a union every one, of a tuple or dictionary those it holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from parts(inner)


def is_setting(configs: list[type[BaseModel]], names: list[str]) -> bool:
    fields = [config.model_fields[names[0]] for config in configs if names[0] in config.model_fields]
    if not fields or len(names) == 1:
        return bool(fields)
    return is_setting([part for field in fields for part in parts(field.annotation)], names[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_function_and_test_that_a_page_names_exists(page: Path) -> None:
    assert not list(missing(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    links = LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_that_a_page_names_is_one(page: Path) -> None:
    from flows.config import IterativeRLConfig

    named = [span.split("=")[0] for span in spans(page)]
    dotted = [name.split(".") for name in named if SETTING.fullmatch(name)]
    settings = [names for names in dotted if names[0] in IterativeRLConfig.model_fields]
    assert not [".".join(names) for names in settings if not is_setting([IterativeRLConfig], names)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_shows_exists(page: Path) -> None:
    from flows.cli import app

    shown = re.findall(r"(?:^|`)cohort ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert not [command for command in shown if command not in set(app)]


def shown_commands(page: Path) -> list[list[str]]:
    """The commands of a page's code blocks as arguments, optional ones in brackets included."""
    lines = "\n".join(FENCE.findall(page.read_text(encoding="utf-8"))).splitlines()
    shown = [re.search(r"(?:^|\s)cohort ([a-z].*)", line.split("  #")[0].split(" #")[0]) for line in lines]
    return [shlex.split(re.sub(r" \[(--\w+)\]", r" \1", found[1])) for found in shown if found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_shows_parses_and_its_settings_fit(page: Path) -> None:
    from flows.cli import app

    for arguments in shown_commands(page):
        function, _, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
        assert function is not None
        command, recipe, *options = [*arguments, ""]
        if command in ("run", "check", "compare", "plan", "deploy") and recipe in RECIPES:
            settings = [value for option, value in itertools.pairwise(options) if option == "--set"]
            wrong = ("update.objective.betta", "reward.components")  # an error on purpose; tried by the test below
            good = [setting for setting in settings if not setting.startswith(wrong)]
            choose(recipe, settings=good)


def test_the_tutorials_own_reward_runs(store: Store) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/tutorial.md").read_text(), re.MULTILINE | re.DOTALL)
    made: dict[str, Any] = {"__name__": "tutorial"}
    exec(next(block for block in blocks if "def brevity" in block), made)  # our own page
    outputs = Rollouts.write([rollout_row("q", 0, [5, 6]), rollout_row("q", 1, [5, 6, 7])])
    rewards = made["brevity"](outputs, made["BrevityConfig"](limit=2))
    assert [row["reward"] for row in rewards.rows()] == [1.0, 0.0]
    assert rewards.metrics["reward/mean"] == 0.5


def test_the_tutorials_own_reward_function_is_found_by_its_command_and_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(def brief.*?)^```", page, re.MULTILINE | re.DOTALL)
    (setting,) = re.findall(r'^cohort run (\w+) --set "(reward\.components=.*)"$', page, re.MULTILINE)
    (tmp_path / "my_rewards.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    _, function = choose(setting[0], settings=[setting[1]]).config.reward.components
    assert (function.name, function.weight) == ("function", 0.2)
    made: dict[str, Any] = {}
    exec(block, made)  # our own page
    arguments = {name: ["", ""] for name in ("prompts", "completions", "question_id", "question", "answer", "solution")}
    assert made["brief"](completion_ids=[[1] * 48, [1] * 49], **arguments) == [1.0, 0.0]


def rows_of(page: str) -> list[list[str]]:
    """Cells of every table row of a page but headings and rulers."""
    return [row for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines() if (row := cells(line))]


@pytest.mark.parametrize(("page", "least"), [("correctness.md", 100), ("paper-to-code.md", 50)])
def test_every_claim_has_a_test_or_a_reason_why_it_has_none(page: str, least: int) -> None:
    rows, marked = rows_of(page), claims()
    without = [row for row in rows if row[0] not in marked]
    assert len(rows) > least
    assert len({row[0] for row in rows}) == len(rows)
    assert not [row[0] for row in without if not row[-1].startswith("not built") and "Cannot occur" not in row[1]]


def test_every_mark_is_that_of_a_row() -> None:
    rows = {row[0] for page in CLAIMS for row in rows_of(page)}
    assert set(claims()) <= rows


def test_no_mistake_is_said_to_be_unbuilt() -> None:
    page = (ROOT / "docs" / "correctness.md").read_text(encoding="utf-8")
    assert not re.search(r"not built|\byet\b", page, re.IGNORECASE)


UNBUILT = {
    # Words that what is built would have in a file name or in a setting.
    "5.2.3 noise": "noise",
}


def test_what_a_row_says_is_not_built_has_neither_file_nor_setting() -> None:
    rows = [row for row in rows_of("paper-to-code.md") if row[-1].startswith("not built")]
    assert {row[0] for row in rows} == set(UNBUILT), "name the word that would show that it is built"
    files = [file.stem for package in ("pipeline", "stages", "flows") for file in (ROOT / package).rglob("*.py")]
    settings = list(flatten(choose("arithmetic_cpu").config.model_dump(mode="json")))
    for row in rows:
        word = re.compile(rf"(?:^|[._]){UNBUILT[row[0]]}s?(?:$|[._])")
        assert not [name for name in (*files, *settings) if word.search(name)], row


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("`stages/tables.py: Rollouts`, `stages/tables.py: Rollouts.schema`", []),
        ("`stages/tables.py: Rollout`", ["stages/tables.py: Rollout"]),
        ("`stages/table.py`", ["stages/table.py"]),
        ("`test_docs.py::test_every_link_to_a_file_leads_to_one`, `::test_nothing`", ["::test_nothing"]),
        ("```\n`stages/table.py`\n```", []),
        ("`stages/table.py`, new:\n", []),
    ],
)
def test_what_is_not_there_is_found(tmp_path: Path, text: str, faults: list[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert list(missing(page)) == faults


def test_settings_are_followed_through_unions_and_refused_where_they_end() -> None:
    from flows.config import IterativeRLConfig

    known = [
        "advantage.kl_in_reward",
        "critic.training.optimizer.betas",
        "reward.components",
        "update.objective.length",
    ]
    assert all(is_setting([IterativeRLConfig], name.split(".")) for name in known)
    assert not any(is_setting([IterativeRLConfig], name.split(".")) for name in ("update.epsilon", "steps.many"))
