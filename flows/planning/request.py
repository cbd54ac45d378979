"""From a configuration and what the command line says to everything a plan is made from."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from flows.config import IterativeRLConfig
from flows.doctor.places import nearest
from flows.places import Places
from flows.planning.cached import Progress, progress_of
from flows.planning.given import Given
from flows.planning.lengths import lengths_for, sft_steps_of, sizes_for
from flows.planning.machine import machine_of, on_devices
from flows.planning.model import shape_for

__all__ = ["Request", "Subject", "subject_of"]


@dataclass(frozen=True)
class Request:
    """What the command line says beside the configuration; None: nothing."""

    device: str | None = None
    gpus: int | None = None
    gpu_memory: float | None = None
    """GiB of one device."""
    nodes: int | None = None
    model_config: Path | None = None
    prompt_tokens: float | None = None
    mean_output_tokens: float | None = None


@dataclass(frozen=True)
class Subject:
    """What is planned, how much of it is there, and what had to be assumed."""

    given: Given
    progress: Progress
    assumptions: tuple[str, ...]
    free: float | None = None
    """Bytes that are free on the disk of the root; None: nobody can say."""


def subject_of(config: IterativeRLConfig, places: Places, request: Request) -> Subject:
    """Look everything up that a plan needs; nothing is computed, downloaded or changed.

    Raises:
        ConfigError: see `machine_of`, `shape_for`, `lengths_for`.
    """
    machine = machine_of(
        places, device=request.device, gpus=request.gpus, gpu_memory=request.gpu_memory, nodes=request.nodes
    )
    config, of_devices = on_devices(config, request.gpus, request.nodes)
    store = places.open_store()
    progress = progress_of(config, store)
    shape, of_shape = shape_for(config, places, progress.ledger, request.model_config)
    lengths, of_lengths = lengths_for(
        config, places, store, progress.ledger, prompt=request.prompt_tokens, output=request.mean_output_tokens
    )
    sizes, of_sizes = sizes_for(config)
    steps = sft_steps_of(store, progress.ledger)
    of_steps = ["supervised fine-tuning takes all of sft.max_steps"] if config.sft and steps is None else []
    given = Given(
        config=config,
        shape=shape,
        profile=machine.profile,
        memory=machine.memory,
        lengths=lengths,
        half=machine.half,
        gpus=machine.gpus,
        nodes=machine.nodes,
        sizes=sizes,
        sft_steps=steps,
    )
    said = [*of_devices, *of_shape, *of_lengths, *of_sizes, *of_steps, *machine.assumptions, *_uncounted(config)]
    return Subject(given, progress, tuple(said), _free(places))


def _free(places: Places) -> float | None:
    with contextlib.suppress(OSError):
        return float(shutil.disk_usage(nearest(places.root)).free)
    return None


def _uncounted(config: IterativeRLConfig) -> list[str]:
    """What the plan leaves out."""
    said = []
    if config.dynamic_sampling:
        said.append("no further draws of dynamic_sampling")
    if config.reward_model is not None and config.reward_model.step_labels.kind == "monte_carlo":
        said.append("the continuations of reward_model.step_labels are not counted")
    return said
