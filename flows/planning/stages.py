"""Plan every stage of a run: sampling outputs and scoring them, training, and passes of outputs through a model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from flows.config import RewardModelPlan
from flows.planning.memory import (
    FLOAT,
    HALF,
    Batch,
    Memory,
    hf_memory,
    ranks_of,
    scoring_memory,
    sharing,
    side_by_side,
    training_memory,
    vllm_memory,
)
from flows.planning.shapes import ModelShape
from flows.planning.work import (
    STAGE_CALL,
    Given,
    StagePlan,
    When,
    Work,
    decoding_work,
    scoring_work,
    seconds_of,
    takes_head_again,
    training_work,
)
from stages.rollout import BackendConfig, HFBackendConfig, RolloutConfig, VLLMBackendConfig, engines_of
from stages.training import AdamWConfig, DeepSpeedEngineConfig, TrainingConfig

_RULE_SECONDS: Final = {"exact": 3e-4, "math_verify": 5e-3}
"""An output's verdict: 5,276 in 1.4 s by the exact path (docs/lab); math-verify: ours, not measured."""
_ENGINE_START: Final = 30.0
"""Seconds until a vLLM engine is ready; docs/lab: 31 s on two CPU cores. On a GPU ours, not measured."""
EVALUATION_CALLS: Final = 4
"""Stage calls of an evaluation of one held-out set in one mode: rollout, score, count_votes, evaluate."""
_HOST_LINK: Final = 2.5e10
"""Bytes a second from pinned host memory to a GPU: PCIe 4.0 x16; ours, not measured."""
_KEY: Final = 40
"""Bytes of question id, sample and offsets of a row."""
_TEXT: Final = 4
"""Characters of a token; ours, of English under a large vocabulary. A character tokenizer has one."""


def sampling(given: Given, name: str, when: When, config: RolloutConfig, questions: int, *, settings: str) -> StagePlan:
    """Plan outputs of so many questions; those of an evaluation are scored in the same stage."""
    lengths, outputs, backend = given.lengths, questions * config.G, config.backend
    half = given.machine.half if backend.dtype == "auto" else backend.dtype == "bfloat16"
    memory, keeps = _sampling_memory(given, backend, max(1, outputs), config.G, half=half)
    seconds, work, calls = 0.0, Work(), 1
    if questions:
        # Engines on a CPU share its cores.
        engines = engines_of(backend, given.machine.gpus) if backend.kind == "vllm" and given.gpu else 1
        work = _sampling_work(given, config, math.ceil(questions / engines), memory, half=half)
        seconds = _sampling_seconds(given, backend, work, half=half)
    disk = table_bytes(outputs, lengths.prompt, lengths.output, kind="rollouts")
    if when == "evaluation":
        calls = EVALUATION_CALLS * len(given.sizes)
        seconds += outputs * _rule_seconds(given)
        disk += table_bytes(outputs, 0, 0, kind="rewards")
    return StagePlan(
        name, when, memory, work, seconds + calls * STAGE_CALL, disk, calls=calls, keeps=keeps, settings=settings
    )


def rules(given: Given) -> StagePlan:
    """Plan a step's questions, rewards by rules, advantages, and where the reward has a KL term the comparison for it."""
    outputs, scored = given.outputs, given.outputs * given.config.scores_outputs
    calls = 2 + (scored > 0) + bool(getattr(given.config.advantage, "kl_in_reward", 0.0))
    disk = table_bytes(scored, 0, 0, kind="rewards") + table_bytes(outputs, 0, given.lengths.output, kind="values")
    seconds = scored * _rule_seconds(given) + calls * STAGE_CALL
    return StagePlan("rules, advantages", "step", {}, Work(), seconds, disk, calls=calls)


def _rule_seconds(given: Given) -> float:
    """Return the seconds of the verdict on an output; worker processes share what the exact path does not settle."""
    reward = given.config.reward
    verifiers = [part.verifier for part in reward.components if part.kind == "accuracy"]
    shared = _RULE_SECONDS["math_verify"] / reward.workers
    return max((_RULE_SECONDS["exact"] if each == "exact" else shared for each in verifiers), default=1e-4)


def _sampling_memory(
    given: Given, backend: BackendConfig, outputs: int, group: int, *, half: bool
) -> tuple[Memory, dict[str, float]]:
    """Return what sampling needs, and what of it stays."""
    lengths, shape = given.lengths, given.shape
    match backend:
        case HFBackendConfig():
            found = hf_memory(
                shape, backend, outputs=outputs, group=group, prompt=lengths.prompt, longest=lengths.longest, half=half
            )
            return found, {"rollout": found["weights"]}
        case VLLMBackendConfig():
            found = vllm_memory(shape, backend, memory=given.machine.memory, half=half, cpu=not given.gpu)
            if not given.gpu:
                found = {name: size * engines_of(backend, 0) for name, size in found.items()}
            stays = backend.between_calls == "warm" or (backend.between_calls == "auto" and not given.gpu)
            return found, {"rollout": sum(found.values())} if stays else {}
    return {}, {}  # a server's memory is elsewhere


def _sampling_work(given: Given, config: RolloutConfig, questions: int, memory: Memory, *, half: bool) -> Work:
    backend, lengths = config.backend, given.lengths
    longest = lengths.longest if isinstance(backend, HFBackendConfig) else lengths.output
    match backend:
        case HFBackendConfig():
            rows = float(backend.batch_rows)
        case VLLMBackendConfig():
            length = lengths.prompt + lengths.output
            rows = max(1.0, side_by_side(given.shape, backend, memory, length, HALF if half else FLOAT))
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
        again=backend.kind != "vllm_server" and takes_head_again(backend.head_precision, half=half, gpu=given.gpu),
    )


def _sampling_seconds(given: Given, backend: BackendConfig, work: Work, *, half: bool) -> float:
    threads = "auto" if backend.kind == "vllm_server" else backend.threads or "auto"
    precision, profile = "bf16" if half else "fp32", given.machine.profile
    seconds = seconds_of(work, profile, given.shape.hidden, precision, sampling=True, threads=threads)
    if isinstance(backend, VLLMBackendConfig):
        killed = backend.between_calls == "kill"
        return seconds / backend.tensor_parallel_size + (_ENGINE_START if killed else 0.5)
    return seconds + FLOAT * given.shape.parameters / profile.bandwidth


@dataclass(frozen=True)
class _Training:
    """A training: its model, rows and steps."""

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
    group: int | None = None
    """Outputs of one prompt; None: those of a step."""


def sft(given: Given) -> StagePlan:
    """Plan supervised fine-tuning: all its steps, and a checkpoint without optimizer state."""
    config = given.config.sft
    assert config is not None
    steps = given.sft_steps or config.max_steps + config.decay_steps
    rows, budget = config.batch_size, config.micro_batch_tokens
    training = _Training("sft", "once", "sft.training", config.training, rows, steps, budget, "trainer", group=1)
    return _trained(given, training, disk=FLOAT * given.shape.parameters)


def update(given: Given) -> StagePlan:
    """Plan the policy update: mu passes over the step's outputs, with the reference in memory where that is inline."""
    config = given.config.update
    inline = config.needs_reference and given.config.reference_pass == "inline"
    steps = config.mu * config.mini_batches
    # Of several mini-batches only the first is learned from before the policy changes.
    remembered = 1 - 1 / config.mini_batches if config.old_logprobs == "trainer" else 0.0
    rows, budget = max(1, given.outputs // config.mini_batches), config.micro_batch_tokens
    training = _Training(
        "update", "step", "update.training", config.training, rows, steps, budget, "trainer", reference=inline
    )
    others = _scored(given, config.training, given.outputs, budget).times(inline + remembered)
    # Demonstrations are made into outputs and given advantages without rules.
    calls = 3 if given.config.data_source == "demonstrations" else 1
    return _trained(given, training, others=others, calls=calls)


def critic(given: Given) -> Iterator[StagePlan]:
    """Plan PPO's value function: the values of the step's outputs, then its update."""
    config = given.config.critic
    assert config is not None
    budget, steps = config.micro_batch_tokens, config.mu * config.mini_batches
    yield _pass(given, "values", config.training, budget, head=False, slot="critic")
    rows = max(1, given.outputs // config.mini_batches)
    training = _Training(
        "critic", "step", "critic.training", config.training, rows, steps, budget, "critic", head=False
    )
    yield _trained(given, training)


def reference_pass(given: Given) -> StagePlan:
    """Plan pi_ref in a pass of its own: loaded once an iteration, and in host memory between passes."""
    config, profile = given.config.update, given.machine.profile
    found = _pass(given, "reference", config.training, config.micro_batch_tokens)
    loading = FLOAT * given.shape.parameters / (profile.disk if given.gpu else profile.bandwidth)
    seconds = found.seconds + loading / given.config.steps
    if given.gpu:  # moved there for the pass
        return replace(found, seconds=seconds + found.memory["weights"] / _HOST_LINK)
    return replace(found, seconds=seconds, keeps={"reference": found.memory["weights"]})


def teacher(given: Given) -> StagePlan:
    """Plan the log-probabilities of the step's outputs under policy and teacher, which stays in memory."""
    config, both = given.config.update, (given, replace(given, shape=given.teacher or given.shape))
    passes = [_pass(of, "teacher", config.training, config.micro_batch_tokens, slot="reference") for of in both]
    return replace(passes[1], work=passes[0].work + passes[1].work, seconds=sum(each.seconds for each in passes))


def reward_models(given: Given, plan: RewardModelPlan) -> Iterator[StagePlan]:
    """Plan the training of the reward models on labelled outputs, then scoring by them in every step."""
    kinds, scoring, learning = len(plan.models), plan.scoring, plan.fitting
    replayed = plan.replay.share / (1 - plan.replay.share) if plan.retrain and given.config.iterations > 1 else 0.0
    training = _Training(
        name="reward model",
        when="iteration",
        settings="reward_model.training.training",
        config=learning.training,
        rows=learning.questions_per_update * given.config.rollout.G,
        steps=kinds * learning.epochs * (1 + replayed) * plan.questions / learning.questions_per_update,
        budget=learning.micro_batch_tokens,
        slot="reward_trainer",
        head=False,
    )
    yield _trained(given, training, disk=kinds * checkpoint_bytes(given.shape, learning.training, head=False))
    like = TrainingConfig(
        precision=scoring.precision,
        attention=scoring.attention,
        share_prompts=scoring.share_prompts,
        threads=scoring.threads,
        engine=scoring.engine or given.config.update.training.engine,
    )
    for model in plan.models:
        name, slot = f"reward scores ({model.kind})", f"{model.kind} reward model"
        yield _pass(given, name, like, scoring.micro_batch_tokens, head=False, slot=slot)


def _trained(
    given: Given, training: _Training, *, others: Work | None = None, disk: float | None = None, calls: int = 1
) -> StagePlan:
    """Plan a stage that trains, with forward passes under `others` in the same stage, and calls that make its rows."""
    config, lengths, shape, profile = training.config, given.lengths, given.shape, given.machine.profile
    head = training.head
    group = training.group or given.group
    shared = sharing(config, group)
    batch = Batch.of(training.rows, lengths.prompt, lengths.longest, training.budget, shared)
    memory = training_memory(shape, config, batch, reference=training.reference, head=head, gathers=not given.gpu)
    rows, budget = training.rows, training.budget
    how = {"head": head, "again": head and takes_head_again(config.head_precision, half=config.bf16, gpu=given.gpu)}
    once = training_work(shape, config, rows, lengths.prompt, lengths.output, budget, group=group, **how)
    work = once.times(training.steps) + (others or Work())
    written = checkpoint_bytes(shape, config, head=head) if disk is None else disk
    sent = training.steps * bytes_sent(shape.parameters, config, training.rows / max(1, batch.rows))
    seconds = seconds_of(work, profile, shape.hidden, config.products, threads=config.threads) / ranks_of(config)
    seconds += sent / profile.interconnect + calls * STAGE_CALL
    whole = FLOAT * (shape.parameters if head else shape.trunk)
    weights, linked = (whole, 0.0) if config.adapter is None else (FLOAT * shape.adapter(config.adapter.r), whole)
    writing = written / profile.disk + (written + linked) / profile.hashing  # written is also synced; all is hashed
    later = training.when == "step"  # `checkpoint.every` says which steps write
    keeps = {training.slot: sum(memory.get(part, 0.0) for part in ("weights", "optimizer"))}
    if training.reference:
        keeps["reference"] = memory["reference"]
    return StagePlan(
        training.name,
        training.when,
        memory,
        work,
        seconds + (0.0 if later else writing),
        written,
        calls,
        state=max(0.0, written - weights),
        writing=writing if later else 0.0,
        keeps=keeps,
        settings=training.settings,
    )


def _pass(
    given: Given, name: str, config: TrainingConfig, budget: int, *, head: bool = True, slot: str = ""
) -> StagePlan:
    """Plan a stage that scores the step's outputs with a model."""
    lengths, shape, rows, profile = given.lengths, given.shape, given.outputs, given.machine.profile
    batch = Batch.of(rows, lengths.prompt, lengths.longest, budget, sharing(config, given.group))
    memory: Memory = scoring_memory(
        shape,
        batch,
        precision=config.products,
        attention=config.attention_kind,
        max_logits=config.max_logits,
        head=head,
        half=config.bf16 and not config.float32_logits,
        frozen=slot != "critic",
    )
    work = _scored(given, config, rows, budget, head=head)
    disk = table_bytes(rows, lengths.prompt, lengths.output, kind="values")
    seconds = seconds_of(work, profile, shape.hidden, config.products, threads=config.threads) / ranks_of(config)
    keeps = {slot: memory["weights"]} if slot else {}
    return StagePlan(name, "step", memory, work, seconds + STAGE_CALL, disk, keeps=keeps)


def _scored(given: Given, config: TrainingConfig, rows: int, budget: int, *, head: bool = True) -> Work:
    prompt, output = given.lengths.prompt, given.lengths.output
    how = {"head": head, "again": head and takes_head_again(config.head_precision, half=config.bf16, gpu=given.gpu)}
    return scoring_work(given.shape, config, rows, prompt, output, budget, group=given.group, **how)


def bytes_sent(parameters: float, config: TrainingConfig, passes: float) -> float:
    """Return the bytes that a device sends in an optimizer step (Rajbhandari et al. 2020, section 7): gradients are reduced in
    float32, once or where they are partitioned in every pass; under ZeRO 3 parameters are gathered twice a pass, in the
    precision of the products."""
    if not isinstance(config.engine, DeepSpeedEngineConfig) or config.engine.ranks == 1:
        return 0.0
    share = (config.engine.ranks - 1) / config.engine.ranks
    own = passes / config.engine.ranks
    gathered = HALF if config.bf16 else FLOAT
    size = {0: 2.0 * FLOAT, 1: 2.0 * FLOAT, 2: (own + 1.0) * FLOAT, 3: own * (FLOAT + 2.0 * gathered)}
    return parameters * share * size[config.engine.zero_stage]


def checkpoint_bytes(shape: ModelShape, config: TrainingConfig, *, head: bool = True) -> float:
    """Return float32 weights, with the moments where they are kept; of an adapter its own: its base's file is linked."""
    parameters, kept = shape.parameters if head else shape.trunk, config.optimizer_state != "none"
    if config.adapter is not None:
        return FLOAT * (1.0 + 2.0 * kept) * shape.adapter(config.adapter.r)
    if not kept:
        return FLOAT * parameters
    if isinstance(config.optimizer, AdamWConfig):
        return FLOAT * 3.0 * parameters
    return FLOAT * (3.0 * parameters - shape.matrices)


def table_bytes(rows: float, prompt: float, output: float, *, kind: str) -> float:
    """Return the size of a table: of each token ids, log-probability, text and its end (Rollouts), or one number."""
    per_token = {"rollouts": 3 * FLOAT + _TEXT, "values": FLOAT, "rewards": 0}[kind]
    fixed = _KEY + {"rollouts": 40 + FLOAT * prompt, "values": 0, "rewards": 80}[kind]
    return rows * (fixed + per_token * output)
