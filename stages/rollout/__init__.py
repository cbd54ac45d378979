"""Rollout (Algorithm 1, lines 6-7): G outputs of the old policy for every question, as ids with the engine's logprobs."""

from stages.rollout.config import (
    BackendConfig,
    HFBackendConfig,
    RolloutConfig,
    VLLMBackendConfig,
    VLLMServerConfig,
    engines_of,
    require_backend,
)
from stages.rollout.continuation import continue_outputs, cut_into_prefixes
from stages.rollout.dialogue import continue_dialogues
from stages.rollout.stage import rollout, stops_of

__all__ = [
    "BackendConfig",
    "HFBackendConfig",
    "RolloutConfig",
    "VLLMBackendConfig",
    "VLLMServerConfig",
    "continue_dialogues",
    "continue_outputs",
    "cut_into_prefixes",
    "engines_of",
    "require_backend",
    "rollout",
    "stops_of",
]
