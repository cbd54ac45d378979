"""Stages that train a model, or pass outputs through one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flows.config import RewardModelPlan
from flows.planning.disk import checkpoint_bytes, table_bytes
from flows.planning.given import Given
from flows.planning.memory import FLOAT, Batch, Memory, ranks_of, scoring_memory, training_memory
from flows.planning.profiles import seconds_of
from flows.planning.stage_plan import STAGE_CALL, StagePlan, When
from flows.planning.work import Work, scoring_work, training_work
from stages.training import DeepSpeedEngineConfig, TrainingConfig

__all__ = ["critic", "reference_pass", "reward_models", "sft", "update"]


@dataclass(frozen=True)
class _Training:
    """What is trained on what."""

    name: str
    when: When
    settings: str
    config: TrainingConfig
    rows: int
    """Outputs of an optimizer step."""
    steps: float
    """Optimizer steps of a call."""
    budget: int
    slot: str
    reference: bool = False
    head: bool = True


def sft(given: Given) -> StagePlan:
    """Supervised fine-tuning: all its steps, and a checkpoint without optimizer state."""
    config = given.config.sft
    assert config is not None
    steps = given.sft_steps or config.max_steps + config.decay_steps
    rows, budget = config.batch_size, config.micro_batch_tokens
    training = _Training("sft", "once", "sft.training", config.training, rows, steps, budget, "trainer")
    return _trained(given, training, disk=FLOAT * given.shape.parameters)


def update(given: Given) -> StagePlan:
    """The policy update: mu passes over the step's outputs, with the reference beside the policy where that is inline."""
    config, outputs = given.config.update, _outputs(given)
    inline = config.needs_reference and given.config.reference_pass == "inline"
    steps = config.mu * config.mini_batches
    remembered = steps > 1 and config.old_logprobs == "trainer"
    training = _Training(
        name="update",
        when="step",
        settings="update.training",
        config=config.training,
        rows=max(1, outputs // config.mini_batches),
        steps=steps,
        budget=config.micro_batch_tokens,
        slot="trainer",
        reference=inline,
    )
    beside = _scored(given, config.training, outputs, config.micro_batch_tokens).times(inline + remembered)
    return _trained(given, training, beside=beside)


def critic(given: Given) -> Iterator[StagePlan]:
    """PPO's value function: the values of the step's outputs, then its update."""
    config, outputs = given.config.critic, _outputs(given)
    assert config is not None
    budget = config.micro_batch_tokens
    yield _pass(given, "values", config.training, outputs, budget, head=False, slot="critic")
    training = _Training(
        name="critic",
        when="step",
        settings="critic.training",
        config=config.training,
        rows=max(1, outputs // config.mini_batches),
        steps=config.mu * config.mini_batches,
        budget=budget,
        slot="critic",
        head=False,
    )
    yield _trained(given, training)


def reference_pass(given: Given) -> StagePlan:
    """pi_ref in a pass of its own, loaded and freed."""
    config = given.config.update
    return _pass(given, "reference", config.training, _outputs(given), config.micro_batch_tokens)


def reward_models(given: Given, plan: RewardModelPlan) -> Iterator[StagePlan]:
    """Training of the reward models on labelled outputs, then scoring by them in every step."""
    kinds, scoring, learning = len(plan.models), plan.scoring, plan.fitting
    group = given.config.rollout.G
    replayed = plan.replay.share / (1 - plan.replay.share) if plan.retrain and given.config.iterations > 1 else 0.0
    updates = kinds * learning.epochs * (1 + replayed) * plan.questions / learning.questions_per_update
    training = _Training(
        name="reward model",
        when="iteration",
        settings="reward_model.training.training",
        config=learning.training,
        rows=learning.questions_per_update * group,
        steps=updates,
        budget=learning.micro_batch_tokens,
        slot="reward_trainer",
        head=False,
    )
    disk = kinds * checkpoint_bytes(given.shape, learning.training, head=False)
    yield _trained(given, training, disk=disk)
    like = TrainingConfig(precision=scoring.precision, attention=scoring.attention, threads=scoring.threads)
    for model in plan.models:
        name, slot = f"reward scores ({model.kind})", f"{model.kind} reward model"
        yield _pass(given, name, like, _outputs(given), scoring.micro_batch_tokens, head=False, slot=slot)


def _trained(given: Given, training: _Training, *, beside: Work | None = None, disk: float | None = None) -> StagePlan:
    """A stage that trains.

    Args:
        beside: forward passes under other policies, in the same stage.
    """
    config, lengths, shape = training.config, given.lengths, given.shape
    ranks, head = ranks_of(config), training.head
    batch = Batch.of(training.rows, lengths.prompt, lengths.longest, training.budget)
    memory = training_memory(shape, config, batch, reference=training.reference, head=head, gathers=not given.gpu)
    once = training_work(shape, config, training.rows, lengths.prompt, lengths.output, training.budget, head=head)
    work = once.times(training.steps) + (beside or Work())
    written = checkpoint_bytes(shape, config, head=head) if disk is None else disk
    sent = training.steps * _sent(shape.parameters, config, training.rows / max(1, batch.rows))
    seconds = seconds_of(work, given.profile, shape.hidden, config.precision, threads=config.threads) / ranks
    seconds += sent / given.profile.interconnect + _published(given, written) + STAGE_CALL
    keeps = {training.slot: sum(memory.get(part, 0.0) for part in ("weights", "optimizer"))}
    if training.reference:
        keeps["reference"] = memory["reference"]
    return StagePlan(
        name=training.name,
        when=training.when,
        memory=memory,
        work=work,
        seconds=seconds,
        disk=written,
        state=max(0.0, written - FLOAT * (shape.parameters if head else shape.trunk)),
        keeps=keeps,
        settings=training.settings,
    )


def _pass(
    given: Given, name: str, config: TrainingConfig, rows: int, budget: int, *, head: bool = True, slot: str = ""
) -> StagePlan:
    """A stage that scores the step's outputs with a model."""
    lengths, shape = given.lengths, given.shape
    batch = Batch.of(rows, lengths.prompt, lengths.longest, budget)
    memory: Memory = scoring_memory(
        shape, batch, precision=config.precision, attention=config.attention, max_logits=config.max_logits, head=head
    )
    work = _scored(given, config, rows, budget, head=head)
    disk = table_bytes(rows, lengths.prompt, lengths.output, kind="values")
    seconds = seconds_of(work, given.profile, shape.hidden, config.precision, threads=config.threads) / ranks_of(config)
    if not slot:  # loaded for the pass
        seconds += FLOAT * shape.parameters / given.profile.bandwidth
    keeps = {slot: memory["weights"]} if slot else {}
    return StagePlan(name, "step", memory, work, seconds + STAGE_CALL, disk, keeps=keeps)


def _scored(given: Given, config: TrainingConfig, rows: int, budget: int, *, head: bool = True) -> Work:
    return scoring_work(
        given.shape,
        rows,
        given.lengths.prompt,
        given.lengths.output,
        budget,
        precision=config.precision,
        attention=config.attention,
        head=head,
    )


def _outputs(given: Given) -> int:
    return given.config.questions_per_step * given.config.rollout.G


def _published(given: Given, size: float) -> float:
    """Seconds until so many bytes are written, synced and hashed."""
    return size / given.profile.disk + size / given.profile.hashing


def _sent(parameters: float, config: TrainingConfig, passes: float) -> float:
    """Bytes that a device sends in an optimizer step, float32 (Rajbhandari et al. 2020, section 7): gradients are reduced once,
    or where they are partitioned in every pass; under ZeRO 3 parameters are gathered twice a pass."""
    if not isinstance(config.engine, DeepSpeedEngineConfig) or config.engine.ranks == 1:
        return 0.0
    share = (config.engine.ranks - 1) / config.engine.ranks
    own = passes / config.engine.ranks
    times = {0: 2.0, 1: 2.0, 2: own + 1.0, 3: 3.0 * own}[config.engine.zero_stage]
    return FLOAT * parameters * share * times
