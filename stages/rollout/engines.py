"""Load what decodes: a resident model in this process, vLLM in processes of its own, or a server of others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from pipeline.residency import holder_of, resident
from stages.models import Checkpoint, architecture_of, copy_weights, load_model, load_weights, model_weights
from stages.rollout.config import (
    BackendConfig,
    HFBackendConfig,
    VLLMBackendConfig,
    VLLMServerConfig,
    float32_logits,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.rollout.generator import Generator


@contextlib.contextmanager
def generator_of(policy: Checkpoint, backend: BackendConfig, *, stop_strings: bool = False) -> Iterator[Generator]:
    """Yield what decodes, with the weights of `policy`, its values checked (`CheckedGenerator`); for the block.

    Args:
        stop_strings: whether outputs will be ended by some.

    Raises:
        ConfigError: an engine that is not installed.
        WorkerError: vLLM's process died, hung, or cannot run this model.
        ServerError: the server cannot be reached, or cannot do what it is asked.
        StaleWeightsError: an engine, or a server, with other weights.
    """
    from stages.rollout.generator import CheckedGenerator
    from stages.rollout.probe import vocabulary_and_window

    known, _ = vocabulary_and_window(policy)
    match backend:
        case HFBackendConfig():
            from stages.rollout.hf import HFGenerator
            from stages.training.hardware import threads

            with threads(backend.threads):
                generator = HFGenerator(resident_model(policy, backend), batch_rows=backend.batch_rows)
                yield CheckedGenerator(generator, "hf", known)
        case VLLMBackendConfig():
            from stages.rollout.vllm import vllm_generator

            with vllm_generator(policy, backend, reads_text=stop_strings) as engine:
                yield CheckedGenerator(engine, "vllm", known)
        case VLLMServerConfig():
            from stages.rollout.served import ServedGenerator

            yield CheckedGenerator(ServedGenerator(policy, backend), f"the server {backend.url}", known)
        case _:
            assert_never(backend)


@dataclass
class _Resident:
    """Hold a model, and the digest of the checkpoint whose weights it has (None while they change)."""

    model: PreTrainedModel
    holds: str | None


def resident_model(policy: Checkpoint, backend: HFBackendConfig) -> PreTrainedModel:
    """The policy's model, ready: reloaded in place when only the weights differ, made anew when the architecture does.

    Weights that an engine in this process has are copied from there.
    """
    from stages.rollout.generator import HF, make_room
    from stages.rollout.kv_cache import GROUPED
    from stages.training.engine import CheckpointedEngine
    from stages.training.forward import keep_float32_logits
    from stages.training.hardware import inference_dtype, training_device

    device, dtype = training_device(), inference_dtype(backend.dtype)
    chosen = backend.attention if backend.attention != "auto" else "sdpa" if device == "cuda" else "grouped"
    attention = GROUPED if chosen == "grouped" else chosen

    def make() -> _Resident:
        model = load_model(policy, dtype=dtype, attention=attention)
        if float32_logits(backend):
            keep_float32_logits(model)
        return _Resident(model.to(device), policy.state)

    make_room(HF, device)
    kept = resident(HF, (architecture_of(policy), dtype, float32_logits(backend), attention, device), make)
    if kept.holds != policy.state:
        kept.holds = None
        trainer = holder_of(policy.state)
        if isinstance(trainer, CheckpointedEngine):
            copy_weights(model_weights(kept.model), trainer.weights())
        else:
            load_weights(kept.model, policy)
        kept.holds = policy.state
    return kept.model


def hold_weights(policy: Checkpoint, backend: HFBackendConfig, folder: str) -> Checkpoint:
    """Load the weights of a policy in the sampler's process; those that are not in the store are in `folder`."""
    from stages.rollout.apart import HandedOver

    handed = resident("handed over", None, HandedOver)
    handed.state, handed.folder = policy.state, Path(folder)
    try:
        resident_model(policy, backend)
    finally:
        handed.state = ""
    return policy
