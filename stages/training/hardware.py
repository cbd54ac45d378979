"""Tell what this machine computes with: device, threads, bfloat16, and how much memory a block of work needs at its worst."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pipeline.config import ConfigError
from pipeline.store.context import current_call
from pipeline.workers.gpu_locks import visible_devices

if TYPE_CHECKING:
    import torch

_WORKSPACES: Final = "CUBLAS_WORKSPACE_CONFIG"
_FIXED: Final = (":4096:8", ":16:8")
"""Settings of cuBLAS's work space under which its products have a fixed order of sums on any number of streams."""
_KIB_A_MIB = 1024
_BYTES_A_MIB = 1 << 20
_GROUPS: Final = Path("/sys/fs/cgroup")
_OTHERS: Final = (Path("/dev/kfd"), Path("/dev/dxg"))
"""Devices of drivers that leave no files for `visible_devices`: ROCm, and Windows under WSL 2."""


def has_cuda() -> bool:
    """Return whether torch computes on a CUDA device here, without importing it: keys of cached calls ask."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    there = visible_devices() or (not hidden and any(device.exists() for device in _OTHERS))
    return bool(there) and built_for_cuda()


def automatic(*, cuda: bool, bf16: bool) -> tuple[Literal["fp32", "bf16"], Literal["eager", "sdpa"]]:
    """Return what `auto` is for precision and attention, given the device and whether its bfloat16 is native."""
    return "bf16" if bf16 else "fp32", "sdpa" if cuda else "eager"


def has_native_bf16() -> bool:
    """Return whether bfloat16 is multiplied in hardware where models are computed."""
    return has_cuda() or native_bf16()


@functools.cache
def built_for_cuda() -> bool:
    """Read once from torch's version file whether it is a CUDA or ROCm build."""
    with contextlib.suppress(OSError, importlib.metadata.PackageNotFoundError):
        file = Path(str(importlib.metadata.distribution("torch").locate_file("torch/version.py")))
        return bool(re.search(r"^(?:cuda|hip)\b[^=\n]*= *['\"]", file.read_text(encoding="utf-8"), re.MULTILINE))
    return False


@functools.cache
def native_bf16() -> bool:
    """Return whether the CPU multiplies bfloat16 in hardware (AMX or AVX512-BF16), without importing torch.

    Without it bfloat16 is emulated: measured on AVX2 1-2 GFLOP/s against 70 in float32. Every CUDA device that can train these
    models has it.
    """
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text().split()
        return "amx_bf16" in flags or "avx512_bf16" in flags
    return False


def training_device() -> str:
    """Return `cuda` where there is one, else `cpu`."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        # cuBLAS reads it once, and a stage may ask for a fixed order after another one has computed. It costs 32 MiB.
        os.environ.setdefault(_WORKSPACES, _FIXED[0])
    return "cuda"


def cuda_devices() -> list[str]:
    """Return the names of the CUDA devices that torch sees, as CUDA_VISIBLE_DEVICES takes them; none on a CPU."""
    import torch

    if training_device() == "cpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(place) for place in range(torch.cuda.device_count())]


def inference_dtype(chosen: Literal["auto", "bfloat16", "float32"]) -> torch.dtype:
    """Return what outputs are computed in; `auto`: bfloat16 where it is native, else float32."""
    import torch

    return torch.bfloat16 if name_of_dtype(chosen) == "bfloat16" else torch.float32


def name_of_dtype(chosen: Literal["auto", "bfloat16", "float32"]) -> Literal["bfloat16", "float32"]:
    """Return the same by its name, without torch."""
    if chosen == "auto":
        return "bfloat16" if has_native_bf16() else "float32"
    return chosen


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(groups: Path = _GROUPS) -> float | None:
    """Return the cores that a control group (a container) of version 1 or 2 may use; None: no limit."""
    try:
        limit, period = (groups / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit, period = (
                (groups / "cpu" / f"cpu.cfs_{part}_us").read_text().strip() for part in ("quota", "period")
            )
        except OSError:
            return None
    return None if limit in ("max", "-1") else int(limit) / int(period)


def within_quota(count: int) -> int:
    """Return `count` threads, or as many as a container's quota of processor time lets run at once."""
    quota = cpu_quota()
    return count if quota is None else max(1, min(count, int(quota)))


@contextlib.contextmanager
def threads(count: int | Literal["auto"]) -> Iterator[None]:
    """Run the block with `count` torch threads, and restore what was set before.

    `auto`: those that torch has, which are OMP_NUM_THREADS where that is set; else at most a container's quota, which torch
    does not know: threads beyond it wait for one another.
    """
    import torch

    before = torch.get_num_threads()
    default = before if os.environ.get("OMP_NUM_THREADS") else within_quota(before)
    torch.set_num_threads(default if count == "auto" else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def fixed_order(wanted: bool) -> Iterator[None]:
    """Run the block with kernels whose sums have a fixed order, and restore what was set before (`training.deterministic`).

    Products stay float32 where they are (no TF32). Attention: torch's own kernels and flash-attn 2.4.1 or later have a backward
    of this kind.

    Raises:
        ConfigError: CUDA began without what cuBLAS needs for it, or an operation of the block has no such kernel.
    """
    import torch

    cuda, call = training_device() == "cuda", current_call()
    if not wanted:
        if cuda and call is not None:
            call.remedy = "set training.deterministic=true for equal bits on a GPU"
        yield
        return
    if cuda and os.environ.get(_WORKSPACES) not in _FIXED:
        raise ConfigError(
            f"training.deterministic: expected {_WORKSPACES} to be one of {', '.join(_FIXED)} in the environment before CUDA "
            f"begins, found {os.environ.get(_WORKSPACES)}; export {_WORKSPACES}={_FIXED[0]} and start again"
        )
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    precision, flash = torch.get_float32_matmul_precision(), os.environ.get("FLASH_ATTENTION_DETERMINISTIC")
    cudnn = torch.backends.cudnn
    try:
        torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("highest")
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # transformers reads it at every call
        with cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    except RuntimeError as error:
        if "torch.use_deterministic_algorithms" not in str(error):
            raise
        raise ConfigError(
            f"training.deterministic: {str(error).partition(',')[0]}; set training.attention to eager or sdpa if it is part of "
            "attention, else training.deterministic to false"
        ) from error
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        torch.set_float32_matmul_precision(precision)
        os.environ.pop("FLASH_ATTENTION_DETERMINISTIC", None)
        if flash is not None:
            os.environ["FLASH_ATTENTION_DETERMINISTIC"] = flash


@dataclasses.dataclass
class PeakMemory:
    """Hold the peak of a block, known once the block is over."""

    mib: float = 0.0
    """In MiB: on CUDA what tensors took on the device, on a CPU the resident memory of the whole process."""


@contextlib.contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure the largest memory in use at any moment of the block, what was there before it included. Blocks do not nest.

    CUDA: `torch.cuda.max_memory_allocated` of the current device, reset at the start. CPU: the process's high-water mark
    (`VmHWM`), reset through /proc/self/clear_refs (proc(5)). Where that cannot be reset it is `ru_maxrss`, the highest since
    the process began: never too low, but it does not fall again from block to block.
    """
    import torch

    peak = PeakMemory()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    marked = not cuda and _reset_high_water_mark()
    try:
        yield peak
    finally:
        if cuda:
            peak.mib = torch.cuda.max_memory_allocated() / _BYTES_A_MIB
        else:
            peak.mib = _high_water_mark() if marked else _peak_since_start()


def live_tensors_mib() -> float:
    """Return the MiB of all tensors that Python code holds, shared storage once: weights, optimizer state, buffers of engines.

    Between two steps that is what training keeps for good, exact to the byte, where the memory of a CPU process is mostly
    libraries. Activations in flight are not among it.
    """
    import gc

    import torch

    sizes: dict[int, int] = {}
    kinds = {torch.Tensor, *_subclasses(torch.Tensor)}  # of half a million objects none is asked for its bases
    for held in gc.get_objects():
        if type(held) in kinds and held.layout == torch.strided and held.device.type != "meta":
            storage = held.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values()) / _BYTES_A_MIB


def _subclasses(kind: type) -> Iterator[type]:
    derived: list[type] = type.__subclasses__(kind)
    for each in derived:
        yield each
        yield from _subclasses(each)


def _reset_high_water_mark() -> bool:
    """Return whether the system let the mark be reset."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water_mark() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) / _KIB_A_MIB


def _peak_since_start() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _KIB_A_MIB
