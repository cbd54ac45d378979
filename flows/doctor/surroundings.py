"""Checks of environment variables: those of another launcher, of threads, and those that change what libraries do."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Final

from flows.doctor.finding import Finding
from flows.doctor.subject import Subject
from stages.training.ranks import RANK_VARIABLES

__all__ = ["launcher", "switches", "threads"]

_SIZES: Final = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Variables with the number of processes that a launcher started."""
_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_SWITCHES: Final = (
    *("COHORT_ROOT", "COHORT_DEBUG", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"),
    *("HF_HOME", "HF_HUB_CACHE", "TOKENIZERS_PARALLELISM", "PYTHONPATH", "TMPDIR"),
)
"""Variables that are told, since they explain what otherwise surprises. None of them holds a secret."""
_USUAL: Final = {"TOKENIZERS_PARALLELISM": "false"}
"""What Cohort itself sets where the user set nothing."""


def launcher(subject: Subject) -> Iterator[Finding]:
    """Variables by which another launcher made this process one of several. Cohort starts its own ranks without them."""
    there = {name: value for name, value in subject.environment.items() if name.startswith(RANK_VARIABLES)}
    started = {name: int(there[name]) for name in _SIZES if there.get(name, "").isdigit()}
    numbers = {
        name: value for name, value in sorted(there.items()) if value.isdigit()
    }  # others may be a batch system's tokens
    shown = ", ".join(f"{name}={value}" for name, value in numbers.items()) or ", ".join(sorted(there))
    if not there:
        yield Finding("launcher", "ok", "no variables of another launcher")
    elif max(started.values(), default=1) > 1:
        name, count = max(started.items(), key=lambda item: item[1])
        advice = "start `cohort` once (srun -n 1, no torchrun): it starts its own ranks, training.engine.ranks of them"
        text = f"{name}={count}: a launcher started this process as one of {count}, which would run the same run {count} times"
        yield Finding("launcher", "warning", text, advice, numbers)
    else:
        yield Finding("launcher", "ok", f"{shown}: inherited, and kept from Cohort's own ranks", values=numbers)


def threads(subject: Subject) -> Iterator[Finding]:
    """Numbers of threads that OpenMP can read: it ignores others with one line on standard error, and takes all cores."""
    cores = os.cpu_count() or 1
    given = {name: subject.environment[name] for name in _THREADS if name in subject.environment}
    fine = True
    for name, value in given.items():
        if not re.fullmatch(r"\s*[1-9]\d*(\s*,\s*[1-9]\d*)*\s*", value):
            fine = False
            text = f"{name}={value!r} is no number of threads: OpenMP ignores it and takes all {cores} cores"
            yield Finding(f"threads.{name}", "warning", text, f"{name}={cores}, or unset it", {name: value})
        elif int(value.split(",")[0]) > cores:
            fine = False
            text = f"{name}={value} on {cores} cores: threads wait for one another"
            yield Finding(f"threads.{name}", "warning", text, f"{name}={cores} or less", {name: value})
    if fine:
        shown = ", ".join(f"{name}={value}" for name, value in given.items()) or "as many threads as cores"
        yield Finding("threads", "ok", shown, values=given)


def switches(subject: Subject) -> Iterator[Finding]:
    """Variables that change what libraries do, as they are set."""
    there = {
        name: value
        for name in _SWITCHES
        if (value := subject.environment.get(name)) not in (None, "", _USUAL.get(name))
    }
    offline = any(
        there.get(name, "").lower() in ("1", "true", "yes", "on") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
    note = "; nothing is fetched from the hub, so models and data must be in its cache" if offline else ""
    shown = ", ".join(f"{name}={value}" for name, value in there.items()) or "none that change anything"
    yield Finding("variables", "ok", f"{shown}{note}", values=there)
