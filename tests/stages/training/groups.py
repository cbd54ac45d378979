"""Groups of ranks in tests: what stages are given, and the processes that they start."""

from __future__ import annotations

import os
import time
from typing import Any

import psutil
import torch

from stages.models import Checkpoint, load_model, load_optimizer_state
from stages.training import AdamWConfig, DeepSpeedEngineConfig, TorchEngineConfig, TrainingConfig

RANKS = 2


def on_two_ranks(stage: int = 1, **changes: Any) -> DeepSpeedEngineConfig:
    return DeepSpeedEngineConfig(**({"zero_stage": stage, "ranks": RANKS, "deadline": 120.0} | changes))


def training(engine: TorchEngineConfig | DeepSpeedEngineConfig | None, **changes: Any) -> TrainingConfig:
    """How both sides of a comparison train; None: plain torch, in this process."""
    adamw = AdamWConfig(learning_rate=1e-3, eps=1e-6)
    fixed = {"optimizer": adamw, "precision": "fp32", "max_grad_norm": 1.0, "warmup_steps": 4, "threads": 1}
    return TrainingConfig(**({"engine": engine or TorchEngineConfig()} | fixed | changes))


def learned(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All that a checkpoint has learned: its parameters, and the moments and step counts of its optimizer."""
    model = load_model(checkpoint, dtype=torch.float32)
    return dict(model.named_parameters()) | load_optimizer_state(checkpoint)


def apart(found: Checkpoint, expected: Checkpoint) -> float:
    """The largest relative distance of a tensor of two checkpoints."""
    ours, theirs = learned(found), learned(expected)
    assert ours.keys() == theirs.keys()
    distances = {name: (ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-3) for name in ours}
    # The true gradient of a key bias is 0: what its moments and steps are made of is rounding.
    return max(float(distance.detach()) for name, distance in distances.items() if "k_proj.bias" not in name)


def rank_processes(launcher: psutil.Process | None = None) -> dict[int, psutil.Process]:
    """The ranks that a process (None: this one) has started and that live, by rank."""
    found = {}
    for process in (launcher or psutil.Process()).children():
        if process.status() != psutil.STATUS_ZOMBIE and any("workers/process.py" in part for part in process.cmdline()):
            found[int(process.environ()["RANK"])] = process
    return found


def gone(processes: dict[int, psutil.Process]) -> bool:
    """Whether none of the processes is left, nor anything in their process groups."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if not any(process.is_running() or _group_lives(process.pid) for process in processes.values()):
            return True
        time.sleep(0.05)
    return False


def _group_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True
