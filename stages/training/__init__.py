"""Training engines and batches, shared by supervised fine-tuning and the policy update."""

from stages.training.config import (
    AdamWConfig,
    ComputeConfig,
    DeepSpeedEngineConfig,
    LoRAConfig,
    MuonConfig,
    TorchEngineConfig,
    TrainingConfig,
)
from stages.training.hardware import native_bf16, threads

__all__ = [
    "AdamWConfig",
    "ComputeConfig",
    "DeepSpeedEngineConfig",
    "LoRAConfig",
    "MuonConfig",
    "TorchEngineConfig",
    "TrainingConfig",
    "native_bf16",
    "threads",
]
