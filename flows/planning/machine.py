"""The machine that a plan is for: what was asked for, what was measured on this one, or a preset that says its assumptions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from flows.config import IterativeRLConfig
from flows.places import Places
from flows.planning.profiles import PRESETS, DeviceProfile, profile_named, read_profile
from pipeline.config import ConfigError
from stages.training import DeepSpeedEngineConfig, TorchEngineConfig, TrainingConfig, native_bf16

__all__ = ["DEVICE_FILE", "Machine", "machine_of", "on_devices"]

DEVICE_FILE: Final = "device.json"
"""Below the root: what `cohort doctor --bench` measured."""
_GPU: Final = "a100-80g"
"""Whose rates are taken where GPUs are asked for and none is named; ours: the paper's contemporary."""
_GIB: Final = 2.0**30


@dataclass(frozen=True)
class Machine:
    """Devices, and what is assumed of them."""

    profile: DeviceProfile
    memory: float
    """Bytes of one device."""
    gpus: int
    """Of a host."""
    nodes: int
    half: bool
    """Whether `auto` is bfloat16."""
    assumptions: tuple[str, ...]


def machine_of(
    places: Places, *, device: str | None, gpus: int | None, gpu_memory: float | None, nodes: int | None
) -> Machine:
    """The machine that the options describe; without any, this one.

    Raises:
        ConfigError: a number that is not positive, an unknown profile, or a file that is none.
    """
    for option, value in (("--gpus", gpus), ("--gpu-memory", gpu_memory), ("--nodes", nodes)):
        if value is not None and value <= 0:
            raise ConfigError(f"{option}: expected a positive number, found {value:g}")
    profile, said = _profile(places, device, wanted=bool(gpus or gpu_memory or nodes))
    if profile.kind == "cpu" and (gpus or gpu_memory):
        raise ConfigError(
            f"--gpus, --gpu-memory: {profile.name} is a CPU; name a GPU with --device ({', '.join(PRESETS)})"
        )
    here = profile.kind == "cpu" and device is None
    memory = gpu_memory * _GIB if gpu_memory else float(psutil.virtual_memory().total) if here else profile.memory
    half = profile.kind == "gpu" or native_bf16()
    source = f"{profile.source}, {profile.date}" if profile.date else profile.source
    return Machine(profile, memory, gpus or 1, nodes or 1, half, (*said, f"rates of {profile.name}: {source}"))


def on_devices(config: IterativeRLConfig, gpus: int | None, nodes: int | None) -> tuple[IterativeRLConfig, list[str]]:
    """The configuration with as many ranks as there are devices, and what is to be said of that."""
    if gpus is None and nodes is None:
        return config, []
    count, said = (gpus or 1) * (nodes or 1), []
    changes: dict[str, Any] = {}
    for where, training in _trainings(config):
        match training.engine:
            case DeepSpeedEngineConfig() if training.engine.ranks != count:
                changes[f"{where}.engine.ranks"] = count
            case TorchEngineConfig() if count > 1:
                said.append(f"{where}.engine is torch: one device trains, whatever there is; kind deepspeed takes more")
            case _:
                pass
    if changes:
        said.append(f"{', '.join(changes)}: {count}, as many as there are devices")
    if (nodes or 1) > 1:
        said.append("name the hosts in training.engine.hosts; what is said here of several nodes is arithmetic only")
    return (config.override(changes, source="--gpus, --nodes") if changes else config), said


def _profile(places: Places, device: str | None, *, wanted: bool) -> tuple[DeviceProfile, list[str]]:
    if device is not None:
        file = Path(device)
        return (read_profile(file) if file.suffix == ".json" or file.is_file() else profile_named(device)), []
    measured = places.root / DEVICE_FILE
    found = read_profile(measured) if measured.is_file() else None
    if wanted:
        if found is not None and found.kind == "gpu":
            return found, []
        return PRESETS[_GPU], [f"the GPU is an {_GPU} (name another with --device)"]
    if found is not None:
        return found, []
    return PRESETS["cpu"], ["nothing was measured here: `cohort doctor --bench` does"]


def _trainings(config: IterativeRLConfig) -> list[tuple[str, TrainingConfig]]:
    """Everything that trains, by where the configuration says how."""
    found = [("update.training", config.update.training)]
    if config.sft is not None:
        found.append(("sft.training", config.sft.training))
    if config.critic is not None:
        found.append(("critic.training", config.critic.training))
    if config.reward_model is not None:
        found.append(("reward_model.training.training", config.reward_model.training.training))
    return found
