"""The page docs/adding-a-method.md, applied word for word to a copy of the project: it works, and touches what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "adding-a-method.md"
TRAIN = """
import sys, tempfile
import flows
assert flows.__path__[0].startswith(sys.argv[1]), flows.__path__
from flows.config.resolve import choose
from flows.cli import run_command
from flows.iterative_rl import iterative_rl
from pipeline.store import Store, use_store
assert run_command(["check", "arithmetic_smoke", "--method", "topr"]) == 0
settings = ["iterations=1", "steps=1", "sft.max_steps=2", "sft.decay_steps=1", "evaluation.every=0", "evaluation.samples=0"]
with use_store(Store(tempfile.mkdtemp())):
    iterative_rl(choose("arithmetic_smoke", settings=settings, method="topr").config)
import pytest
sys.exit(pytest.main(["-q", "tests/stages/update/test_topr.py"]))
"""


def blocks() -> list[tuple[str, str, str]]:
    """Kind (`python` = the whole file, `diff` = an edit), path and text of every block that belongs to a file, in order."""
    found, path = [], ""
    for named, kind, text in re.findall(
        r"^`([^`\n]+\.py)`(?:, new)?:$|^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S
    ):
        path = named or path
        if kind:
            found.append((kind, path, text))
    return found


def apply(root: Path, kind: str, path: str, text: str) -> None:
    file = root / path
    if kind == "python":
        assert not file.exists(), f"{path} is called new"
        file.write_text(text)
        return
    lines = text.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if not line.startswith("+"))
    after = "".join(line[1:] for line in lines if not line.startswith("-"))
    content = file.read_text()
    assert content.count(before) == 1, f"{path} does not have once:\n{before}"
    file.write_text(content.replace(before, after))


def test_a_method_is_one_new_file_two_places_and_one_test() -> None:
    assert [(kind, path) for kind, path, _ in blocks()] == [
        ("python", "stages/update/objectives/topr.py"),
        *[("diff", "stages/update/objectives/__init__.py")] * 3,
        ("diff", "flows/config/methods.py"),
        ("python", "tests/stages/update/test_topr.py"),
    ]


@pytest.mark.slow  # a process that imports everything and trains
def test_the_page_applied_trains_with_the_gradient_of_its_paper(tmp_path: Path) -> None:
    for folder in ("pipeline", "stages", "flows", "tests"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    for block in blocks():
        apply(tmp_path, *block)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_code_of_the_page_is_in_the_style_of_the_project(tmp_path: Path) -> None:
    for number, (kind, _, text) in enumerate(blocks()):
        if kind == "python":
            (tmp_path / f"block_{number}.py").write_text(text)
    ruff = [sys.executable, "-m", "ruff"]
    config = ["--config", str(REPOSITORY / "pyproject.toml"), str(tmp_path)]
    for arguments in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = subprocess.run([*ruff, *arguments, *config], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
