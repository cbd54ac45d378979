"""Checks of what computes: processors, memory, GPUs, an all-reduce of ranks, and environment variables that change it."""

from __future__ import annotations

import os
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import psutil

from flows.doctor.examination import Finding, Severity, Subject
from flows.doctor.probe import Answer, probing, together
from flows.wording import size
from pipeline.workers.group import importing_ours
from stages.training.hardware import cores, cpu_quota, has_native_bf16, native_bf16
from stages.training.ranks import RANK_VARIABLES, environments

_SECONDS: Final = 90.0
_LEAST_MEMORY: Final = 2e9
"""Bytes. Ours: the process of the built-in recipe peaked at 0.96 GiB (lab log); Prefect and MLflow come on top."""
_LEAST_SHARE: Final = 0.5
"""Of a GPU's memory: below it something else is likely to hold the rest."""
_SIZES: Final = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Variables with the number of processes that a launcher started."""
_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_SWITCHES: Final = (
    *("COHORT_ROOT", "COHORT_DEBUG", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"),
    *("HF_HOME", "HF_HUB_CACHE", "TOKENIZERS_PARALLELISM", "PYTHONPATH", "TMPDIR"),
)
"""Variables that are shown, since they change behaviour. None of them holds a secret."""
_OFFLINE: Final = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_USUAL: Final = {"TOKENIZERS_PARALLELISM": "false"}
"""What Cohort itself sets where the user set nothing."""
_GROUPS: Final = Path("/sys/fs/cgroup")
_DRIVER: Final = Path("/proc/driver/nvidia/gpus")


def processors(subject: Subject) -> Iterator[Finding]:
    """Report cores, a container's quota, and whether bfloat16 is native."""
    count, quota, native = cores(), cpu_quota(), native_bf16()
    kind = "native" if native else "emulated" if has_native_bf16() else "emulated, so `auto` takes float32"
    load = os.getloadavg()[0]
    found = f"{count} cores ({platform.machine()}), load {load:.1f}; bfloat16 {kind}"
    values = {"cores": count, "quota": quota, "load": round(load, 2), "native_bf16": native}
    if quota is not None and quota < count:
        found += f"; limited to {quota:g} by its control group, and so is `threads: auto`"
    yield Finding("cpu", "ok", found, values=values)


def memory(subject: Subject) -> Iterator[Finding]:
    """Report free main memory, within a container's limit."""
    machine = psutil.virtual_memory()
    limit = memory_limit()
    free = machine.available if limit is None else min(machine.available, limit)
    found = f"{size(free)} free of {size(machine.total if limit is None else min(limit, machine.total))}"
    values = {"free": free, "total": machine.total, "limit": limit}
    severity: Severity = "warning" if free < _LEAST_MEMORY else "ok"
    yield Finding("memory", severity, found, "end other programs: the smallest recipe needs about 2 GB", values)


def memory_limit(groups: Path = _GROUPS) -> int | None:
    """Return the bytes that a control group may still take; None: no limit."""
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
    """Report the NVIDIA devices that the driver knows, without importing torch (`--quick`)."""
    count = _known_to_driver()
    found = f"{count} NVIDIA devices known to the driver (--quick: torch was not asked)"
    yield Finding("gpu", "ok", found, values={"count": count})


def _known_to_driver() -> int:
    return len(list(_DRIVER.iterdir())) if _DRIVER.is_dir() else 0


def torch(subject: Subject) -> Iterator[Finding]:
    """Report whether torch imports, its devices, and an all-reduce of two ranks as in a training (gloo, loopback)."""
    given = environments(2, devices=None)
    with tempfile.TemporaryDirectory(prefix="cohort-doctor-") as folder:
        rendezvous = str(Path(folder, "rendezvous"))
        # Rank 0 reports the devices that the flow's process would see.
        commands = [probing("torch", str(rank), "2", rendezvous) for rank in range(2)]
        answers = together(commands, [importing_ours(environment) for environment in given], deadline=_SECONDS)
    seen = next((about for about in answers[0].values() if "torch" in about), None)
    if seen is None:
        advice = "install torch again (`make setup`); python -c 'import torch' shows more"
        yield Finding("torch", answers[0].severity, f"does not import: {answers[0].failure()}", advice)
        return
    yield Finding("torch", "ok", f"{seen['torch']} imports in {seen['seconds']} s", values=seen)
    yield from gpus(seen, subject)
    yield from _all_reduce(answers, subject)


def gpus(seen: Mapping[str, Any], subject: Subject) -> Iterator[Finding]:
    """Compare the devices that torch reports with those of the machine and the configured ranks."""
    devices: Sequence[Mapping[str, Any]] = seen["devices"]
    if not devices:
        there = _known_to_driver()
        severity: Severity = "warning" if there and "CUDA_VISIBLE_DEVICES" not in subject.environment else "ok"
        text = f"none for torch, {there} known to the driver" if there else "none; everything runs on the CPU"
        why = "a CPU build" if seen["cuda_build"] is None else f"built for CUDA {seen['cuda_build']}"
        advice = f"torch is {why}: install the build that this driver runs (nvidia-smi says which)"
        yield Finding("gpu", severity, text, advice, {"count": 0})
    for device in devices:
        yield _device(device)
    if devices and subject.ranks > len(devices):
        text = f"{subject.ranks} ranks are configured for {len(devices)} devices"
        yield Finding("gpu.ranks", "problem", text, f"training.engine.ranks: at most {len(devices)}")
    if len(devices) > 1 and not seen["nccl"]:
        found = "torch has no NCCL, which ranks on GPUs need"
        yield Finding("nccl", "problem", found, "install a CUDA build of torch")


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


def _all_reduce(answers: Sequence[Answer], subject: Subject) -> Iterator[Finding]:
    totals = [about["total"] for answer in answers for about in answer.values() if "total" in about]
    if totals == [3.0, 3.0]:
        yield Finding("gloo", "ok", "two ranks met and summed over the loopback interface")
        return
    failed = max(answers, key=lambda answer: answer.exit_code not in (None, 0))
    advice = "training.engine.ranks above 1 needs it: see that the loopback interface is up and nothing filters it"
    severity: Severity = "problem" if subject.ranks > 1 else "warning"
    yield Finding("gloo", severity, f"two ranks did not meet: {failed.failure()} (sums {totals})", advice)


def launcher(subject: Subject) -> Iterator[Finding]:
    """Report variables of another launcher that started several of this process; Cohort starts its own ranks."""
    there = {name: value for name, value in sorted(subject.environment.items()) if name.startswith(RANK_VARIABLES)}
    numbers = {name: value for name, value in there.items() if value.isdigit()}  # others may be a batch system's tokens
    shown = ", ".join(f"{name}={value}" for name, value in numbers.items()) or ", ".join(there)
    count, name = max(((int(numbers[name]), name) for name in _SIZES if name in numbers), default=(1, ""))
    if not there:
        yield Finding("launcher", "ok", "no variables of another launcher")
    elif count > 1:
        advice = "start `cohort` once (srun -n 1, no torchrun): it starts its own ranks, training.engine.ranks of them"
        text = f"{name}={count}: a launcher started this process as one of {count}, which would run the same run {count} times"
        yield Finding("launcher", "warning", text, advice, numbers)
    else:
        yield Finding("launcher", "ok", f"{shown}: inherited, and kept from Cohort's own ranks", values=numbers)


def threads(subject: Subject) -> Iterator[Finding]:
    """Report numbers of threads that OpenMP cannot read: it then takes all cores, with one line on standard error."""
    available = os.cpu_count() or 1
    given = {name: subject.environment[name] for name in _THREADS if name in subject.environment}
    faults = 0
    for name, value in given.items():
        if not re.fullmatch(r"\s*[1-9]\d*(\s*,\s*[1-9]\d*)*\s*", value):
            faults += 1
            text = f"{name}={value!r} is no number of threads: OpenMP ignores it and takes all {available} cores"
            yield Finding(f"threads.{name}", "warning", text, f"{name}={available}, or unset it", {name: value})
        elif int(value.split(",")[0]) > available:
            faults += 1
            text = f"{name}={value} on {available} cores: threads wait for one another"
            yield Finding(f"threads.{name}", "warning", text, f"{name}={available} or less", {name: value})
    if not faults:
        shown = ", ".join(f"{name}={value}" for name, value in given.items()) or "as many threads as cores"
        yield Finding("threads", "ok", shown, values=given)


def switches(subject: Subject) -> Iterator[Finding]:
    """Report variables that change what libraries do."""
    there = {name: subject.environment[name] for name in _SWITCHES if name in subject.environment}
    there = {name: value for name, value in there.items() if value not in ("", _USUAL.get(name))}
    offline = any(there.get(name, "").lower() in ("1", "true", "yes", "on") for name in _OFFLINE)
    note = "; nothing is fetched from the hub, so models and data must be in its cache" if offline else ""
    shown = ", ".join(f"{name}={value}" for name, value in there.items()) or "none that change anything"
    yield Finding("variables", "ok", f"{shown}{note}", values=there)
