"""How much arithmetic and memory traffic a stage is.

    forward    2 M + 4 q T L a token, 2 V H a scored position      M: numbers in the layers' matrices
    backward   twice that; a further forward where activations are computed again

T: the row's length, in full: eager attention computes what the mask then hides. 6 N D and 8 N D, with N parameters and D
tokens, are these without attention (Kaplan et al. 2020, section 2.1; Korthikanti et al. 2022 for recomputation).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from flows.planning.decoding import token_bytes
from flows.planning.memory import FLOAT, HALF, Batch, kept_by_layer, zero_stage_of
from flows.planning.shapes import ModelShape
from stages.training import TrainingConfig

__all__ = ["Work", "decoding_work", "scoring_work", "training_work"]


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
        """So many times this."""
        return Work(*(getattr(self, field.name) * factor for field in fields(self)))


def forward_flops(shape: ModelShape, tokens: float, length: float, scored: float) -> float:
    """Of a forward pass over `tokens` in rows of `length`, whose head is applied to `scored` positions."""
    pairs = 4.0 * shape.queries * length * shape.layers
    return tokens * (2.0 * shape.matrices + pairs) + 2.0 * scored * shape.embedding


def training_work(
    shape: ModelShape,
    config: TrainingConfig,
    rows: float,
    prompt: float,
    output: float,
    budget: int,
    *,
    head: bool = True,
) -> Work:
    """Forward and backward of so many rows, in micro-batches of `budget` tokens, and the optimizer's step."""
    passes, batch = _passes(rows, prompt, output, budget)
    scored = rows * output if head else 0.0
    once = forward_flops(shape, rows * batch.length, batch.length, scored)
    kept = passes * shape.layers * kept_by_layer(shape, batch, config.precision, config.attention)
    logits = FLOAT * scored * shape.vocabulary
    again = 1 if config.activation_checkpointing else 0
    parameters = shape.parameters if head else shape.trunk
    trained = parameters if config.adapter is None else shape.adapter(config.adapter.r)
    # Written and read in forward, twice as much in backward; AdamW reads four and writes three numbers a parameter.
    traffic = (3 + again) * 2 * (kept + logits) + 8 * FLOAT * trained
    traffic += 2 * FLOAT * parameters * _copies(config, passes)
    return Work((3 + again) * once, traffic, layers=(3 + again) * passes * shape.layers, tokens=rows * batch.length)


def scoring_work(
    shape: ModelShape,
    rows: float,
    prompt: float,
    output: float,
    budget: int,
    *,
    precision: str,
    attention: str,
    head: bool = True,
) -> Work:
    """A forward pass without gradients."""
    passes, batch = _passes(rows, prompt, output, budget)
    scored = rows * output if head else 0.0
    flops = forward_flops(shape, rows * batch.length, batch.length, scored)
    kept = passes * shape.layers * kept_by_layer(shape, batch, precision, attention)
    traffic = 2 * (kept + FLOAT * scored * shape.vocabulary)
    return Work(flops, traffic, layers=passes * shape.layers, tokens=rows * batch.length)


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
) -> Work:
    """Each question prefilled once, then token by token: weights read at every token, keys of every row.

    Args:
        output: mean length; as many steps as the `longest` has, of ever fewer rows.
        side_by_side: outputs of a batch, at most.
    """
    outputs, size = questions * group, HALF if half else FLOAT
    batches = max(1.0, -(-outputs // side_by_side))
    steps = batches * longest
    tokens = outputs * output
    flops = forward_flops(shape, questions * prompt, prompt, questions)
    flops += forward_flops(shape, tokens, prompt + output / 2, tokens)
    weights = size * (shape.matrices + shape.embedding)
    keys = token_bytes(shape, size) * (prompt + output / 2)
    # Attention reads keys and values and passes over its scores; sampling passes five times over a row's logits.
    scores = 4 * FLOAT * shape.layers * shape.heads * (prompt + output / 2)
    logits = 2 * 5 * FLOAT * shape.vocabulary
    return Work(
        flops,
        traffic=tokens * (scores + logits),
        reads=steps * weights + tokens * keys,
        layers=(steps + batches) * shape.layers,
        tokens=questions * prompt + tokens,
    )


def _copies(config: TrainingConfig, passes: float) -> float:
    """How often numbers as many as the parameters are copied for the sake of ZeRO, by all ranks together.

    Gradients into its flat buffers and weights out of them; at stage 3 weights are also gathered, in the forward and in the
    backward pass of each micro-batch.
    """
    stage = zero_stage_of(config)
    return 0.0 if not stage else 2.0 + (2.0 * passes if stage == 3 else 0.0)


def _passes(rows: float, prompt: float, output: float, budget: int) -> tuple[float, Batch]:
    """How many micro-batches of such rows there are, and one of them."""
    fitting = min(max(1.0, rows), max(1, budget // (prompt + output)))
    return rows / fitting, Batch(int(fitting), prompt, output)
