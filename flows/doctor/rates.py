"""What a device computes, moves and writes in a second: matrix products, large tensors, a synced file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

from flows.doctor.places import nearest
from flows.planning.machine import DeviceProfile

if TYPE_CHECKING:
    from flows.places import Places

__all__ = ["measured_rates", "median_seconds"]

_WIDTHS: Final = (64, 128, 256, 512, 1024, 2048)
_PACKAGES: Final = ("torch", "transformers")
_REPEATS: Final = 5
_PATIENCE: Final = 1.0
"""Seconds after which a measurement is not repeated."""
_MIB: Final = 1 << 20


def measured_rates(places: Places, device: str, announce: Callable[[str], None]) -> DeviceProfile:
    """A profile of the first GPU or of one thread, which still lacks what a model reaches of it."""
    import torch

    announce("matrix products")
    tables = {
        kind: {str(width): _product_rate(width, dtype, device) for width in _WIDTHS}
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    announce("memory, disk, hashing")
    cuda = device == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{_processor()}, one thread"
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else psutil.virtual_memory().total
    return DeviceProfile(
        name=name,
        kind="gpu" if cuda else "cpu",
        memory=float(memory),
        fp32=tables["fp32"],
        bf16=tables["bf16"],
        bandwidth=_bandwidth(device),
        reading=_reading_rate(device),
        disk=_disk_rate(nearest(places.root)),
        hashing=_hash_rate(),
        source=f"cohort doctor --bench, load {os.getloadavg()[0]:.1f}",
        date=time.strftime("%Y-%m-%d %H:%M"),
        packages={package: importlib.metadata.version(package) for package in _PACKAGES},
    )


def _product_rate(width: int, dtype: Any, device: str) -> float:
    """FLOP/s of [rows, width] x [width, 2.75 width], as an MLP has it."""
    import torch

    columns = 11 * width // 4
    rows = max(64, int((2e11 if device == "cuda" else 2e8) / (2 * width * columns)))
    given = torch.randn(rows, width, device=device).to(dtype)
    weight = torch.randn(columns, width, device=device).to(dtype)
    seconds = median_seconds(lambda: torch.nn.functional.linear(given, weight), device)
    return 2.0 * rows * width * columns / seconds


def _bandwidth(device: str) -> float:
    """Bytes a second of an addition that reads two tensors and writes a third, which is allocated as in training."""
    import torch

    one = torch.ones(16 * _MIB if device == "cpu" else 256 * _MIB, device=device)
    return 3 * one.nbytes / median_seconds(lambda: one + one, device)


def _reading_rate(device: str) -> float:
    """Bytes a second of a sum over a tensor that no cache holds."""
    import torch

    one = torch.ones(16 * _MIB if device == "cpu" else 256 * _MIB, device=device)
    return one.nbytes / median_seconds(one.sum, device)


def _disk_rate(folder: Path) -> float:
    """Bytes a second into a file that is synced, and removed."""
    data = os.urandom(64 * _MIB)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".cohort-bench-") as file:
        started = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return len(data) / (time.perf_counter() - started)


def _hash_rate() -> float:
    data = bytes(64 * _MIB)
    started = time.process_time()
    hashlib.sha256(data).digest()
    return len(data) / (time.process_time() - started)


def median_seconds(work: Callable[[], object], device: str) -> float:
    """Seconds, once it has run."""
    import torch

    # Processor time of a single thread is hardly touched by what else the machine does.
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def timed() -> float:
        started = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - started

    timed()
    until, taken = time.perf_counter() + _PATIENCE, [timed()]
    while len(taken) < _REPEATS and time.perf_counter() < until:
        taken.append(timed())
    return statistics.median(taken)


def _processor() -> str:
    """The CPU's own name, where the system tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
