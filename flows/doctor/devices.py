"""Checks of what computes: processors, memory, GPUs, and whether ranks find one another."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psutil

from flows.doctor.children import Answer, importing_ours, probing, together
from flows.doctor.finding import Finding, Severity
from flows.doctor.subject import Subject
from flows.wording import size
from stages.training.hardware import native_bf16
from stages.training.ranks import environments

__all__ = ["driver", "gpus", "memory", "processors", "torch"]

_SECONDS: Final = 90.0
_LEAST_MEMORY: Final = 2e9
"""Bytes. Ours: the process of the built-in recipe peaked at 0.96 GiB (lab log), and Prefect and MLflow stand beside it."""
_LEAST_SHARE: Final = 0.5
"""Of a GPU's memory: below it something else is likely to hold the rest."""
_GROUPS: Final = Path("/sys/fs/cgroup")
_DRIVER: Final = Path("/proc/driver/nvidia/gpus")


def processors(subject: Subject) -> Iterator[Finding]:
    """Cores that this process may use, a container's quota, and whether bfloat16 is native."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, native = cpu_quota(), native_bf16()
    kind = "native" if native else "emulated, so `auto` takes float32"
    load = os.getloadavg()[0]
    found = f"{cores} cores ({platform.machine()}), load {load:.1f}; bfloat16 {kind}"
    values = {"cores": cores, "quota": quota, "load": round(load, 2), "native_bf16": native}
    if quota is not None and quota < cores and not subject.environment.get("OMP_NUM_THREADS"):
        advice = f"OMP_NUM_THREADS={max(1, int(quota))}: more threads than the quota wait for one another"
        yield Finding("cpu", "warning", f"{found}; limited to {quota:g} by its control group", advice, values)
        return
    yield Finding("cpu", "ok", found, values=values)


def cpu_quota(groups: Path = _GROUPS) -> float | None:
    """Cores that a control group (a container) may keep busy, of either version; None: no limit."""
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


def memory(subject: Subject) -> Iterator[Finding]:
    """Main memory that is free, within a container's limit."""
    machine = psutil.virtual_memory()
    limit = memory_limit()
    free = machine.available if limit is None else min(machine.available, limit)
    found = f"{size(free)} free of {size(machine.total if limit is None else min(limit, machine.total))}"
    values = {"free": free, "total": machine.total, "limit": limit}
    if free < _LEAST_MEMORY:
        yield Finding("memory", "warning", found, "end other programs: the smallest recipe needs about 2 GB", values)
        return
    yield Finding("memory", "ok", found, values=values)


def memory_limit(groups: Path = _GROUPS) -> int | None:
    """Bytes that a control group may still take; None: no limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            bound, taken = (groups / limit).read_text().strip(), int((groups / used).read_text())
        except (OSError, ValueError):
            continue
        # Version 1 says "no limit" with a number near 2^63.
        return None if bound == "max" or int(bound) > 2**60 else max(0, int(bound) - taken)
    return None


def driver(subject: Subject) -> Iterator[Finding]:
    """`--quick`: NVIDIA devices that the driver knows; torch is not asked."""
    count = len(list(_DRIVER.iterdir())) if _DRIVER.is_dir() else 0
    yield Finding(
        "gpu",
        "ok",
        f"{count} NVIDIA devices known to the driver (--quick: torch was not asked)",
        values={"count": count},
    )


def torch(subject: Subject) -> Iterator[Finding]:
    """Whether torch imports, which devices it has, and whether two ranks meet as those of a training do (gloo, loopback)."""
    given = environments(2, devices=None)
    with tempfile.TemporaryDirectory(prefix="cohort-doctor-") as folder:
        meeting = str(Path(folder, "rendezvous"))
        # Devices are asked of rank 0 as the flow's process would see them.
        commands = [probing("torch", str(rank), "2", meeting) for rank in range(2)]
        answers = together(commands, [importing_ours(environment) for environment in given], deadline=_SECONDS)
    told = answers[0].values()
    seen = next((about for about in told if "torch" in about), None)
    if seen is None:
        advice = "install torch again (`make setup`); python -c 'import torch' shows more"
        yield Finding("torch", answers[0].severity, f"does not import: {answers[0].failure()}", advice)
        return
    yield Finding("torch", "ok", f"{seen['torch']} imports in {seen['seconds']} s", values=seen)
    yield from gpus(seen, subject)
    yield from _meeting(answers, subject)


def gpus(seen: Mapping[str, Any], subject: Subject) -> Iterator[Finding]:
    """The devices that torch told of, against what the machine has and what is wanted."""
    devices: Sequence[Mapping[str, Any]] = seen["devices"]
    hidden = "CUDA_VISIBLE_DEVICES" in subject.environment
    if not devices:
        there = len(list(_DRIVER.iterdir())) if _DRIVER.is_dir() else 0
        text = f"none for torch, {there} known to the driver" if there else "none; everything runs on the CPU"
        if there and not hidden:
            why = "a CPU build" if seen["cuda_build"] is None else f"built for CUDA {seen['cuda_build']}"
            advice = f"torch is {why}: install the build that this driver runs (nvidia-smi says which)"
            yield Finding("gpu", "warning", text, advice, {"count": 0})
        else:
            yield Finding("gpu", "ok", text, values={"count": 0})
    for device in devices:
        yield _device(device)
    if devices and subject.ranks > len(devices):
        text = f"{subject.ranks} ranks are configured for {len(devices)} devices"
        yield Finding("gpu.ranks", "problem", text, f"training.engine.ranks: at most {len(devices)}")
    if len(devices) > 1 and not seen["nccl"]:
        yield Finding(
            "nccl", "problem", "torch has no NCCL, by which ranks on GPUs speak", "install a CUDA build of torch"
        )


def _device(device: Mapping[str, Any]) -> Finding:
    check, name = f"gpu.{device['number']}", device.get("name", "a device")
    if "error" in device:
        advice = "nvidia-smi shows its state; the torch build must know this device and driver"
        return Finding(check, "problem", f"{name} does not compute: {device['error']}", advice, device)
    found = f"{name}, {size(device['free'])} free of {size(device['total'])}"
    if device["free"] < _LEAST_SHARE * device["total"]:
        return Finding(check, "warning", found, "something else holds its memory; nvidia-smi shows what", device)
    if not device["bf16"]:
        return Finding(check, "warning", f"{found}; no bfloat16", "set dtype: float32 for backend and trainer", device)
    return Finding(check, "ok", found, values=device)


def _meeting(answers: Sequence[Answer], subject: Subject) -> Iterator[Finding]:
    totals = [about["total"] for answer in answers for about in answer.values() if "total" in about]
    if totals == [3.0, 3.0]:
        yield Finding("gloo", "ok", "two ranks met and summed over the loopback interface")
        return
    failed = max(answers, key=lambda answer: answer.exit_code not in (None, 0))
    advice = "training.engine.ranks above 1 needs it: see that the loopback interface is up and nothing filters it"
    severity: Severity = "problem" if subject.ranks > 1 else "warning"
    yield Finding("gloo", severity, f"two ranks did not meet: {failed.failure()} (sums {totals})", advice)
