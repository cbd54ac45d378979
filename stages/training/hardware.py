"""What this machine computes with: device, threads, and whether bfloat16 is native."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

__all__ = ["inference_dtype", "native_bf16", "threads", "training_device"]


@functools.cache
def native_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AMX or AVX512-BF16), read without importing torch.

    Without it bfloat16 is emulated: measured on AVX2 1-2 GFLOP/s against 70 in float32, so that "bf16" is no speed-up but a
    forty-fold loss. Every CUDA device that can train these models has it.
    """
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text().split()
        return "amx_bf16" in flags or "avx512_bf16" in flags
    return False


def training_device() -> str:
    """`cuda` where there is one, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def inference_dtype(chosen: Literal["auto", "bfloat16", "float32"]) -> torch.dtype:
    """What outputs are computed in; `auto`: bfloat16 where it is native, else float32."""
    import torch

    if chosen == "auto":
        return torch.bfloat16 if training_device() == "cuda" or native_bf16() else torch.float32
    return torch.bfloat16 if chosen == "bfloat16" else torch.float32


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run the block with `count` torch threads (None: leave them), and restore what was set before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
