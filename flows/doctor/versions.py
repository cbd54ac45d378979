"""Checks of Python and packages: versions against what Cohort declares, and builds that do not go together.

Reads metadata only, and imports none of them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from flows.doctor.examination import OURS, Finding, Severity, Subject
from stages.training.hardware import built_for_cuda

_SHOWN: Final = (
    *("torch", "transformers", "deepspeed", "prefect", "fastapi", "mlflow", "pyarrow", "math-verify"),
    *("antlr4-python3-runtime", "pebble"),
)
"""Packages whose version is shown even where it is in range."""
_BREAKING: Final = {
    ("prefect", "fastapi"): "Prefect's server does not run with this one",
    ("latex2sympy2-extended", "antlr4-python3-runtime"): "answers in LaTeX cannot be read",
}
"""Requirements of others (who, what) that stop a run where they are not met, and what stops."""
_OPTIONAL: Final = {"lora": "LoRA (`training.adapter`)", "gguf": "a GGUF file as `policy.path`"}
"""Extras for what a run may ask for, and what that is."""
_PROJECT: Final = Path(__file__).parents[2] / "pyproject.toml"
_COMPANIONS: Final = ("torchvision", "torchaudio", "torchcodec")


def python(subject: Subject) -> Iterator[Finding]:
    """Compare the interpreter with the range that Cohort declares."""
    version, ours = platform.python_version(), declared()
    wanted = ours.python if ours else ""
    found = f"{version} on {platform.platform(terse=True)} ({sys.executable})"
    values = {"version": version, "platform": platform.platform(), "executable": sys.executable, "range": wanted}
    severity: Severity = "ok" if SpecifierSet(wanted).contains(version, prereleases=True) else "problem"
    advice = f"Cohort needs Python {wanted}: make an environment with such an interpreter"
    yield Finding("python", severity, found, advice, values)


def packages(subject: Subject) -> Iterator[Finding]:
    """Compare every package that Cohort declares, and those that these require, with what is installed."""
    ours = declared()
    if ours is None:
        found = "Cohort is not installed here, so its requirements are not known"
        yield Finding("packages", "warning", found, "make setup")
        return
    names = [Requirement(text).name for text in ours.core]
    versions = {name: package.version for name in (*names, *_SHOWN) if (package := installed(name))}
    wrong = [_unmet(fault) for fault in unmet(OURS, ours.core)]
    shown = ", ".join(f"{name} {versions[name]}" for name in _SHOWN if name in versions)
    count = f"{len(names)} declared packages are in range" if not wrong else f"{len(wrong)} requirements are not met"
    yield Finding("packages", "ok", f"{count}; {shown}", values=versions)
    yield from wrong
    yield from _optional(ours)
    if ours.stale:
        text = f"the installed metadata is older than pyproject.toml: it lacks {', '.join(ours.stale)}"
        advice = "install the checkout again (`make setup`, or pip install --no-deps -e .)"
        yield Finding(f"package.{OURS}", "warning", text, advice, {"lacks": list(ours.stale)})


def ground_types(subject: Subject) -> Iterator[Finding]:
    """Report gmpy2, which sympy uses wherever it is installed and whose C code cannot be interrupted."""
    found = {name: package.version for name in ("gmpy2", "python-flint") if (package := installed(name))}
    if found:
        there = ", ".join(f"{name} {version}" for name, version in found.items())
        yield Finding("sympy", "ok", f"{there}: not used, verifiers compute with Python's integers", values=found)


def _unmet(fault: Unmet) -> Finding:
    """Report an unmet requirement: a problem where it is Cohort's own, or known to break."""
    name, wanted = fault.requirement.name, str(fault.requirement.specifier)
    breaks = _BREAKING.get((fault.owner, name))
    severity: Severity = "problem" if fault.owner == OURS or breaks else "warning"
    who = "Cohort" if fault.owner == OURS else fault.owner
    there = f"{name} is not installed" if fault.found is None else f"{name} {fault.found}"
    text = f"{there}; {who} needs {name}{wanted}" + (f"; {breaks}" if breaks else "")
    values = {"installed": fault.found, "range": wanted, "wanted_by": fault.owner}
    return Finding(f"package.{name}", severity, text, f"pip install '{name}{wanted}'", values)


def _optional(ours: Declared) -> Iterator[Finding]:
    """Report the packages of LoRA and of GGUF files: their absence is no fault, a version outside the range is."""
    wanted = [(extra, Requirement(text)) for extra in _OPTIONAL for text in ours.extras.get(extra, ())]
    for extra, requirement in wanted:
        package = installed(requirement.name)
        about = {"installed": package and package.version, "range": str(requirement.specifier), "wanted_by": extra}
        how = f"pip install '{requirement.name}{requirement.specifier}'"
        if package is None:
            text = f"{requirement.name} is not installed: only {_OPTIONAL[extra]} needs it ({how})"
            yield Finding(f"package.{requirement.name}", "ok", text, values=about)
        elif outside(requirement, package.version):
            text = f"{requirement.name} {package.version}; {_OPTIONAL[extra]} needs {requirement.specifier}"
            yield Finding(f"package.{requirement.name}", "warning", text, how, about)


def companions(subject: Subject) -> Iterator[Finding]:
    """Report CUDA builds of torchvision and its like where torch is a CPU build: some installers leave them so."""
    torch = installed("torch")
    if torch is None or built_for_cuda() or sys.platform != "linux":
        return
    versions = {name: package.version for name in _COMPANIONS if (package := installed(name))}
    if wrong := cpu_companions(versions):
        text = f"{', '.join(wrong)} next to a CPU build of torch ({torch.version}): CUDA builds do not import there"
        advice = f"pip uninstall {' '.join(_COMPANIONS)} (Cohort needs none of them)"
        yield Finding("package.torchvision", "warning", text, advice, versions)


def cpu_companions(versions: Mapping[str, str]) -> list[str]:
    """Return torch's companions that are no CPU builds; on Linux a wheel without a label is a CUDA build."""
    there = {name: versions[name] for name in _COMPANIONS if name in versions}
    return [f"{name} {version}" for name, version in there.items() if "+cpu" not in version]


class Package(NamedTuple):
    """An installed distribution."""

    name: str
    version: str
    requires: tuple[str, ...]


class Unmet(NamedTuple):
    """A requirement that what is installed does not meet."""

    owner: str
    requirement: Requirement
    found: str | None
    """The version that is installed; None: no such package."""


class Declared(NamedTuple):
    """The requirements that Cohort declares."""

    python: str
    """Range of Python versions."""
    core: tuple[str, ...]
    extras: Mapping[str, tuple[str, ...]]
    """By the name of the extra, `lora`."""
    stale: tuple[str, ...] = ()
    """Requirements of the checkout that the installed metadata lacks, since they were declared later."""


def installed(name: str) -> Package | None:
    """Return a distribution of this environment, or None."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    about = found.metadata  # read once: `version` and `requires` would each parse it again
    return Package(canonicalize_name(name), str(about["Version"]), tuple(about.get_all("Requires-Dist") or ()))


def declared(project: Path = _PROJECT) -> Declared | None:
    """Return Cohort's requirements: from pyproject.toml in a checkout, else from metadata; None where both are absent."""
    package = installed(OURS)
    known = tuple(package.requires) if package else ()
    if (table := _checkout(project)) is not None:
        core, extras = tuple(table["dependencies"]), table.get("optional-dependencies", {})
        older = set(map(Requirement, known))  # equal whatever the order of their bounds
        stale = tuple(text for text in core if package and Requirement(text) not in older)
        return Declared(table["requires-python"], core, {name: tuple(parts) for name, parts in extras.items()}, stale)
    if package is None:
        return None
    about = importlib.metadata.metadata(OURS)
    names = about.get_all("Provides-Extra") or []
    return Declared(
        (about.get_all("Requires-Python") or [""])[0],  # by index a backport, once imported, raises where there is none
        tuple(text for text in known if _applies(Requirement(text).marker, [])),
        {name: tuple(text for text in known if _only_with(Requirement(text).marker, name)) for name in names},
    )


def unmet(owner: str, requirements: Iterable[str]) -> Iterator[Unmet]:
    """Yield the unmet requirements of `owner`, then those of the packages that meet the others, and so on."""
    known = functools.cache(installed)
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
    """Return whether a version is not in the range; a requirement that names a file instead has none."""
    return not requirement.specifier.contains(version, prereleases=True)


def _applies(marker: Marker | None, extras: Sequence[str]) -> bool:
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, ""))


def _only_with(marker: Marker | None, extra: str) -> bool:
    return _applies(marker, [extra]) and not _applies(marker, [])


def _checkout(project: Path) -> dict[str, Any] | None:
    try:
        table: dict[str, Any] = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        return None
    return table if table.get("name") == OURS else None
