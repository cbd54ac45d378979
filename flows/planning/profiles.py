"""What a device computes and moves in a second: named presets from data sheets, or what `cohort doctor --bench` measured.

A stage's seconds are (FLOPs / rate + bytes / bandwidth) / utilisation + layers entered * overhead; bytes that are only
read have a rate of their own. A preset's utilisation is an assumption of ours; a measured profile's is what a small model's own
step came to on that machine.
"""

from __future__ import annotations

import difflib
import json
import math
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, PositiveFloat

from flows.planning.work import Work
from pipeline.config import Config, ConfigError

__all__ = ["PRESETS", "DeviceProfile", "profile_named", "read_profile", "seconds_of"]

_UTILISATION: Final = "utilisation and overheads: ours, not measured"


class DeviceProfile(Config):
    """Rates of one device; of a CPU those of one thread."""

    name: str
    """What it is called."""
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
    """Bytes a second read from tensors that are there: on a CPU several times `bandwidth`, which meets pages for the first
    time. None: as `bandwidth`."""
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
        """FLOP/s of products of that width: between two measured ones along the logarithm, beyond them the nearest."""
        table = sorted((float(size), rate) for size, rate in (self.bf16 if precision == "bf16" else self.fp32).items())
        below = [entry for entry in table if entry[0] <= width] or table[:1]
        above = [entry for entry in table if entry[0] >= width] or table[-1:]
        (low, slow), (high, fast) = below[-1], above[0]
        if high <= low:
            return fast if width >= high else slow
        share = math.log(width / low) / math.log(high / low)
        return slow + share * (fast - slow)

    def speed(self, threads: int | None) -> float:
        """How much faster than one thread so many are (None: all)."""
        if self.kind == "gpu" or self.threads == 1:
            return 1.0
        used = min(threads or self.threads, self.threads)
        return 1.0 + (self.parallel - 1.0) * (used - 1) / (self.threads - 1)


def seconds_of(
    work: Work,
    profile: DeviceProfile,
    width: int,
    precision: str,
    *,
    sampling: bool = False,
    threads: int | None = None,
) -> float:
    """Seconds of one device for a stage's work."""
    moved = work.traffic / profile.bandwidth + work.reads / (profile.reading or profile.bandwidth)
    busy = work.flops / profile.rate(width, precision) + moved
    utilisation = profile.decoding if sampling else profile.training
    fixed = work.layers * (profile.token_seconds if sampling else profile.layer_seconds)
    return busy / utilisation / profile.speed(threads) + fixed


def profile_named(name: str) -> DeviceProfile:
    """A preset.

    Raises:
        ConfigError: there is none of that name; says which is nearest.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"--device {name}: no such profile; {hint}There are {', '.join(PRESETS)}, or a file of your own")


def read_profile(file: Path) -> DeviceProfile:
    """A measured profile.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); measure again with `cohort doctor --bench`") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return DeviceProfile.parse(values, source=str(file))


def _gpu(
    name: str, *, memory: float, bf16: float, fp32: float, bandwidth: float, link: float, sheet: str
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
        source=f"{sheet}; {_UTILISATION}",
    )


PRESETS: Final = {
    profile.name: profile
    for profile in (
        _gpu(
            "a100-80g",
            memory=80e9,
            bf16=312e12,
            fp32=19.5e12,
            bandwidth=2.039e12,
            link=3e11,
            sheet="NVIDIA A100 Tensor Core GPU data sheet, SXM 80 GB, dense bfloat16",
        ),
        _gpu(
            "h100-80g",
            memory=80e9,
            bf16=989e12,
            fp32=67e12,
            bandwidth=3.35e12,
            link=4.5e11,
            sheet="NVIDIA H100 Tensor Core GPU data sheet, SXM 80 GB, dense bfloat16",
        ),
        _gpu(
            "h200-141g",
            memory=141e9,
            bf16=989e12,
            fp32=67e12,
            bandwidth=4.8e12,
            link=4.5e11,
            sheet="NVIDIA H200 Tensor Core GPU data sheet, SXM 141 GB, dense bfloat16",
        ),
        DeviceProfile(
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
            source=f"one AVX2 core as docs/lab.md found it, bfloat16 emulated; {_UTILISATION}",
        ),
    )
}
"""By name."""
