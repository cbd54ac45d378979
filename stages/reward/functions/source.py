"""Where the code of a reward function is, and its digest; nothing of it runs here."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Final

from pipeline.config import ConfigError

__all__ = ["FunctionSource", "find_source"]


_ANY_NAME: Final = frozenset({"*", "__getattr__", "globals", "exec", "setattr"})
"""What may bind names that the source does not spell out."""


@dataclass(frozen=True)
class FunctionSource:
    """A function by name and by the file that defines it."""

    module: str
    name: str
    file: Path
    digest: str
    """sha256 of the file; of nothing that it imports."""

    @property
    def root(self) -> Path:
        """The folder that holds the top-level package or module."""
        depth = self.module.count(".") + (self.file.name == "__init__.py")
        return self.file.parents[depth]


def find_source(function: str) -> FunctionSource:
    """The file behind `module:name`, found as Python would find it, but without importing the packages on the way.

    Raises:
        ConfigError: no such module, or one that is not a file of Python source, with what was tried; a file that cannot be
            parsed or in which the name does not occur.
    """
    module, _, name = function.partition(":")
    importlib.invalidate_caches()  # a file that was just written
    path: Sequence[str] | None = None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        prefix = ".".join(parts[:depth])
        spec = _spec(prefix, path)
        if spec is None:
            raise ConfigError(
                f"function {function!r}: no module {prefix!r} in {', '.join(map(str, _places(path)))}; write it as module:name "
                "and have the module's folder on PYTHONPATH or be the working directory"
            )
        path = list(spec.submodule_search_locations or [])
    file = Path(spec.origin) if spec is not None and spec.origin else None
    if file is None or file.suffix != ".py" or not file.is_file():
        found = "a folder without __init__.py" if file is None else str(file)
        raise ConfigError(f"function {function!r}: expected a file of Python source for {module!r}, found {found}")
    file = file.resolve()
    content = file.read_bytes()
    objection = _unbound(name, content)
    if objection:
        raise ConfigError(f"function {function!r} in {file}: {objection}")
    return FunctionSource(module, name, file, hashlib.sha256(content).hexdigest())


def _unbound(name: str, content: bytes) -> str | None:
    """Why the source cannot define the name, or None: as far as can be told without running it."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError) as error:  # ValueError: null bytes
        return f"not Python source: {error}"
    names = set(_names(tree))
    if name in names or names & _ANY_NAME:
        return None
    near = difflib.get_close_matches(name, names, n=1)
    return f"it has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _names(tree: ast.Module) -> Iterator[str]:
    """Every name that the source defines, imports or uses."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.alias(name=name, asname=other):
                yield other or name
            case ast.Name(id=name):
                yield name
            case _:
                pass


def _spec(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec: ModuleSpec | None = find(name, path) if find is not None else None
        if spec is not None:
            return spec
    return PathFinder.find_spec(name, [os.getcwd()]) if path is None else None


def _places(path: Sequence[str] | None) -> list[str]:
    places = [folder or "." for folder in (sys.path if path is None else path)]
    return list(dict.fromkeys([*places, os.getcwd()] if path is None else places)) or ["a module that is no package"]
