"""Stages that sample outputs, and score them by rules."""

from __future__ import annotations

from typing import Final

from flows.planning.decoding import hf_memory, side_by_side, vllm_memory
from flows.planning.disk import table_bytes
from flows.planning.given import Given
from flows.planning.memory import FLOAT, HALF, Memory
from flows.planning.profiles import seconds_of
from flows.planning.stage_plan import STAGE_CALL, StagePlan, When
from flows.planning.work import Work, decoding_work
from stages.rollout import BackendConfig, HFBackendConfig, RolloutConfig, VLLMBackendConfig

__all__ = ["ENGINE_START", "rules", "sampling"]

_RULE_SECONDS: Final = {"exact": 3e-4, "math_verify": 5e-3}
"""An output's verdict: 5,276 in 1.4 s by the exact path (docs/lab.md); math-verify: ours, not measured."""
ENGINE_START: Final = 30.0
"""Seconds until a vLLM engine is ready; docs/lab.md: 31 s on two CPU cores. On a GPU ours, not measured."""


def sampling(given: Given, name: str, when: When, config: RolloutConfig, questions: int, *, settings: str) -> StagePlan:
    """Outputs of so many questions; an evaluation's are scored in the same breath."""
    lengths, outputs = given.lengths, questions * config.G
    memory, keeps = _memory(given, config.backend, outputs, config.G)
    half = _half(given, config.backend)
    seconds, work = 0.0, Work()
    if questions:
        work = _work(given, config, questions, memory, half=half)
        seconds = _seconds(given, config.backend, work, half=half)
    disk = table_bytes(outputs, lengths.prompt, lengths.output, kind="rollouts")
    calls = 1
    if when == "evaluation":
        scored = rules(given, outputs)
        seconds, disk, calls = seconds + scored.seconds, disk + scored.disk, 2 * len(given.sizes or {})
    seconds += calls * STAGE_CALL
    return StagePlan(name, when, memory, work, seconds, disk, keeps=keeps, settings=settings)


def rules(given: Given, outputs: int) -> StagePlan:
    """Rewards by rules, and advantages: two tables."""
    verifiers = [part.verifier for part in given.config.reward.components if part.kind == "accuracy"]
    slowest = max((_RULE_SECONDS.get(verifier, 5e-3) for verifier in verifiers), default=1e-4)
    disk = table_bytes(outputs, 0, 0, kind="rewards") + table_bytes(outputs, 0, given.lengths.output, kind="values")
    return StagePlan("rules, advantages", "step", {}, Work(), outputs * slowest + 3 * STAGE_CALL, disk)


def _memory(given: Given, backend: BackendConfig, outputs: int, group: int) -> tuple[Memory, dict[str, float]]:
    """What it needs, and what of it stays."""
    lengths, shape = given.lengths, given.shape
    match backend:
        case HFBackendConfig():
            found = hf_memory(
                shape,
                backend,
                outputs=max(1, outputs),
                group=group,
                prompt=lengths.prompt,
                longest=lengths.longest,
                half=_half(given, backend),
            )
            return found, {"rollout": found["weights"]}
        case VLLMBackendConfig():
            found = vllm_memory(shape, backend, memory=given.memory, half=_half(given, backend), cpu=not given.gpu)
            stays = backend.between_calls == "warm" or (backend.between_calls == "auto" and not given.gpu)
            return found, {"rollout": sum(found.values())} if stays else {}
    return {}, {}  # a server's memory is elsewhere


def _half(given: Given, backend: BackendConfig) -> bool:
    return given.half if backend.dtype == "auto" else backend.dtype == "bfloat16"


def _work(given: Given, config: RolloutConfig, questions: int, memory: Memory, *, half: bool) -> Work:
    backend, lengths = config.backend, given.lengths
    longest = lengths.longest if isinstance(backend, HFBackendConfig) else lengths.output
    match backend:
        case HFBackendConfig():
            rows = float(backend.batch_rows)
        case VLLMBackendConfig():
            size = HALF if half else FLOAT
            rows = max(1.0, side_by_side(given.shape, backend, memory, lengths.prompt + lengths.output, size))
        case _:
            rows = float(backend.concurrency)
    return decoding_work(
        given.shape,
        questions,
        config.G,
        lengths.prompt,
        lengths.output,
        longest,
        side_by_side=min(rows, questions * config.G),
        half=half,
    )


def _seconds(given: Given, backend: BackendConfig, work: Work, *, half: bool) -> float:
    threads = None if backend.kind == "vllm_server" else backend.threads
    precision = "bf16" if half else "fp32"
    seconds = seconds_of(work, given.profile, given.shape.hidden, precision, sampling=True, threads=threads)
    if isinstance(backend, VLLMBackendConfig):
        killed = backend.between_calls == "kill" or (backend.between_calls == "auto" and given.gpu)
        return seconds / backend.tensor_parallel_size + (ENGINE_START if killed else 0.5)
    return seconds + FLOAT * given.shape.parameters / given.profile.bandwidth
