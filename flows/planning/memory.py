"""Bytes that training and scoring need on one device, part by part: what of a step is alive at its worst moment.

    training     weights + gradients + optimizer + reference + what forward keeps for backward + the head's + the rest

Legend: P parameters, N padded tokens of a micro-batch in rows of T, O of them scored, V vocabulary, n ranks. Parameters,
gradients and optimizer state are float32 in every precision (`stages/training/config.py`); what is partitioned is divided by n
as in ZeRO (Rajbhandari et al. 2020, section 3). What a layer keeps is counted operation by operation in transformers' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from flows.planning.shapes import ModelShape
from stages.training import AdamWConfig, DeepSpeedEngineConfig, TrainingConfig

__all__ = [
    "Batch",
    "Memory",
    "kept_by_layer",
    "ranks_of",
    "scoring_memory",
    "training_memory",
    "training_state",
    "zero_stage_of",
]

FLOAT: Final = 4
HALF: Final = 2
_SCORED: Final = 1 << 22
"""Logits that are widened to float32 at a time (`stages/kernels/logprobs.py`)."""
_BUCKET: Final = 5e8
"""Numbers of DeepSpeed's default bucket for reductions (`reduce_bucket_size`), at most."""
_LIVE: Final = 1e9
"""Parameters that ZeRO 3 keeps gathered, at most (`stage3_max_live_parameters`)."""

Memory = dict[str, float]
"""Bytes by part; their sum is the peak."""


@dataclass(frozen=True)
class Batch:
    """The largest micro-batch."""

    rows: int
    prompt: float
    """Tokens of a row that are given."""
    output: float
    """Tokens of a row that are scored."""
    several: bool = False
    """Whether it is one of several of an optimizer step: gradients of the others are there then."""

    @classmethod
    def of(cls, rows: int, prompt: float, output: float, budget: int) -> Batch:
        """The largest that a budget of padded tokens makes of so many rows of this length (`stages/training/batching.py`)."""
        fitting = max(1, int(budget // (prompt + output)))
        return cls(min(rows, fitting), prompt, output, several=rows > fitting)

    @property
    def length(self) -> float:
        """T."""
        return self.prompt + self.output

    @property
    def tokens(self) -> float:
        """N."""
        return self.rows * self.length

    @property
    def scored(self) -> float:
        """O."""
        return self.rows * self.output


def training_state(parameters: float, shape: ModelShape, config: TrainingConfig, trained: float) -> Memory:
    """Weights, gradients and optimizer state on one device, offloaded parts left out.

    Args:
        parameters: all of the model's.
        trained: those that have a gradient: all, or an adapter's.
    """
    engine, stage, ranks = config.engine, zero_stage_of(config), ranks_of(config)
    offload = engine.offload if isinstance(engine, DeepSpeedEngineConfig) else "none"
    share = ranks if stage else 1
    moments = 2.0 * trained if isinstance(config.optimizer, AdamWConfig) else _muon(trained, shape)
    masters = trained if stage else 0.0  # ZeRO's optimizer steps on a flat copy, in float32 mode too
    host = offload != "none"
    return {
        "weights": 0.0 if offload == "parameters" else FLOAT * parameters / (ranks if stage == 3 else 1),
        "gradients": FLOAT * trained / (ranks if stage >= 2 else 1),
        "optimizer": 0.0 if host else FLOAT * (moments + masters) / share,
    }


def training_memory(
    shape: ModelShape,
    config: TrainingConfig,
    batch: Batch,
    *,
    reference: bool = False,
    head: bool = True,
    gathers: bool = True,
) -> Memory:
    """The peak of an optimizer step, the engine having its optimizer state.

    Args:
        reference: a frozen copy of the model stands beside it.
        head: a language model; False: a critic or a reward model, whose logits are one number a row or token.
        gathers: checkpoints are gathered in the same memory, as on a CPU; a GPU hands them to its host parameter by parameter.
    """
    parameters = shape.parameters if head else shape.trunk
    trained = parameters if config.adapter is None else shape.adapter(config.adapter.r)
    total = parameters + (0 if config.adapter is None else trained)
    state = training_state(total, shape, config, trained)
    casts = HALF * (shape.matrices + (shape.embedding if head else 0)) if config.precision == "bf16" else 0.0
    moments = _moments_of_a_step(shape, config, batch, head=head)
    gradients = 0.0 if batch.several else -state["gradients"]  # of a first micro-batch none is there until backward
    found = {**state, "reference": FLOAT * total if reference else 0.0}
    stage = zero_stage_of(config)
    if stage:
        found["buffers"] = _buffers(trained, shape, stage, ranks_of(config))
    forward = {"activations": moments.kept + moments.passing, "logits": moments.logits, "casts": casts}
    worst = max(
        (
            {**forward, "gradients": state["gradients"] + gradients},
            {"tables": moments.backward},
            _gathered(state, total, trained, stage if gathers else 0),
        ),
        key=lambda parts: sum((found | parts).values()),
    )
    return {name: size for name, size in (found | worst).items() if size}


def scoring_memory(
    shape: ModelShape, batch: Batch, *, precision: str, attention: str, max_logits: int | None, head: bool = True
) -> Memory:
    """A forward pass without gradients: weights, one layer at a time, and the logits."""
    parameters = shape.parameters if head else shape.trunk
    found = {
        "weights": FLOAT * float(parameters),
        "activations": 2 * FLOAT * batch.tokens * shape.hidden + _passing(shape, batch, precision, attention),
    }
    if head:
        found["logits"] = _logits(shape, batch, precision, max_logits, backward=False)
    return found


def kept_by_layer(shape: ModelShape, batch: Batch, precision: str, attention: str) -> float:
    """What one layer keeps for backward.

    fp32, a token: the residual stream and its norm twice, with what each projection reads (6 H); q, k, v as attention's
    products have them and its output (4 q); gate, its activation, up and their product (4 I). Eager attention keeps its
    weights, heads T^2 a row. bf16: autocast casts the input of each projection anew (26 H bytes) and halves the rest; the
    softmax is in float32 beside its cast (6 bytes a weight).
    """
    tokens, hidden, width = batch.tokens, shape.hidden, shape.queries
    pairs = batch.rows * shape.heads * batch.length**2
    if precision == "fp32":
        values = 6 * hidden + 4 * width + 4 * shape.intermediate
        return FLOAT * tokens * values + (FLOAT * pairs if attention == "eager" else 0.0)
    values = 26 * hidden + 8 * width + 8 * shape.intermediate
    return tokens * values + ((FLOAT + HALF) * pairs if attention == "eager" else 0.0)


@dataclass(frozen=True)
class _Moments:
    """Beyond the state, at the two moments that can be the worst."""

    kept: float
    passing: float
    logits: float
    backward: float
    """At the end of backward: gradients of the embedding's size that are not yet added up."""

    @property
    def forward(self) -> float:
        """At the end of forward, where backward begins."""
        return self.kept + self.passing + self.logits


def _moments_of_a_step(shape: ModelShape, config: TrainingConfig, batch: Batch, *, head: bool) -> _Moments:
    layer = kept_by_layer(shape, batch, config.precision, config.attention)
    passing = _passing(shape, batch, config.precision, config.attention)
    logits = _logits(shape, batch, config.precision, config.max_logits, backward=True) if head else 0.0
    if config.activation_checkpointing:
        # One layer is computed again when the logits are gone.
        kept = FLOAT * batch.tokens * shape.hidden * shape.layers
        return _Moments(kept, max(0.0, layer + passing - logits), logits, _tables(shape, config, batch, head=head))
    return _Moments(shape.layers * layer, passing, logits, _tables(shape, config, batch, head=head))


def _passing(shape: ModelShape, batch: Batch, precision: str, attention: str) -> float:
    """What comes and goes inside a layer: two of the MLP's products, or of eager attention three weights less the MLP."""
    size = FLOAT if precision == "fp32" else HALF
    inner = 2 * size * batch.tokens * shape.intermediate
    pairs = batch.rows * shape.heads * batch.length**2 if attention == "eager" else 0.0
    return max(inner, 3 * FLOAT * pairs - 2 * inner)


def _logits(shape: ModelShape, batch: Batch, precision: str, most: int | None, *, backward: bool) -> float:
    """The logits, their gradient and what is widened at a time; in chunks, two of a chunk and a gradient of the head's size."""
    count = batch.scored * shape.vocabulary
    size = FLOAT if precision == "fp32" else HALF
    if most is not None and count > most:
        return 2 * FLOAT * most + (FLOAT * shape.embedding if backward else 0.0)
    return (2 if backward else 1) * size * count + 2 * FLOAT * min(count, _SCORED)


def _tables(shape: ModelShape, config: TrainingConfig, batch: Batch, *, head: bool) -> float:
    """Gradients of embedding and head at the end of backward: a tied one has two, and their sum, before they are one."""
    if config.adapter is not None:
        return 0.0
    copies = 2 if head and shape.tied else 1
    return FLOAT * shape.embedding * (copies + (1 if batch.several else 0))


def _muon(trained: float, shape: ModelShape) -> float:
    """One momentum a matrix of the layers, two moments for the rest."""
    return shape.matrices + 2 * (trained - shape.matrices)


def _gathered(state: Memory, total: float, trained: float, stage: int) -> Memory:
    """While a checkpoint is written: the optimizer's moments whole on the first rank, under ZeRO 3 the weights too
    (`stages/training/deepspeed_engine.py: DeepSpeedEngine.save`). Gradients are gone, but for ZeRO 3's buffer of them."""
    whole = 2 * trained * (stage > 0) + total * (stage == 3)
    return {"gathered": FLOAT * whole, "gradients": state["gradients"] if stage == 3 else 0.0}


def ranks_of(config: TrainingConfig) -> int:
    """Devices that share a training."""
    return config.engine.ranks if isinstance(config.engine, DeepSpeedEngineConfig) else 1


def zero_stage_of(config: TrainingConfig) -> int:
    """0 where DeepSpeed does not train."""
    return config.engine.zero_stage if isinstance(config.engine, DeepSpeedEngineConfig) else 0


def _buffers(trained: float, shape: ModelShape, stage: int, ranks: int) -> float:
    """DeepSpeed's own: the bucket that gradients are reduced in; under ZeRO 3 the layers that are gathered meanwhile."""
    bucket = FLOAT * min(_BUCKET, trained) if ranks > 1 else 0.0
    gathered = FLOAT * min(_LIVE, 2 * shape.layer + shape.embedding) if stage == 3 else 0.0
    return bucket + gathered
