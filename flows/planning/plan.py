"""Plan a run: its stages, how often each is called, the fullest device, the cost of all calls, and what to change.

A change is a setting, tried by planning the run again; changes are ranked by what they save.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from flows.algorithm.side_by_side import samples_concurrently
from flows.config import IterativeRLConfig
from flows.planning import stages as figures
from flows.planning.work import Given, StagePlan
from flows.runs.checkpoints import has_room, interval_of
from pipeline.config import Config, ConfigError
from stages.rollout import HFBackendConfig, VLLMBackendConfig
from stages.training import AdamWConfig, DeepSpeedEngineConfig, TrainingConfig

_GIB: Final = 2.0**30
_LIBRARIES: Final = 1.0 * _GIB
"""A CPU process with torch, transformers and DeepSpeed imported; docs/lab: 900 to 960 MiB."""
_CONTEXT: Final = 0.6 * _GIB
"""Of CUDA, for each process on a device; ours, not measured."""
_FRAGMENTS: Final = 0.05
"""Share of a GPU's memory that the allocator cannot hand out; ours, not measured."""
_WORTH: Final = 0.01
"""Of the peak: a change that saves less is not named."""
_KEEP: Final = (("keep.optimizer", 1), ("keep.rollouts", 2), ("keep.checkpoints", 2))
"""What a run can do without soonest comes first."""
_LEAST_TOKENS: Final = 1024
"""A micro-batch below this leaves a device idle; ours."""

Settings = Mapping[str, Any]
"""Dotted key -> value."""


@dataclass(frozen=True)
class Plan:
    """The stages of a run, and what they come to."""

    given: Given
    stages: tuple[StagePlan, ...]

    @cached_property
    def counts(self) -> Mapping[str, float]:
        """Return the calls of a stage in the whole run, by when it is called."""
        config = self.given.config
        learned = config.reward_model
        return {
            "once": 1,
            "iteration": max(1, config.iterations if learned is not None and learned.retrain else 1),
            "step": config.iterations * config.steps,
            "evaluation": evaluations_of(config),
        }

    @property
    def overhead(self) -> float:
        """Return the bytes of a device that no formula counts."""
        if not self.given.gpu:
            return _LIBRARIES * (1 + bool(self.overlapped))
        processes = 1 + (self.ranks > 1) + isinstance(self.given.config.rollout.backend, VLLMBackendConfig)
        return _CONTEXT * processes + _FRAGMENTS * self.given.machine.memory

    @property
    def ranks(self) -> int:
        """Return the number of devices that the policy update takes."""
        return getattr(self.given.config.update.training.engine, "ranks", 1)

    @property
    def worst(self) -> StagePlan:
        """Return the stage that fills the device most."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def peak(self) -> float:
        """Return the bytes of the fullest device at its worst moment."""
        return self.worst.peak + self.overhead

    @property
    def missing(self) -> float:
        """Return the bytes by which it does not fit; negative: what is left."""
        return self.peak - self.given.machine.memory

    def total(self, stage: StagePlan) -> float:
        """Return the seconds of all calls of a stage."""
        return stage.seconds * self.counts[stage.when]

    @property
    def seconds(self) -> float:
        """Return the seconds of the whole run."""
        return sum(map(self.total, self.stages)) - self.overlapped * self.counts["step"]

    @cached_property
    def overlapped(self) -> float:
        """Return the seconds of a mean step in which outputs are sampled while the policy is updated.

        0 on a CPU whose threads were not measured: it counts as one core.
        """
        config, names = self.given.config, ("rollout", "update")
        if self.given.gpu or not samples_concurrently(config, cores=self.given.machine.profile.threads):
            return 0.0
        shorter = min(stage.seconds for stage in self.stages if stage.name in names)
        return shorter * (config.steps - 1) / config.steps

    @property
    def disk(self) -> float:
        """Return the bytes of the whole run, nothing pruned."""
        return sum(stage.disk * self.counts[stage.when] for stage in self.stages)

    @property
    def kept(self) -> float:
        """Return the bytes that are there at the end, under the configuration's `keep`."""
        return sum(map(self._kept_of, self.stages))

    def _kept_of(self, stage: StagePlan) -> float:
        keep, calls = self.given.config.keep, self.counts[stage.when]
        if stage.when != "step":
            return stage.disk * calls
        if not stage.state:
            return stage.disk * min(calls, keep.rollouts or calls)
        # Policies that were evaluated, and those at the start of an iteration, keep their weights.
        spared = evaluations_of(self.given.config) + self.given.config.iterations
        written = calls * stage.written
        weights = min(written, keep.checkpoints + spared if keep.checkpoints else written)
        return (stage.disk / stage.written - stage.state) * weights + stage.state * min(
            weights, keep.optimizer or written
        )

    def of_a_step(self) -> tuple[float, float]:
        """Return seconds and bytes of one step, evaluations apart."""
        own = [stage for stage in self.stages if stage.when == "step"]
        return sum(stage.seconds for stage in own) - self.overlapped, sum(stage.disk for stage in own)


def plan_of(given: Given) -> Plan:
    """Make the plan, every stage with what the others keep in memory meanwhile."""
    stages = _with_checkpoints(given, list(_stages(given)))
    return Plan(given, tuple(replace(stage, held=_held(stage, stages)) for stage in stages))


def _with_checkpoints(given: Given, stages: list[StagePlan]) -> list[StagePlan]:
    """Spread the checkpoints that `checkpoint.every` asks for over the steps."""
    config, steps = given.config, given.config.iterations * given.config.steps
    writing = [stage for stage in stages if stage.writing]
    size = sum(stage.disk for stage in writing)
    every = interval_of(
        config.checkpoint,
        size,
        sum(stage.writing for stage in writing),
        sum(stage.seconds for stage in stages if stage.when == "step"),
    )
    share = _written(given, every, size) / steps
    background = config.checkpoint.background and every > 1  # small ones are written at once
    return [
        replace(
            stage,
            disk=stage.disk * share,
            written=share,
            seconds=stage.seconds + (0.0 if background else stage.writing * share),
        )
        if stage.writing
        else stage
        for stage in stages
    ]


def _written(given: Given, every: int, size: float) -> int:
    """Return how many steps leave a checkpoint of `size` bytes; with `auto` as far as a tenth of the free disk holds them."""
    config, count, there = given.config, 0, 0
    kept = min(filter(None, (config.keep.checkpoints, config.keep.optimizer)), default=config.iterations * config.steps)
    for step in range(1, config.iterations * config.steps + 1):
        limited = config.checkpoint.every == "auto" and given.free is not None
        due = step % every == 0 and (not limited or has_room(size, there * size, given.free or 0.0))
        if due or config.looks_back_at(step):
            count, there = count + 1, min(there + 1, kept)
    return count


def evaluations_of(config: IterativeRLConfig) -> int:
    """Return how often the policy is evaluated: before, when it is due, and at the end."""
    last = config.iterations * config.steps
    return 1 + sum(config.evaluation.is_due(step, last) for step in range(1, last + 1))


def _stages(given: Given) -> Iterator[StagePlan]:
    config, rollout, step = given.config, given.config.rollout, given.config.questions_per_step
    if config.sft is not None:
        yield figures.sft(given)
    if (learned := config.reward_model) is not None:
        asked = learned.questions + (learned.held_out_questions if given.sizes else 0)
        yield figures.sampling(given, "reward model's outputs", "iteration", rollout, asked, settings="rollout")
        yield from figures.reward_models(given, learned)
    where, questions = "rollout" if config.evaluation.backend is None else "evaluation", sum(given.sizes.values())
    for mode, sampling, _ in config.evaluation.modes(rollout):
        yield figures.sampling(given, f"evaluation ({mode})", "evaluation", sampling, questions, settings=where)
    if config.data_source != "demonstrations":
        yield figures.sampling(given.sampler, "rollout", "step", rollout, step, settings="rollout")
        yield figures.rules(given)
    if config.critic is not None:
        yield from figures.critic(given)
    if config.update.needs_reference and config.reference_pass == "stage":
        yield figures.reference_pass(given)
    if given.teacher is not None and config.compares_policies:
        yield figures.teacher(given)
    yield figures.update(given)


def _held(stage: StagePlan, stages: list[StagePlan]) -> float:
    """Return what others keep while a stage works; the first one runs before all others."""
    if stage.when == "once":
        return 0.0
    slots: dict[str, float] = {}
    for slot, size in (kept for other in stages if other.when != "once" for kept in other.keeps.items()):
        slots[slot] = max(size, slots.get(slot, 0.0))
    return sum(size for slot, size in slots.items() if slot not in stage.keeps)


@dataclass(frozen=True)
class Change:
    """Settings, and the plan of the run with them."""

    text: str
    settings: Settings
    saves: float
    """Bytes of the fullest device."""
    plan: Plan

    @property
    def fits(self) -> bool:
        """Return whether the run fits with this change only."""
        return self.plan.missing <= 0


def changes_of(plan: Plan) -> list[Change]:
    """Return changes that lower the peak: those that let the run fit first, then by savings, then the faster."""
    tried = [change for text, settings in _candidates(plan) if (change := _tried(plan, text, settings)) is not None]
    return sorted(tried, key=lambda change: (not change.fits, -round(change.saves / 2**28), change.plan.seconds))


def remedy_for(plan: Plan) -> tuple[list[Change], Plan]:
    """Take the best change, then the best of what is left, until the run fits or nothing helps; also the plan with all."""
    taken: list[Change] = []
    while plan.missing > 0 and len(taken) < 8 and (found := changes_of(plan)):
        taken.append(found[0])
        plan = found[0].plan
    return taken, plan


def space_saved(plan: Plan) -> list[tuple[Settings, float]]:
    """Return settings of `keep` and the bytes that would be there at the end, the least first."""
    found = []
    for settings in map(dict, (_KEEP[:1], _KEEP[:2], _KEEP)):
        changed = plan_of(replace(plan.given, config=plan.given.config.override(settings)))
        if changed.kept < plan.kept:
            found.append((settings, changed.kept))
    return sorted(found, key=lambda entry: entry[1])


def _tried(plan: Plan, text: str, settings: Settings) -> Change | None:
    try:
        config = plan.given.config.override(settings)
    except ConfigError:  # does not go with the rest of the configuration
        return None
    changed = plan_of(replace(plan.given, config=config))
    saves = plan.peak - changed.peak
    return Change(text, settings, saves, changed) if saves > _WORTH * plan.peak else None


def _candidates(plan: Plan) -> Iterator[tuple[str, Settings]]:
    """Yield changes of the fullest stage, and of what others keep in memory meanwhile."""
    config, where = plan.given.config, plan.worst.settings
    if where.endswith("training"):
        yield from _of_training(plan, where)
    elif where:
        yield from _of_sampling(plan, where)
    if plan.worst.held and where != "update.training":  # the trainer's state stays while others work
        yield from _of_engine(plan, "update.training", config.update.training)
        backend = config.rollout.backend
        if isinstance(backend, VLLMBackendConfig) and backend.between_calls == "warm" and plan.given.gpu:
            yield "let vLLM give its memory back between calls", {"rollout.backend.between_calls": "sleep"}
    if config.update.needs_reference and config.reference_pass == "inline":
        yield "score the reference in a pass of its own", {"reference_pass": "stage"}


def _of_training(plan: Plan, where: str) -> Iterator[tuple[str, Settings]]:
    training: Any = _at(plan.given.config, where)
    assert isinstance(training, TrainingConfig)
    yield from _of_engine(plan, where, training)
    if not training.activation_checkpointing:
        yield "compute activations again in backward", {f"{where}.activation_checkpointing": True}
    if training.attention == "eager":
        yield "attention without its T^2 weights", {f"{where}.attention": "sdpa"}
    if training.precision == "fp32" and plan.given.machine.half:
        yield "matrix products in bfloat16", {f"{where}.precision": "bf16"}
    if training.adapter is None and where in ("update.training", "sft.training"):
        changes: dict[str, Any] = {f"{where}.adapter": {"r": 8}}
        if not isinstance(training.optimizer, AdamWConfig):
            changes[f"{where}.optimizer"] = {"kind": "adamw"}
        yield "train an adapter instead of the weights", changes
    tokens = f"{where.removesuffix('.training')}.micro_batch_tokens"
    for part in (2, 4, 8):
        if (smaller := _at(plan.given.config, tokens) // part) >= _LEAST_TOKENS:
            yield "fewer tokens at a time", {tokens: smaller}


def _of_engine(plan: Plan, where: str, training: TrainingConfig) -> Iterator[tuple[str, Settings]]:
    engine, machine = training.engine, plan.given.machine
    devices = machine.gpus * machine.nodes
    if not isinstance(engine, DeepSpeedEngineConfig):
        if devices > 1:
            yield "train on all devices", {f"{where}.engine": {"kind": "deepspeed", "zero_stage": 3, "ranks": devices}}
        return
    if isinstance(training.optimizer, AdamWConfig) and engine.ranks > 1:
        for stage in range(engine.zero_stage + 1, 4):
            yield "share out more of the training state", {f"{where}.engine.zero_stage": stage}
    if not plan.given.gpu or not engine.zero_stage:
        return
    if engine.offload == "none":
        yield "optimizer state in host memory", {f"{where}.engine.offload": "optimizer"}
    if engine.offload != "parameters" and engine.zero_stage == 3:
        yield "parameters in host memory too", {f"{where}.engine.offload": "parameters"}
    yield "twice as many GPUs", {f"{where}.engine.ranks": 2 * engine.ranks}


def _of_sampling(plan: Plan, where: str) -> Iterator[tuple[str, Settings]]:
    config, given = plan.given.config, plan.given
    backend = config.rollout.backend if where == "rollout" else config.evaluation.backend or config.rollout.backend
    match backend:
        case HFBackendConfig():
            for rows in (backend.batch_rows // 2, backend.batch_rows // 4, backend.batch_rows // 8):
                if rows >= 1:
                    yield "fewer outputs side by side", {f"{where}.backend.batch_rows": rows}
            if given.machine.half and backend.dtype == "float32":
                yield "sample in bfloat16", {f"{where}.backend.dtype": "bfloat16"}
            if given.gpu:
                yield "sample with vLLM, which takes a share of the GPU", {f"{where}.backend": {"kind": "vllm"}}
        case VLLMBackendConfig():
            for share in (0.75, 0.5):
                less = round(share * backend.gpu_memory_utilization, 2)
                yield "a smaller share for vLLM", {f"{where}.backend.gpu_memory_utilization": less}


def _at(config: Config, dotted: str) -> Any:
    value: Any = config
    for name in dotted.split("."):
        value = getattr(value, name)
    return value
