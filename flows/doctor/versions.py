"""Checks of Python and packages: versions against what Cohort declares, and builds that do not go together."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from flows.doctor.finding import Finding
from flows.doctor.requirements import OURS, Declared, Unmet, declared, installed, outside, unmet
from flows.doctor.subject import Subject

__all__ = ["companions", "cpu_companions", "ground_types", "packages", "python"]

_SHOWN: Final = (
    *("torch", "transformers", "deepspeed", "prefect", "fastapi", "mlflow", "pyarrow", "math-verify"),
    *("antlr4-python3-runtime", "pebble"),
)
"""Packages whose version is told also where it is as it should be."""
_BREAKING: Final = {
    ("prefect", "fastapi"): "Prefect's server does not run with this one",
    ("latex2sympy2-extended", "antlr4-python3-runtime"): "answers in LaTeX cannot be read",
}
"""Requirements of others (who, what) that stop a run where they are not met, and what stops."""
_COMPANIONS: Final = ("torchvision", "torchaudio", "torchcodec")


def python(subject: Subject) -> Iterator[Finding]:
    """The interpreter, against the range that Cohort declares."""
    version, ours = platform.python_version(), declared()
    wanted = ours.python if ours else ""
    found = f"{version} on {platform.platform(terse=True)} ({sys.executable})"
    values = {"version": version, "platform": platform.platform(), "executable": sys.executable, "range": wanted}
    if wanted and not SpecifierSet(wanted).contains(version, prereleases=True):
        advice = f"Cohort needs Python {wanted}: make an environment with such an interpreter"
        yield Finding("python", "problem", found, advice, values)
        return
    yield Finding("python", "ok", found, values=values)


def packages(subject: Subject) -> Iterator[Finding]:
    """Every package that Cohort declares, those that these require."""
    ours = declared()
    if ours is None:
        yield Finding(
            "packages", "warning", "Cohort is not installed here, so its requirements are not known", "make setup"
        )
        return
    names = [Requirement(text).name for text in ours.core]
    versions = {name: package.version for name in (*names, *_SHOWN) if (package := installed(name))}
    wrong = [_unmet(fault) for fault in unmet(OURS, ours.core)]
    shown = ", ".join(f"{name} {versions[name]}" for name in _SHOWN if name in versions)
    count = f"{len(names)} declared packages are in range" if not wrong else f"{len(wrong)} requirements are not met"
    yield Finding("packages", "ok", f"{count}; {shown}", values=versions)
    yield from wrong
    yield from _optional(ours)
    yield from _stale(ours)


def ground_types(subject: Subject) -> Iterator[Finding]:
    """gmpy2, which sympy takes up by its mere presence and which cannot be interrupted in its C code."""
    found = {name: package.version for name in ("gmpy2", "python-flint") if (package := installed(name))}
    if found:
        there = ", ".join(f"{name} {version}" for name, version in found.items())
        yield Finding("sympy", "ok", f"{there}: not used, verifiers compute with Python's integers", values=found)


def _unmet(fault: Unmet) -> Finding:
    """A requirement that is not met: a problem where it is Cohort's own, or known to break."""
    name, wanted = fault.requirement.name, str(fault.requirement.specifier)
    breaks = _BREAKING.get((fault.owner, name))
    severe = fault.owner == OURS or breaks is not None
    who = "Cohort" if fault.owner == OURS else fault.owner
    there = f"{name} is not installed" if fault.found is None else f"{name} {fault.found}"
    needed = f"{who} needs {name}{wanted}" + (f"; {breaks}" if breaks else "")
    return Finding(
        f"package.{name}",
        "problem" if severe else "warning",
        f"{there}; {needed}",
        f"pip install '{name}{wanted}'",
        {"installed": fault.found, "range": wanted, "wanted_by": fault.owner},
    )


def _optional(ours: Declared) -> Iterator[Finding]:
    """peft, for LoRA: its absence is no fault, a version outside the range is."""
    for requirement in map(Requirement, ours.extras.get("lora", ())):
        package = installed(requirement.name)
        about = {"installed": package and package.version, "range": str(requirement.specifier), "wanted_by": "lora"}
        how = f"pip install '{requirement.name}{requirement.specifier}'"
        if package is None:
            text = f"{requirement.name} is not installed: only LoRA (`training.adapter`) needs it ({how})"
            yield Finding(f"package.{requirement.name}", "ok", text, values=about)
        elif outside(requirement, package.version):
            text = f"{requirement.name} {package.version}; LoRA needs {requirement.specifier}"
            yield Finding(f"package.{requirement.name}", "warning", text, how, about)


def _stale(ours: Declared) -> Iterator[Finding]:
    if ours.stale:
        text = f"the installed metadata is older than pyproject.toml: it lacks {', '.join(ours.stale)}"
        advice = "install the checkout again (`make setup`, or pip install --no-deps -e .)"
        yield Finding("package.cohort-rl", "warning", text, advice, {"lacks": list(ours.stale)})


def companions(subject: Subject) -> Iterator[Finding]:
    """torchvision and its like beside a CPU build of torch, as an installer that knows no such builds leaves them."""
    torch = installed("torch")
    if torch is None or _built_for_cuda() or sys.platform != "linux":
        return
    versions = {name: package.version for name in _COMPANIONS if (package := installed(name))}
    if wrong := cpu_companions(versions):
        text = f"{', '.join(wrong)} beside a CPU build of torch ({torch.version}): CUDA builds do not import there"
        advice = f"pip uninstall {' '.join(_COMPANIONS)} (Cohort needs none of them)"
        yield Finding("package.torchvision", "warning", text, advice, versions)


def cpu_companions(versions: Mapping[str, str | None]) -> list[str]:
    """Of torch's companions those that are no CPU builds; on Linux a wheel without a label is a CUDA build."""
    there = {name: versions.get(name) for name in _COMPANIONS}
    return [f"{name} {version}" for name, version in there.items() if version and "+cpu" not in version]


def _built_for_cuda() -> bool:
    """Whether torch is a CUDA or ROCm build, read from its version file, without importing it."""
    with contextlib.suppress(OSError, importlib.metadata.PackageNotFoundError):
        file = Path(str(importlib.metadata.distribution("torch").locate_file("torch/version.py")))
        return bool(re.search(r"^(?:cuda|hip)\b[^=\n]*= *['\"]", file.read_text(encoding="utf-8"), re.MULTILINE))
    return False
