"""What packages require of one another, against what is installed. Reads metadata only, imports none of them."""

from __future__ import annotations

import functools
import importlib.metadata
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

__all__ = ["OURS", "Declared", "Package", "Unmet", "declared", "installed", "outside", "unmet"]

OURS: Final = "cohort-rl"
_PROJECT: Final = Path(__file__).parents[2] / "pyproject.toml"


@dataclass(frozen=True)
class Package:
    """An installed distribution."""

    name: str
    version: str
    requires: tuple[str, ...]


Look = Callable[[str], Package | None]


@dataclass(frozen=True)
class Unmet:
    """A requirement that what is installed does not meet."""

    owner: str
    requirement: Requirement
    found: str | None
    """The version that is installed; None: no such package."""


@dataclass(frozen=True)
class Declared:
    """What Cohort says that it needs."""

    python: str
    """Range of Python versions."""
    core: tuple[str, ...]
    extras: Mapping[str, tuple[str, ...]]
    """By the name of the extra, `lora`."""
    stale: tuple[str, ...] = ()
    """Requirements of the checkout that the installed metadata lacks: it was installed before they were declared."""


def installed(name: str) -> Package | None:
    """A distribution of this environment."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    about = found.metadata  # read once: `version` and `requires` would each parse it again
    return Package(canonicalize_name(name), str(about["Version"]), tuple(about.get_all("Requires-Dist") or ()))


def declared(project: Path = _PROJECT) -> Declared | None:
    """What Cohort declares: in a checkout its pyproject.toml, else its installed metadata; None where neither is there."""
    package = installed(OURS)
    known = tuple(package.requires) if package else ()
    if (table := _checkout(project)) is not None:
        core, extras = tuple(table["dependencies"]), table.get("optional-dependencies", {})
        stale = tuple(text for text in core if package and _written(text) not in set(map(_written, known)))
        return Declared(
            table["requires-python"], core, {name: tuple(parts) for name, parts in extras.items()}, stale=stale
        )
    if package is None:
        return None
    about = importlib.metadata.metadata(OURS)
    names = about.get_all("Provides-Extra") or []
    return Declared(
        (about.get_all("Requires-Python") or [""])[0],  # by index a backport, once imported, raises where there is none
        tuple(text for text in known if _applies(Requirement(text).marker, [])),
        {name: tuple(text for text in known if _only_with(Requirement(text).marker, name)) for name in names},
    )


def unmet(owner: str, requirements: Iterable[str], look: Look = installed) -> Iterator[Unmet]:
    """What is not met of requirements and, in turn, of what the packages that meet them require.

    Args:
        owner: who has these requirements.
        look: finds an installed package by name.
    """
    known = functools.cache(look)
    waiting: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [(owner, tuple(requirements), ())]
    seen, said = set(waiting), set[tuple[str, str]]()
    while waiting:
        by, texts, extras = waiting.pop(0)
        for requirement in map(Requirement, texts):
            if not _applies(requirement.marker, extras):
                continue
            package, fault = known(requirement.name), (by, str(requirement))
            if (package is None or outside(requirement, package.version)) and fault not in said:
                said.add(fault)
                yield Unmet(by, requirement, package.version if package else None)
            visit = (package.name, package.requires, tuple(sorted(requirement.extras))) if package else None
            if visit and visit not in seen:
                seen.add(visit)
                waiting.append(visit)


def outside(requirement: Requirement, version: str) -> bool:
    """Whether a version is not in the range; one that names a file instead of a range has none."""
    return not requirement.specifier.contains(version, prereleases=True)


def _applies(marker: Marker | None, extras: Sequence[str]) -> bool:
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, ""))


def _only_with(marker: Marker | None, extra: str) -> bool:
    return _applies(marker, [extra]) and not _applies(marker, [])


def _written(text: str) -> str:
    """One text for one requirement: the order of its bounds does not matter."""
    requirement = Requirement(text)
    return (
        f"{canonicalize_name(requirement.name)}{sorted(requirement.extras)}{requirement.specifier}{requirement.marker}"
    )


def _checkout(project: Path) -> dict[str, Any] | None:
    try:
        table: dict[str, Any] = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        return None
    return table if table.get("name") == OURS else None
