"""The shape of the code, which CONTRIBUTING.md asks for: counted, so that it stays."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import grimp
import networkx
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "stages", "flows")
LONGEST_FILE, LONGEST_FUNCTION = 350, 80
DIRECTLY = {"flows": 3, "pipeline": 9, "stages": 6}
"""Most modules next to the packages in each."""


@pytest.fixture(scope="module")
def files() -> dict[Path, ast.Module]:
    found = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    return {file.relative_to(ROOT): ast.parse(file.read_text(encoding="utf-8")) for file in found}


def calls(tree: ast.Module) -> Iterator[str]:
    """Yield the last name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            match node.func:
                case ast.Name(id=name) | ast.Attribute(attr=name):
                    yield name


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = grimp.build_graph(*PACKAGES, include_external_packages=False, cache_dir=None)
    imports = networkx.DiGraph(
        (one, other) for one in graph.modules for other in graph.find_modules_directly_imported_by(one)
    )
    circles = [sorted(part) for part in networkx.strongly_connected_components(imports) if len(part) > 1]
    assert imports.number_of_edges() > 1000
    assert circles == []


def test_no_file_and_no_function_is_too_long(files: dict[Path, ast.Module]) -> None:
    long_files = [str(file) for file in files if len((ROOT / file).read_text("utf-8").splitlines()) > LONGEST_FILE]
    long_functions = [
        f"{file}: {node.name}"
        for file, tree in files.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION
    ]
    assert (long_files, long_functions) == ([], [])


@pytest.mark.parametrize("package", PACKAGES)
def test_few_modules_lie_directly_in_a_top_package(package: str) -> None:
    direct = [file.name for file in (ROOT / package).glob("*.py") if file.name != "__init__.py"]
    assert 0 < len(direct) <= DIRECTLY[package]


def test_one_module_locks_files_and_three_context_variables_exist(files: dict[Path, ast.Module]) -> None:
    locking = [str(file) for file, tree in files.items() if "flock" in calls(tree)]
    variables = [str(file) for file, tree in files.items() for name in calls(tree) if name == "ContextVar"]
    assert locking == ["pipeline/store/locks.py"]
    assert len(variables) == 3
