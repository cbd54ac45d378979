"""Count the arithmetic and memory traffic of a stage, and how long a device takes for it.

    forward    2 M + 4 q T L a token, 2 V H a scored position      M: numbers in the layers' matrices
    backward   twice that; a further forward where activations are computed again
    seconds    (FLOPs / rate + bytes / bandwidth) / utilisation + layers entered * overhead

T: the row's length, in full: eager attention computes what the mask then hides. 6 N D and 8 N D, with N parameters and D
tokens, are these without attention (Kaplan et al. 2020, section 2.1; Korthikanti et al. 2022 for recomputation). Bytes that are
only read have a rate of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Final, Literal

from flows.config import IterativeRLConfig
from flows.planning.machine import DeviceProfile, Machine
from flows.planning.memory import FLOAT, HALF, Batch, Memory, kept_by_layer, sharing, token_bytes, zero_stage_of
from flows.planning.shapes import ModelShape
from stages.training import TrainingConfig

STAGE_CALL: Final = 0.02
"""Seconds that a stage call costs whatever it does: 8 to 10 ms of CPU through Prefect (docs/lab), sealing on top. Ours."""
When = Literal["once", "iteration", "step", "evaluation"]


@dataclass(frozen=True)
class Lengths:
    """Tokens."""

    prompt: float
    """Of a prompt, on average."""
    output: float
    """Of an output, on average."""
    longest: float
    """Of the longest output: what memory has to hold."""


@dataclass(frozen=True)
class Given:
    """Everything that a plan is a function of."""

    config: IterativeRLConfig
    shape: ModelShape
    machine: Machine
    lengths: Lengths
    sizes: Mapping[str, int]
    """Questions of every held-out set."""
    sft_steps: int | None = None
    """Optimizer steps that supervised fine-tuning took before; None: as many as it may."""
    free: float | None = None
    """Bytes that are free on the disk of the run; None: unknown, as of another machine's."""
    teacher: ModelShape | None = None
    """Of the model that is learned from, where there is one."""

    @property
    def sampler(self) -> Given:
        """Return the same with the shape of who samples a step's outputs."""
        sampled = self.teacher if self.config.data_source == "teacher" else None
        return replace(self, shape=sampled or self.shape)

    @property
    def gpu(self) -> bool:
        """Return whether models are on GPUs."""
        return self.machine.profile.kind == "gpu"

    @property
    def group(self) -> int:
        """Return how many outputs of a step have one prompt; demonstrations are taken as of different questions."""
        return 1 if self.config.data_source == "demonstrations" else self.config.rollout.G

    @property
    def outputs(self) -> int:
        """Return the number of outputs of a step."""
        return self.config.questions_per_step * self.config.rollout.G


@dataclass(frozen=True)
class Work:
    """Floating-point operations, bytes that pass through memory, and how often a layer is entered."""

    flops: float = 0.0
    traffic: float = 0.0
    """Bytes of results that are allocated anew, written and read."""
    reads: float = 0.0
    """Bytes that are only read: weights and keys in sampling."""
    layers: float = 0.0
    """Layers that are entered, whatever goes through them: each has a fixed cost."""
    tokens: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def times(self, factor: float) -> Work:
        """Return so many times this."""
        return Work(*(getattr(self, field.name) * factor for field in fields(self)))


@dataclass(frozen=True)
class StagePlan:
    """Figures of one call of a stage, and of the fullest device."""

    name: str
    when: When
    memory: Memory
    work: Work
    """Of all devices together."""
    seconds: float
    disk: float = 0.0
    """Bytes that it writes; of a step's training, an average of those that leave a checkpoint and those that do not."""
    calls: int = 1
    """Calls of `@stage` functions that these figures are of."""
    state: float = 0.0
    """Of the bytes of a checkpoint the optimizer's state."""
    writing: float = 0.0
    """Seconds that writing a checkpoint takes, where `seconds` do not have them yet."""
    written: float = 1.0
    """Share of the calls that leave a checkpoint."""
    keeps: Mapping[str, float] = field(default_factory=dict)
    """Bytes that stay in memory for its next call, by the slot they are kept in (`pipeline/residency.py`)."""
    held: float = 0.0
    """Bytes that other stages keep meanwhile."""
    settings: str = ""
    """Where the configuration says how it trains or decodes."""

    @property
    def peak(self) -> float:
        """Return the bytes at its worst moment, with what others keep."""
        return sum(self.memory.values()) + self.held


def seconds_of(
    work: Work,
    profile: DeviceProfile,
    width: int,
    precision: str,
    *,
    sampling: bool = False,
    threads: int | Literal["auto"] = "auto",
) -> float:
    """Return the seconds that one device takes for a stage's work."""
    moved = work.traffic / profile.bandwidth + work.reads / (profile.reading or profile.bandwidth)
    busy = work.flops / profile.rate(width, precision) + moved
    utilisation = profile.decoding if sampling else profile.training
    fixed = work.layers * (profile.token_seconds if sampling else profile.layer_seconds)
    return busy / utilisation / profile.speed(threads) + fixed


def training_work(
    shape: ModelShape,
    config: TrainingConfig,
    rows: float,
    prompt: float,
    output: float,
    budget: int,
    *,
    group: int = 1,
    head: bool = True,
    again: bool = False,
) -> Work:
    """Return forward and backward of so many rows, in micro-batches of `budget` tokens, and the optimizer's step.

    Args:
        again: as `scoring_work`.
    """
    forward = scoring_work(shape, config, rows, prompt, output, budget, group=group, head=head)
    parameters = shape.parameters if head else shape.trunk
    trained = parameters if config.adapter is None else shape.adapter(config.adapter.r)
    passes = forward.layers / shape.layers
    # Backward is twice a forward. AdamW reads four and writes three numbers a parameter.
    work = forward.times(4 if config.activation_checkpointing else 3) + _head_again(shape, rows * output, again)
    copied = 8 * FLOAT * trained + 2 * FLOAT * parameters * _copies(config, passes)
    return replace(work, traffic=work.traffic + copied, tokens=forward.tokens)


def scoring_work(
    shape: ModelShape,
    config: TrainingConfig,
    rows: float,
    prompt: float,
    output: float,
    budget: int,
    *,
    group: int = 1,
    head: bool = True,
    again: bool = False,
) -> Work:
    """Return a forward pass without gradients.

    Args:
        group: outputs of one prompt, which is computed once for those of a micro-batch where the config shares it.
        again: the head's product is computed twice, to leave logits in float32 (`takes_head_again`).
    """
    batch = Batch.of(rows, prompt, output, budget, sharing(config, group))
    passes = rows / batch.rows
    scored = rows * output if head else 0.0
    flops = _forward_flops(shape, passes * batch.tokens, passes * batch.pairs, scored)
    kept = passes * shape.layers * kept_by_layer(shape, batch, config.products, config.attention_kind)
    traffic = 2 * (kept + FLOAT * scored * shape.vocabulary)  # written and read
    work = Work(flops, traffic, layers=passes * shape.layers, tokens=passes * batch.tokens)
    return work + _head_again(shape, scored, again)


def decoding_work(
    shape: ModelShape,
    questions: float,
    group: int,
    prompt: float,
    output: float,
    longest: float,
    *,
    side_by_side: float,
    half: bool,
    again: bool = False,
) -> Work:
    """Return a prefill of each question, then token by token: weights read at every token, keys of every row.

    Args:
        output: mean length; as many steps as the `longest` has, of ever fewer rows.
        side_by_side: outputs of a batch, at most.
        again: as `scoring_work`.
    """
    outputs, size = questions * group, HALF if half else FLOAT
    batches = max(1.0, -(-outputs // side_by_side))
    steps = batches * longest
    tokens = outputs * output
    flops = _forward_flops(shape, questions * prompt, questions * prompt**2, questions)
    flops += _forward_flops(shape, tokens, tokens * (prompt + output / 2), tokens)
    weights = size * (shape.matrices + shape.embedding * (2 if again else 1))
    keys = token_bytes(shape, size) * (prompt + output / 2)
    # Attention reads keys and values and passes over its scores; sampling passes five times over a row's logits.
    scores = 4 * FLOAT * shape.layers * shape.heads * (prompt + output / 2)
    logits = 2 * 5 * FLOAT * shape.vocabulary
    work = Work(
        flops,
        traffic=tokens * (scores + logits),
        reads=steps * weights + tokens * keys,
        layers=(steps + batches) * shape.layers,
        tokens=questions * prompt + tokens,
    )
    return work + _head_again(shape, questions + tokens, again)


def takes_head_again(head_precision: str, *, half: bool, gpu: bool) -> bool:
    """Return whether logits in float32 take a second product of the head: on a CPU in bfloat16 (`stages/kernels/head.py`)."""
    return head_precision == "fp32" and half and not gpu


def _head_again(shape: ModelShape, scored: float, again: bool) -> Work:
    return Work(flops=2.0 * scored * shape.embedding if again else 0.0)


def _forward_flops(shape: ModelShape, tokens: float, pairs: float, scored: float) -> float:
    """Return the FLOPs of a forward pass over `tokens`, of which attention weighs `pairs`; the head is applied to `scored`."""
    attention = 4.0 * shape.queries * shape.layers * pairs
    return 2.0 * shape.matrices * tokens + attention + 2.0 * scored * shape.embedding


def _copies(config: TrainingConfig, passes: float) -> float:
    """Return how often as many numbers as there are parameters are copied for ZeRO, by all ranks together.

    Gradients into its flat buffers and weights out of them; at stage 3 weights are also gathered, in the forward and in the
    backward pass of each micro-batch.
    """
    stage = zero_stage_of(config)
    return 0.0 if not stage else 2.0 + (2.0 * passes if stage == 3 else 0.0)
