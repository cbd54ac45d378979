"""A user's function: where its code is, its digest, and how a worker process loads and calls it.

`find_source` runs nothing of it, `require_callable` asks a worker. The rest runs in worker processes only.
"""

from __future__ import annotations

import ast
import asyncio
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, Final

from pipeline.config import ConfigError
from pipeline.workers.pool import KillablePool

NAME_OF_A_FUNCTION: Final = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
"""Pattern of `module:name`."""
_CHECK_S: Final = 30.0
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
        """Return the folder that holds the top-level package or module."""
        depth = self.module.count(".") + (self.file.name == "__init__.py")
        return self.file.parents[depth]


class SourceChangedError(RuntimeError):
    """A file that is another one than its digest says."""


def find_source(function: str) -> FunctionSource:
    """Return the file behind `module:name`, found as Python would find it, but without importing the packages on the way.

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
    """Return why the source cannot define the name, or None: as far as can be seen without running it."""
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
    """Yield every name that the source defines, imports or uses."""
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


@lru_cache(maxsize=1)
def load_function(source: FunctionSource) -> Callable[..., Any]:
    """Return the function. What runs is the file whose digest is in the cache key, never a compiled copy of an older one.

    Raises:
        Whatever the module raises; AttributeError without such a function, SourceChangedError.
    """
    content = source.file.read_bytes()
    if hashlib.sha256(content).hexdigest() != source.digest:
        raise SourceChangedError(f"{source.file} has changed since the run began; run again with the new version")
    if str(source.root) not in sys.path:
        sys.path.append(str(source.root))
    package = source.module.rpartition(".")[0]
    if package:
        importlib.import_module(package)
    folder = [str(source.file.parent)] if source.file.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(source.module, source.file, submodule_search_locations=folder)
    assert spec is not None, "a file of Python source has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[source.module] = module
    try:
        exec(compile(content, str(source.file), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[source.module]
        raise
    function: Callable[..., Any] = getattr(module, source.name)
    return function


def called(source: FunctionSource, arguments: Mapping[str, Any]) -> Any:
    """Return what the function returns; an awaitable is awaited.

    Raises:
        Whatever the function raises.
    """
    answer = load_function(source)(**arguments)
    return event_loop().run(_awaited(answer)) if inspect.isawaitable(answer) else answer


def call_plainly(source: FunctionSource, arguments: Mapping[str, Any]) -> tuple[bool, str]:
    """Return whether the function answers with plain data, and this data as JSON, or else its type.

    Raises:
        Whatever the function raises.
    """
    answer = called(source, arguments)
    try:
        return True, json.dumps(dict(answer) if isinstance(answer, Mapping) else answer)
    except (TypeError, ValueError, RecursionError):
        return False, type(answer).__name__


@lru_cache(maxsize=1)
def event_loop() -> asyncio.Runner:
    """Return one event loop for all calls: a client that a function keeps belongs to the loop it was made in."""
    return asyncio.Runner()


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


def require_callable(source: FunctionSource, arguments: Sequence[str], pool: KillablePool, advice: str) -> None:
    """Refuse a function that could answer nothing, before it is called.

    Raises:
        ConfigError: a module that does not import, a name it does not have, or a signature that does not take `arguments`
            by name, with `advice`.
    """
    outcome = pool.run(_objection_to, [(source, tuple(arguments), advice)], deadline_s=_CHECK_S)[0]
    objection = outcome.value if outcome.fault is None else f"{outcome.fault}: {outcome.detail}"
    if objection is not None:
        raise ConfigError(f"function '{source.module}:{source.name}' in {source.file}: {objection}")


def _objection_to(source: FunctionSource, arguments: tuple[str, ...], advice: str) -> str | None:
    """Return why the function cannot be called with these keyword arguments, or None."""
    try:
        function = load_function(source)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not callable(function):
        return f"expected a function, found {type(function).__name__}"
    try:
        inspect.signature(function).bind(**dict.fromkeys(arguments))
    except (TypeError, ValueError) as error:
        return f"cannot be called with {', '.join(arguments)}: {error}; {advice}"
    return None
