"""The page docs/architecture.md: the files that a row passes are those that a run executes."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import flows.iterative_rl
from flows.algorithm.sampling import Exploration
from pipeline.residency import evict
from pipeline.store import Store
from tests.flows.short_runs import train

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Return the files outside `pipeline/` whose functions ran in lines 5 to 10 of two steps."""
    files: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            files.add(frame.f_code.co_filename)

    def watched(function: Callable[..., Any], trace: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            sys.setprofile(trace)
            threading.setprofile(trace)
            return function(*arguments)

        return call

    evict()  # a worker pool or an engine that an earlier test left would not be made again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exploration, "of", watched(Exploration.of, note))
        patch.setattr(flows.iterative_rl, "step_done", watched(flows.iterative_rl.step_done, None))
        train(Store(tmp_path_factory.mktemp("store")), "grpo", **{"sft.max_steps": 12, "sft.decay_steps": 1})
    return {str(Path(file).relative_to(ROOT)) for file in files if is_ours(Path(file))}


def is_ours(file: Path) -> bool:
    return file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] in ("stages", "flows")


def listed() -> Iterator[list[str]]:
    """The files of the table, then those of the paragraph below it."""
    section = PAGE.read_text(encoding="utf-8").split("## The way of a row")[1]
    table, rest = re.split(r"^These are \d+ files\.", section, flags=re.MULTILINE)
    for text in ("\n".join(line for line in table.splitlines() if line.startswith("|")), rest):
        yield re.findall(r"`((?:stages|flows)/[\w/]+\.py)`", text)


def test_the_page_lists_the_files_that_a_step_executes_and_no_others(executed: set[str]) -> None:
    passed, others = listed()
    named = {*passed, *others}
    assert (named - executed, executed - named) == (set(), set())
    assert len(named) == len(passed) + len(others)


def test_the_page_counts_its_files() -> None:
    passed, _ = listed()
    assert f"These are {len(passed)} files." in PAGE.read_text(encoding="utf-8")
    assert len(passed) <= 34
