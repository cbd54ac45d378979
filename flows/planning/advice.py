"""What to change when a run does not fit: settings, each tried by planning the run again, ranked by what they save."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from flows.planning.plan import Plan, plan_of
from pipeline.config import Config, ConfigError
from stages.rollout import HFBackendConfig, RolloutConfig, VLLMBackendConfig
from stages.training import AdamWConfig, DeepSpeedEngineConfig, TrainingConfig

__all__ = ["Change", "changes_of", "remedy_for", "space_saved"]

_WORTH: Final = 0.01
"""Of the peak: a change that saves less is not named."""
_KEEP: Final = (("keep.optimizer", 1), ("keep.rollouts", 2), ("keep.checkpoints", 2))
"""What a run can do without soonest comes first."""
_LEAST_TOKENS: Final = 1024
"""A micro-batch below this leaves a device idle; ours."""


@dataclass(frozen=True)
class Change:
    """Settings, and the plan of the run with them."""

    text: str
    settings: Mapping[str, Any]
    saves: float
    """Bytes of the fullest device."""
    plan: Plan

    @property
    def fits(self) -> bool:
        """Whether the run fits with this change alone."""
        return self.plan.missing <= 0

    @property
    def option(self) -> str:
        """As the command line takes it."""
        return " ".join(f"--set {key}={_written(value)}" for key, value in self.settings.items())


def changes_of(plan: Plan) -> list[Change]:
    """Changes that lower the peak, those that let the run fit first, then by what they save; of equal ones the faster."""
    tried = [change for text, settings in _candidates(plan) if (change := _tried(plan, text, settings)) is not None]
    return sorted(tried, key=lambda change: (not change.fits, -round(change.saves / 2**28), change.plan.seconds))


def remedy_for(plan: Plan) -> tuple[list[Change], Plan]:
    """The best change, then the best of what is left, until the run fits or nothing helps; the plan with all of them."""
    taken: list[Change] = []
    while plan.missing > 0 and len(taken) < 8:
        found = changes_of(plan)
        if not found:
            break
        taken.append(found[0])
        plan = found[0].plan
    return taken, plan


def space_saved(plan: Plan) -> list[tuple[str, float]]:
    """Settings of `keep` and the bytes that would be there at the end, the least first."""
    found = []
    for settings in (_KEEP[:1], _KEEP[:2], _KEEP):
        changed = plan_of(replace(plan.given, config=plan.given.config.override(dict(settings))))
        if changed.kept < plan.kept:
            found.append((" ".join(f"--set {key}={value}" for key, value in settings), changed.kept))
    return sorted(found, key=lambda entry: entry[1])


def _tried(plan: Plan, text: str, settings: Mapping[str, Any]) -> Change | None:
    try:
        config = plan.given.config.override(settings)
    except ConfigError:  # does not go with the rest of the configuration
        return None
    changed = plan_of(replace(plan.given, config=config))
    saves = plan.peak - changed.peak
    return Change(text, settings, saves, changed) if saves > _WORTH * plan.peak else None


def _candidates(plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    """For the fullest stage, and for what others keep beside it."""
    config = plan.given.config
    where = plan.worst.settings
    if where.endswith("training"):
        yield from _of_training(plan, where)
    elif where:
        yield from _of_sampling(plan, where)
    if plan.worst.held and where != "update.training":
        yield from _of_what_is_kept(plan)
    if config.update.needs_reference and config.reference_pass == "inline":
        yield "score the reference in a pass of its own", {"reference_pass": "stage"}


def _of_training(plan: Plan, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    training: Any = _at(plan.given.config, where)
    assert isinstance(training, TrainingConfig)
    yield from _of_engine(plan, where, training)
    if not training.activation_checkpointing:
        yield "compute activations again in backward", {f"{where}.activation_checkpointing": True}
    if training.attention == "eager":
        yield "attention without its T^2 weights", {f"{where}.attention": "sdpa"}
    if training.precision == "fp32" and plan.given.half:
        yield "matrix products in bfloat16", {f"{where}.precision": "bf16"}
    if training.adapter is None and where in ("update.training", "sft.training"):
        changes: dict[str, Any] = {f"{where}.adapter": {"r": 8}}
        if not isinstance(training.optimizer, AdamWConfig):
            changes[f"{where}.optimizer"] = {"kind": "adamw"}
        yield "train an adapter instead of the weights", changes
    owner = where.removesuffix(".training")
    budget = _at(plan.given.config, f"{owner}.micro_batch_tokens")
    for smaller in (budget // 2, budget // 4, budget // 8):
        if smaller >= _LEAST_TOKENS:
            yield "fewer tokens at a time", {f"{owner}.micro_batch_tokens": smaller}


def _of_engine(plan: Plan, where: str, training: TrainingConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    engine = training.engine
    devices = plan.given.gpus * plan.given.nodes
    if not isinstance(engine, DeepSpeedEngineConfig):
        if devices > 1:
            yield "train on all devices", {f"{where}.engine": {"kind": "deepspeed", "zero_stage": 3, "ranks": devices}}
        return
    if isinstance(training.optimizer, AdamWConfig) and engine.ranks > 1:
        for stage in range(engine.zero_stage + 1, 4):
            yield "share out more of the training state", {f"{where}.engine.zero_stage": stage}
    if not plan.given.gpu:
        return
    if engine.offload == "none" and engine.zero_stage:
        yield "optimizer state in host memory", {f"{where}.engine.offload": "optimizer"}
    if engine.offload != "parameters" and engine.zero_stage == 3:
        yield "parameters in host memory too", {f"{where}.engine.offload": "parameters"}
    if engine.zero_stage:
        yield "twice as many GPUs", {f"{where}.engine.ranks": 2 * engine.ranks}


def _of_sampling(plan: Plan, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    rollout: RolloutConfig = plan.given.config.rollout
    backend = rollout.backend if where == "rollout" else plan.given.config.evaluation.backend or rollout.backend
    match backend:
        case HFBackendConfig():
            for rows in (backend.batch_rows // 2, backend.batch_rows // 4, backend.batch_rows // 8):
                if rows >= 1:
                    yield "fewer outputs side by side", {f"{where}.backend.batch_rows": rows}
            if plan.given.half and backend.dtype == "float32":
                yield "sample in bfloat16", {f"{where}.backend.dtype": "bfloat16"}
            if plan.given.gpu:
                yield "sample with vLLM, which takes a share of the GPU", {f"{where}.backend": {"kind": "vllm"}}
        case VLLMBackendConfig():
            share = backend.gpu_memory_utilization
            for less in (0.75 * share, 0.5 * share):
                yield "a smaller share for vLLM", {f"{where}.backend.gpu_memory_utilization": round(less, 2)}


def _of_what_is_kept(plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    """The trainer's state stays while others work."""
    training = plan.given.config.update.training
    yield from _of_engine(plan, "update.training", training)
    backend = plan.given.config.rollout.backend
    if isinstance(backend, VLLMBackendConfig) and backend.between_calls == "warm" and plan.given.gpu:
        yield "let vLLM give its memory back between calls", {"rollout.backend.between_calls": "sleep"}


def _at(config: Config, dotted: str) -> Any:
    value: Any = config
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        inside = ", ".join(f"{key}: {_written(part)}" for key, part in value.items())
        return f"'{{{inside}}}'"
    return str(value).lower() if isinstance(value, bool) else str(value)
