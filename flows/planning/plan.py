"""The plan of a run: its stages, how often each is called, the fullest device, and what all calls come to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from flows.config import IterativeRLConfig
from flows.planning import samplings, trainings
from flows.planning.given import Given
from flows.planning.stage_plan import StagePlan
from stages.rollout import VLLMBackendConfig

__all__ = ["Plan", "evaluations_of", "plan_of"]

_GIB: Final = 2.0**30
_LIBRARIES: Final = 1.0 * _GIB
"""A CPU process with torch, transformers and DeepSpeed imported; docs/lab.md: 900 to 960 MiB."""
_CONTEXT: Final = 0.6 * _GIB
"""Of CUDA, for each process on a device; ours, not measured."""
_FRAGMENTS: Final = 0.05
"""Share of a GPU's memory that the allocator cannot hand out; ours, not measured."""


@dataclass(frozen=True)
class Plan:
    """Everything that is printed."""

    given: Given
    stages: tuple[StagePlan, ...]

    @cached_property
    def counts(self) -> Mapping[str, float]:
        """Calls of a stage in the whole run, by when it is called."""
        config = self.given.config
        learned = config.reward_model
        trainings_ = config.iterations if learned is not None and learned.retrain else 1
        return {
            "once": 1,
            "iteration": max(1, trainings_),
            "step": config.iterations * config.steps,
            "evaluation": evaluations_of(config),
        }

    @property
    def overhead(self) -> float:
        """Bytes of a device that no formula counts."""
        if not self.given.gpu:
            return _LIBRARIES
        processes = 1 + (self.ranks > 1) + isinstance(self.given.config.rollout.backend, VLLMBackendConfig)
        return _CONTEXT * processes + _FRAGMENTS * self.given.memory

    @property
    def ranks(self) -> int:
        """Devices that the policy update takes."""
        return getattr(self.given.config.update.training.engine, "ranks", 1)

    @property
    def worst(self) -> StagePlan:
        """The stage that fills the device most."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def peak(self) -> float:
        """Bytes of the fullest device at its worst moment."""
        return self.worst.peak + self.overhead

    @property
    def missing(self) -> float:
        """Bytes by which it does not fit; negative: what is left."""
        return self.peak - self.given.memory

    def total(self, stage: StagePlan) -> float:
        """Seconds of all calls of a stage."""
        return stage.seconds * self.counts[stage.when]

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(map(self.total, self.stages))

    @property
    def step_seconds(self) -> float:
        """Of one step, evaluations apart."""
        return sum(stage.seconds for stage in self.stages if stage.when == "step")

    @property
    def disk(self) -> float:
        """Bytes of the whole run, nothing pruned."""
        return sum(stage.disk * self.counts[stage.when] for stage in self.stages)

    @property
    def kept(self) -> float:
        """Bytes that are there at the end, under the configuration's `keep`."""
        return sum(map(self._kept_of, self.stages))

    def _kept_of(self, stage: StagePlan) -> float:
        keep, calls = self.given.config.keep, self.counts[stage.when]
        if stage.when != "step":
            return stage.disk * calls
        if not stage.state:
            return stage.disk * min(calls, keep.rollouts or calls)
        # Policies that were evaluated, and those at the start of an iteration, keep their weights.
        spared = evaluations_of(self.given.config) + self.given.config.iterations
        weights = min(calls, keep.checkpoints + spared if keep.checkpoints else calls)
        return (stage.disk - stage.state) * weights + stage.state * min(weights, keep.optimizer or calls)

    @property
    def step_disk(self) -> float:
        """Bytes of one step, evaluations apart."""
        return sum(stage.disk for stage in self.stages if stage.when == "step")


def plan_of(given: Given) -> Plan:
    """The plan, every stage with what the others keep in memory beside it."""
    stages = list(_stages(given))
    return Plan(given, tuple(replace(stage, held=_held(stage, stages)) for stage in stages))


def evaluations_of(config: IterativeRLConfig) -> int:
    """How often the policy is evaluated: before, when it is due, and at the end."""
    last = config.iterations * config.steps
    return 1 + sum(config.evaluation.is_due(step, last) for step in range(1, last + 1))


def _stages(given: Given) -> Iterator[StagePlan]:
    config = given.config
    if config.sft is not None:
        yield trainings.sft(given)
    if config.reward_model is not None:
        plan = config.reward_model
        asked = plan.questions + (plan.held_out_questions if given.sizes else 0)
        name = "reward model's outputs"
        yield samplings.sampling(given, name, "iteration", config.rollout, asked, settings="rollout")
        yield from trainings.reward_models(given, plan)
    where = "rollout" if config.evaluation.backend is None else "evaluation"
    for mode, sampling, _ in config.evaluation.modes(config.rollout):
        name = f"evaluation ({mode})"
        yield samplings.sampling(given, name, "evaluation", sampling, given.questions, settings=where)
    if config.data_source != "demonstrations":
        asked = config.questions_per_step
        yield samplings.sampling(given, "rollout", "step", config.rollout, asked, settings="rollout")
        yield samplings.rules(given, asked * config.rollout.G)
    if config.critic is not None:
        yield from trainings.critic(given)
    if config.update.needs_reference and config.reference_pass == "stage":
        yield trainings.reference_pass(given)
    yield trainings.update(given)


def _held(stage: StagePlan, stages: list[StagePlan]) -> float:
    """What others keep while a stage works; the first one, before all others, works alone."""
    if stage.when == "once":
        return 0.0
    slots: dict[str, float] = {}
    for other in stages:
        if other.when == "once":
            continue
        for slot, size in other.keeps.items():
            slots[slot] = max(size, slots.get(slot, 0.0))
    return sum(size for slot, size in slots.items() if slot not in stage.keeps)
