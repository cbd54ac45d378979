"""Whether the packages that a run imports do import: what metadata cannot say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from flows.doctor.children import ask, probing
from flows.doctor.finding import Finding
from flows.doctor.requirements import installed
from flows.doctor.subject import Subject

__all__ = ["imports"]

_MODULES: Final = (
    *("pyarrow", "safetensors", "tokenizers", "datasets", "transformers.models.qwen2.modeling_qwen2"),
    *("math_verify", "pebble", "prefect", "mlflow", "deepspeed"),
)
"""What runs import besides torch, the cheap ones first. Importing `transformers` alone imports little of it."""
_OPTIONAL: Final = {"peft": "LoRA (`training.adapter`) does not run", "torchvision": "what imports it fails"}
_SECONDS: Final = 180.0


def imports(subject: Subject, modules: Sequence[str] = ()) -> Iterator[Finding]:
    """Each module, imported by another process; after a crash by another one from the module behind it.

    Args:
        modules: by default those of a run, and optional ones that are installed.
    """
    waiting = list(modules) or [*_MODULES, *(name for name in _OPTIONAL if installed(name))]
    took: dict[str, float] = {}
    while waiting:
        answer = ask(probing("imports", *waiting), subject.environment, deadline=_SECONDS)
        told = answer.values()
        for about in told:
            if about.get("error"):
                yield _failed(about["module"], about["error"])
            elif "module" in about:
                took[about["module"]] = about["seconds"]
        begun = [about["begins"] for about in told if "begins" in about]
        done = [about["module"] for about in told if "module" in about]
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
    return Finding(
        f"import.{package}", "warning" if consequence or late else "problem", text, advice, {"module": module}
    )
