"""Describe the machine that a plan is for: its devices, and what one of them computes and moves in a second.

Rates are those of a data sheet (a preset), or what `cohort doctor --bench` measured. A preset's utilisation is assumed; a
measured profile's is what the step of a small model reached on that machine.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import psutil
from pydantic import Field, PositiveFloat

from flows.config import IterativeRLConfig
from flows.runs.paths import Places
from pipeline.config import Config, ConfigError
from stages.training import ComputeConfig, DeepSpeedEngineConfig, TorchEngineConfig, TrainingConfig, native_bf16
from stages.training.hardware import automatic

DEVICE_FILE: Final = "device.json"
"""Below the root: what `cohort doctor --bench` measured."""
_GPU: Final = "a100-80g"
"""Whose rates are taken where GPUs are asked for and none is named; ours: the paper's contemporary."""
_UTILISATION: Final = "utilisation and overheads: ours, not measured"
_GIB: Final = 2.0**30


class DeviceProfile(Config):
    """Rates of one device; of a CPU those of one thread."""

    name: str
    """Name of the device."""
    kind: Literal["cpu", "gpu"]
    """Where models are trained."""
    memory: PositiveFloat
    """Bytes of the device, or of the machine."""
    fp32: dict[str, PositiveFloat] = Field(min_length=1)
    """FLOP/s of float32 matrix products, by the width of the model (hidden size)."""
    bf16: dict[str, PositiveFloat] = Field(min_length=1)
    """The same in bfloat16."""
    bandwidth: PositiveFloat
    """Bytes a second that pass through memory, reads and writes together, where large tensors are allocated anew."""
    reading: PositiveFloat | None = None
    """Bytes a second read from existing tensors: on a CPU several times `bandwidth`, which touches new pages. None: equal."""
    interconnect: PositiveFloat = 1e10
    """Bytes a second between two devices, in one direction."""
    training: PositiveFloat = 1.0
    """Utilisation of a forward and backward pass."""
    decoding: PositiveFloat = 1.0
    """Utilisation of sampling token by token."""
    layer_seconds: float = Field(0.0, ge=0)
    """Fixed cost of entering a layer, in training."""
    token_seconds: float = Field(0.0, ge=0)
    """Fixed cost of entering a layer, in sampling."""
    parallel: PositiveFloat = 1.0
    """Speed of all threads over that of one."""
    threads: int = Field(1, ge=1)
    """All threads."""
    disk: PositiveFloat = 1e9
    """Bytes a second written and synced."""
    hashing: PositiveFloat = 1e9
    """Bytes a second through SHA-256."""
    source: str = ""
    """Where the figures come from."""
    date: str = ""
    """When they were measured."""
    packages: dict[str, str] = Field(default_factory=dict)
    """Versions that they were measured with."""

    def rate(self, width: float, precision: str) -> float:
        """Return FLOP/s of products of that width: between two measured ones along the logarithm, beyond them the nearest."""
        table = sorted((float(size), rate) for size, rate in (self.bf16 if precision == "bf16" else self.fp32).items())
        below = [entry for entry in table if entry[0] <= width] or table[:1]
        above = [entry for entry in table if entry[0] >= width] or table[-1:]
        (low, slow), (high, fast) = below[-1], above[0]
        if high <= low:
            return fast if width >= high else slow
        share = math.log(width / low) / math.log(high / low)
        return slow + share * (fast - slow)

    def speed(self, threads: int | Literal["auto"]) -> float:
        """Return the speed of so many threads (`auto`: all) over that of one."""
        if self.kind == "gpu" or self.threads == 1:
            return 1.0
        used = self.threads if threads == "auto" else min(threads, self.threads)
        return 1.0 + (self.parallel - 1.0) * (used - 1) / (self.threads - 1)


@dataclass(frozen=True)
class Machine:
    """Devices, and what is assumed of them."""

    profile: DeviceProfile
    memory: float
    """Bytes of one device."""
    gpus: int
    """Of a host."""
    nodes: int
    assumptions: tuple[str, ...]

    @property
    def half(self) -> bool:
        """Whether `auto` is bfloat16 there: where it is emulated its products are the slower ones."""
        return max(self.profile.bf16.values()) > max(self.profile.fp32.values())


def machine_of(
    places: Places, *, device: str | None, gpus: int | None, gpu_memory: float | None, nodes: int | None
) -> Machine:
    """Return the machine that the options describe; without any, this one. Raise ConfigError where they make no sense."""
    for option, value in (("--gpus", gpus), ("--gpu-memory", gpu_memory), ("--nodes", nodes)):
        if value is not None and value <= 0:
            raise ConfigError(f"{option}: expected a positive number, found {value:g}")
    profile, assumed = _profile(places, device, wanted=bool(gpus or gpu_memory or nodes))
    if profile.kind == "cpu" and (gpus or gpu_memory):
        raise ConfigError(
            f"--gpus, --gpu-memory: {profile.name} is a CPU; name a GPU with --device ({', '.join(PRESETS)})"
        )
    here = profile.kind == "cpu" and device is None
    memory = gpu_memory * _GIB if gpu_memory else float(psutil.virtual_memory().total) if here else profile.memory
    source = f"{profile.source}, {profile.date}" if profile.date else profile.source
    return Machine(profile, memory, gpus or 1, nodes or 1, (*assumed, f"rates of {profile.name}: {source}"))


def settled(config: IterativeRLConfig, machine: Machine) -> tuple[IterativeRLConfig, list[str]]:
    """Return the configuration with what `auto` is on that machine in the place of it, and what is to be said of that."""
    precision, attention = automatic(cuda=machine.profile.kind == "gpu", bf16=machine.half)
    computing: dict[str, ComputeConfig] = {**_trainings(config)}
    if config.reward_model is not None:
        computing["reward_model.scoring"] = config.reward_model.scoring
    changes: dict[str, Any] = {}
    for where, each in computing.items():
        changes |= {f"{where}.precision": precision} if each.precision == "auto" else {}
        changes |= {f"{where}.attention": attention} if each.attention == "auto" else {}
    if not changes:
        return config, []
    said = f"where precision and attention are auto they are {precision} and {attention}"
    return config.override(changes, source="auto"), [said]


def on_devices(config: IterativeRLConfig, gpus: int | None, nodes: int | None) -> tuple[IterativeRLConfig, list[str]]:
    """Return the configuration with as many ranks as there are devices, and what is to be said of that."""
    if gpus is None and nodes is None:
        return config, []
    count, said = (gpus or 1) * (nodes or 1), []
    changes: dict[str, Any] = {}
    for where, training in _trainings(config).items():
        match training.engine:
            case DeepSpeedEngineConfig() if training.engine.ranks != count:
                changes[f"{where}.engine.ranks"] = count
            case TorchEngineConfig() if count > 1:
                said.append(f"{where}.engine is torch: one device trains, whatever there is; kind deepspeed takes more")
    if changes:
        said.append(f"{', '.join(changes)}: {count}, as many as there are devices")
    if (nodes or 1) > 1:
        said.append("name the hosts in training.engine.hosts; what is said here of several nodes is arithmetic only")
    return (config.override(changes, source="--gpus, --nodes") if changes else config), said


def _trainings(config: IterativeRLConfig) -> dict[str, TrainingConfig]:
    """Return everything that trains, by where the configuration says how."""
    found = {"update.training": config.update.training}
    if config.sft is not None:
        found["sft.training"] = config.sft.training
    if config.critic is not None:
        found["critic.training"] = config.critic.training
    if config.reward_model is not None:
        found["reward_model.training.training"] = config.reward_model.training.training
    return found


def _profile(places: Places, device: str | None, *, wanted: bool) -> tuple[DeviceProfile, list[str]]:
    """Return the rates, and what was assumed about them; `wanted`: GPUs are asked for."""
    if device is not None:
        file = Path(device)
        return (read_profile(file) if file.suffix == ".json" or file.is_file() else profile_named(device)), []
    measured = places.root / DEVICE_FILE
    found = read_profile(measured) if measured.is_file() else None
    if found is not None and (found.kind == "gpu" or not wanted):
        return found, []
    if wanted:
        return PRESETS[_GPU], [f"the GPU is an {_GPU} (name another with --device)"]
    return PRESETS["cpu-bf16" if native_bf16() else "cpu"], ["nothing was measured here: `cohort doctor --bench` does"]


def profile_named(name: str) -> DeviceProfile:
    """Return a preset; raise ConfigError, with the nearest name, where there is none."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"--device {name}: no such profile; {hint}There are {', '.join(PRESETS)}, or a file of your own")


def read_profile(file: Path) -> DeviceProfile:
    """Read a measured profile; raise ConfigError where it cannot be read, or is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); measure again with `cohort doctor --bench`") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return DeviceProfile.parse(values, source=str(file))


def _gpu(
    name: str, sheet: str, *, memory: float, bf16: float, fp32: float, bandwidth: float, link: float
) -> DeviceProfile:
    return DeviceProfile(
        name=name,
        kind="gpu",
        memory=memory,
        fp32={"1": fp32},
        bf16={"1": bf16},
        bandwidth=bandwidth,
        interconnect=link,
        training=0.4,
        decoding=0.5,
        layer_seconds=3e-4,
        token_seconds=3e-4,
        source=f"NVIDIA {sheet}, dense bfloat16; {_UTILISATION}",
    )


_A100: Final = {"memory": 80e9, "bf16": 312e12, "fp32": 19.5e12, "bandwidth": 2.039e12, "link": 3e11}
_H100: Final = {"memory": 80e9, "bf16": 989e12, "fp32": 67e12, "bandwidth": 3.35e12, "link": 4.5e11}
_CPU: Final = DeviceProfile(
    name="cpu",
    kind="cpu",
    memory=16e9,
    fp32={"1": 6e10},
    bf16={"1": 2e9},
    bandwidth=8e9,
    training=0.7,
    decoding=0.7,
    layer_seconds=5e-4,
    token_seconds=3e-4,
    disk=2e8,
    hashing=1e9,
    source=f"one AVX2 core as docs/lab found it, bfloat16 emulated; {_UTILISATION}",
)
PRESETS: Final = {
    "a100-80g": _gpu("a100-80g", "A100 Tensor Core GPU data sheet, SXM 80 GB", **_A100),
    "h100-80g": _gpu("h100-80g", "H100 Tensor Core GPU data sheet, SXM 80 GB", **_H100),
    "h200-141g": _gpu(
        "h200-141g", "H200 Tensor Core GPU data sheet, SXM 141 GB", **_H100 | {"memory": 141e9, "bandwidth": 4.8e12}
    ),
    "cpu": _CPU,
    "cpu-bf16": _CPU.override(
        {
            "name": "cpu-bf16",
            "fp32": {"1": 8e10},
            "bf16": {"1": 2e11},
            "source": f"one AVX512-BF16 core as docs/lab found it; {_UTILISATION}",
        },
        source="preset",
    ),
}
"""By name."""
