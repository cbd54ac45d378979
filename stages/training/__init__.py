"""Training engines and batches, shared by supervised fine-tuning and the policy update."""

from stages.training.config import (
    AdamWConfig,
    DeepSpeedEngineConfig,
    LoRAConfig,
    MuonConfig,
    TorchEngineConfig,
    TrainingConfig,
)
from stages.training.hardware import arithmetic, native_bf16, threads

__all__ = [
    "AdamWConfig",
    "DeepSpeedEngineConfig",
    "LoRAConfig",
    "MuonConfig",
    "TorchEngineConfig",
    "TrainingConfig",
    "arithmetic",
    "native_bf16",
    "threads",
]
