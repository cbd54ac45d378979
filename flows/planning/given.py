"""What a plan is made from: the configuration, the model's shape, the machine, and lengths and sizes that nobody knows yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flows.config import IterativeRLConfig
from flows.planning.profiles import DeviceProfile
from flows.planning.shapes import ModelShape

__all__ = ["Given", "Lengths"]


@dataclass(frozen=True)
class Lengths:
    """Tokens."""

    prompt: float
    """Of a prompt, on average."""
    output: float
    """Of an output, on average."""
    longest: float
    """Of the longest output: what memory has to hold."""


@dataclass(frozen=True)
class Given:
    """Everything that a plan is a function of."""

    config: IterativeRLConfig
    shape: ModelShape
    profile: DeviceProfile
    memory: float
    """Bytes of one device; of a CPU those of the machine."""
    lengths: Lengths
    half: bool
    """Whether `auto` means bfloat16 here."""
    gpus: int = 1
    """Devices of a host that train together; 1 as well where the configuration asks for one rank."""
    nodes: int = 1
    sizes: Mapping[str, int] | None = None
    """Questions of every held-out set."""
    sft_steps: int | None = None
    """Optimizer steps that supervised fine-tuning took before; None: as many as it may."""

    @property
    def gpu(self) -> bool:
        """Whether models are on GPUs."""
        return self.profile.kind == "gpu"

    @property
    def questions(self) -> int:
        """Held-out questions of one evaluation."""
        return sum((self.sizes or {}).values())
