"""What is examined: a root folder, an environment, and where it is known, the configuration that is to run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.places import Places
from pipeline.config import flatten
from stages.rollout.config import VLLMBackendConfig, VLLMServerConfig

if TYPE_CHECKING:
    from flows.config import IterativeRLConfig

__all__ = ["Subject", "subject_of"]


@dataclass(frozen=True)
class Subject:
    """A machine as a run would find it."""

    places: Places
    environment: Mapping[str, str]
    """Environment variables; what Cohort itself sets by default is among them."""
    quick: bool = False
    """Nothing heavy is imported, and no process that does is started."""
    vllm: bool = False
    """Whether vLLM is wanted; else its absence is no fault."""
    vllm_python: Path | None = None
    """Interpreter of the environment that has vLLM; None: this one."""
    vllm_servers: tuple[str, ...] = ()
    """Addresses of running `vllm serve` that the configuration names."""
    ranks: int = 1
    """Ranks that the configuration trains on here."""


def subject_of(
    places: Places,
    environment: Mapping[str, str],
    *,
    quick: bool = False,
    vllm_python: Path | None = None,
    config: IterativeRLConfig | None = None,
) -> Subject:
    """What to examine for a configuration (None: for any), with another interpreter for vLLM than the one it names."""
    backends = list(_backends(config))
    engines = [backend for backend in backends if isinstance(backend, VLLMBackendConfig)]
    settings = flatten(config.model_dump(mode="json")) if config else {}
    return Subject(
        places=places,
        environment=environment,
        quick=quick,
        vllm=bool(engines or vllm_python),
        vllm_python=vllm_python or next((engine.python for engine in engines if engine.python), None),
        vllm_servers=tuple({backend.url: None for backend in backends if isinstance(backend, VLLMServerConfig)}),
        ranks=max([_ranks_here(settings, key) for key in settings if key.endswith("training.engine.ranks")], default=1),
    )


def _ranks_here(settings: Mapping[str, Any], key: str) -> int:
    """Of the ranks that a training has, those on this host, which is the first."""
    hosts = settings.get(f"{key.removesuffix('ranks')}hosts")
    return int(hosts[0]["ranks"] if hosts else settings[key])


def _backends(config: IterativeRLConfig | None) -> Iterator[object]:
    if config is not None:
        yield config.rollout.backend
        yield config.evaluation.backend
