"""Count the bytes that training, scoring and sampling need on one device, part by part, at the worst moment.

    training     weights + gradients + optimizer + reference + what forward keeps for backward + the head's + the rest
    KV cache     2 L kv bytes a token                                L layers, kv = key heads * head size

Legend: P parameters, N padded tokens of a micro-batch, O of them scored, V vocabulary, n ranks. Parameters,
gradients and optimizer state are float32 in every precision (`stages/training/config.py`); what is partitioned is divided by n
as in ZeRO (Rajbhandari et al. 2020, section 3). What a layer keeps is counted operation by operation in transformers' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from flows.planning.shapes import ModelShape
from stages.rollout import HFBackendConfig, VLLMBackendConfig
from stages.training import AdamWConfig, DeepSpeedEngineConfig, TrainingConfig
from stages.training.batching import SHARED_KEYS
from stages.training.config import REDUCED_AT_ONCE

FLOAT: Final = 4
HALF: Final = 2
_GIB: Final = 2.0**30
_SCORED: Final = 1 << 22
"""Logits that are widened to float32 at a time (`stages/kernels/logprobs.py`)."""
_BUCKET: Final = 5e8
"""Numbers of DeepSpeed's default bucket for reductions (`reduce_bucket_size`), at most, which ZeRO 0 to 2 have."""
_LIVE: Final = 1e9
"""Parameters that ZeRO 3 keeps gathered, at most (`stage3_max_live_parameters`)."""
_PREFILL: Final = 16_384
"""Prompt tokens of a prefill forward (`stages/rollout/hf.py`)."""
_SPARE: Final = 16
"""Tokens of room that the KV cache gets at a time, or an eighth of what is filled (`stages/rollout/kv_cache.py`)."""
_COPIES: Final = 5
"""Of a step's logits in float32: as computed, over T, their log softmax, its exp, and that in blocks
(`stages/rollout/hf.py`)."""

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
    group: int = 1
    """Rows that follow one another share a prompt, so many: it is computed once."""

    @classmethod
    def of(cls, rows: float, prompt: float, output: float, budget: int, group: int = 1) -> Batch:
        """Make the largest that a budget of padded tokens allows of so many rows (`stages/training/batching.py`)."""
        row = output + (SHARED_KEYS * (prompt + output) if group > 1 else 0.0)
        groups, left = divmod(budget, prompt + group * row)
        fitting = max(1, int(groups * group + max(0.0, (left - prompt) // row)))
        return cls(min(max(1, int(rows)), fitting), prompt, output, several=rows > fitting, group=group)

    @property
    def prompts(self) -> int:
        """Return how many prompts are computed."""
        return -(-self.rows // self.group)

    @property
    def tokens(self) -> float:
        """Return N."""
        return self.prompts * self.prompt + self.rows * self.output

    @property
    def keys(self) -> float:
        """Return the keys that attention reads: every output has its prompt's once more."""
        return self.tokens if self.group == 1 else self.tokens + self.rows * self.prompt

    @property
    def pairs(self) -> float:
        """Return the places that attention weighs: of a prompt's tokens each other, of an output's the prompt too."""
        length = self.prompt + self.output
        if self.group == 1:
            return self.rows * length**2
        return self.prompts * self.prompt**2 + self.rows * self.output * length

    @property
    def scored(self) -> float:
        """Return O."""
        return self.rows * self.output


def ranks_of(config: TrainingConfig) -> int:
    """Return how many devices share a training."""
    return config.engine.ranks if isinstance(config.engine, DeepSpeedEngineConfig) else 1


def sharing(config: TrainingConfig, group: int) -> int:
    """Return how many outputs of a group are computed behind one prompt; all planned architectures can."""
    return group if config.share_prompts and config.attention_kind != "flash_attention_2" else 1


def zero_stage_of(config: TrainingConfig) -> int:
    """Return the ZeRO stage, 0 where DeepSpeed does not train."""
    return config.engine.zero_stage if isinstance(config.engine, DeepSpeedEngineConfig) else 0


def training_state(parameters: float, shape: ModelShape, config: TrainingConfig, trained: float) -> Memory:
    """Return weights, gradients and optimizer state on one device, of `parameters` of which `trained` have a gradient.

    Offloaded parts are left out.
    """
    engine, stage, ranks = config.engine, zero_stage_of(config), ranks_of(config)
    offload = engine.offload if isinstance(engine, DeepSpeedEngineConfig) else "none"
    adamw = isinstance(config.optimizer, AdamWConfig)
    # Muon has one momentum a matrix of the layers, and two moments for the rest.
    moments = 2.0 * trained if adamw else shape.matrices + 2 * (trained - shape.matrices)
    masters = trained if stage else 0.0  # ZeRO's optimizer steps on a flat copy, in float32 mode too
    return {
        "weights": 0.0 if offload == "parameters" else FLOAT * parameters / (ranks if stage == 3 else 1),
        "gradients": FLOAT * trained / (ranks if stage >= 2 else 1),
        "optimizer": 0.0 if offload != "none" else FLOAT * (moments + masters) / (ranks if stage else 1),
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
    """Return the peak of an optimizer step, the engine having its optimizer state.

    Args:
        reference: a frozen copy of the model is in memory too.
        head: a language model; False: a critic or a reward model, whose logits are one number a row or token.
        gathers: checkpoints are gathered in the same memory, as on a CPU; a GPU hands them to its host parameter by parameter.
    """
    parameters = shape.parameters if head else shape.trunk
    trained = parameters if config.adapter is None else shape.adapter(config.adapter.r)
    total = parameters + (0 if config.adapter is None else trained)
    state, stage = training_state(total, shape, config, trained), zero_stage_of(config)
    factors = (HALF if config.bf16 else FLOAT) * (total - parameters)
    found = {**state, "reference": frozen_bytes(shape, config.products) + factors if reference else 0.0}
    if stage:
        found["buffers"] = _buffers(trained, shape, stage, ranks_of(config))
    half = config.bf16 and not config.float32_logits
    logits = _logits(shape, batch, config.max_logits, half=half, backward=True) if head else 0.0
    forward = {
        "activations": _activations(shape, config, batch, logits),
        "logits": logits,
        "casts": HALF * (shape.matrices + (shape.embedding if head else 0)) if config.bf16 else 0.0,
        # Of a first micro-batch there is no gradient until backward.
        "gradients": state["gradients"] if batch.several else 0.0,
    }
    backward = {"tables": _tables(shape, config, batch, head=head)}
    writing = _gathered(state, total, trained, stage if gathers else 0)
    worst = max((forward, backward, writing), key=lambda parts: sum((found | parts).values()))
    return {name: size for name, size in (found | worst).items() if size}


def frozen_bytes(shape: ModelShape, precision: str, *, head: bool = True) -> float:
    """Return the weights of a model that only computes: float32, under bfloat16 without half of those of its linear layers
    (`stages/training/loop.py: halve_linear_weights`); a tied head and that of a reward model stay as they are."""
    linear = shape.matrices + (shape.embedding if head and not shape.tied else 0)
    return FLOAT * float(shape.parameters if head else shape.trunk) - (HALF * linear if precision == "bf16" else 0.0)


def scoring_memory(
    shape: ModelShape,
    batch: Batch,
    *,
    precision: str,
    attention: str,
    max_logits: int | None,
    head: bool = True,
    half: bool = False,
    frozen: bool = True,
) -> Memory:
    """Return the peak of a forward pass without gradients: weights, one layer at a time, and the logits.

    Args:
        half: logits are rounded to bfloat16 (`training.head_precision`).
        frozen: a reference or a reward model; False: an engine's own model, with its masters.
    """
    found = {
        "weights": frozen_bytes(shape, precision if frozen else "fp32", head=head),
        "activations": 2 * FLOAT * batch.tokens * shape.hidden + _passing(shape, batch, precision, attention),
    }
    if head:
        found["logits"] = _logits(shape, batch, max_logits, half=half, backward=False)
    return found


def kept_by_layer(shape: ModelShape, batch: Batch, precision: str, attention: str) -> float:
    """Return what one layer keeps for backward.

    fp32, a token: the residual stream and its norm twice, with what each projection reads (6 H); q as attention's products have
    it and their output (2 q), of a key k and v (2 q); gate, its activation, up and their product (4 I). Eager attention keeps
    its weights, one a head and pair. bf16: autocast casts the input of each projection anew (26 H bytes) and halves the rest;
    the softmax is in float32 with its cast (6 bytes a weight).
    """
    tokens, hidden, width = batch.tokens, shape.hidden, shape.queries
    keys = 2 * width * batch.keys
    pairs = shape.heads * batch.pairs
    if precision == "fp32":
        values = 6 * hidden + 2 * width + 4 * shape.intermediate
        return FLOAT * (tokens * values + keys + (pairs if attention == "eager" else 0.0))
    values = 26 * hidden + 4 * width + 8 * shape.intermediate
    return tokens * values + HALF * keys + ((FLOAT + HALF) * pairs if attention == "eager" else 0.0)


def _activations(shape: ModelShape, config: TrainingConfig, batch: Batch, logits: float) -> float:
    """Return what the layers keep and what comes and goes inside one, at the end of forward."""
    layer = kept_by_layer(shape, batch, config.products, config.attention_kind)
    passing = _passing(shape, batch, config.products, config.attention_kind)
    if config.activation_checkpointing:
        # One layer is computed again when the logits are gone.
        return FLOAT * batch.tokens * shape.hidden * shape.layers + max(0.0, layer + passing - logits)
    return shape.layers * layer + passing


def _passing(shape: ModelShape, batch: Batch, precision: str, attention: str) -> float:
    """Return what comes and goes inside a layer: two products of the MLP, or three of eager weights less these."""
    size = FLOAT if precision == "fp32" else HALF
    inner = 2 * size * batch.tokens * shape.intermediate
    pairs = shape.heads * batch.pairs if attention == "eager" else 0.0
    return max(inner, 3 * FLOAT * pairs - 2 * inner)


def _logits(shape: ModelShape, batch: Batch, most: int | None, *, half: bool, backward: bool) -> float:
    """Return the logits, their gradient and what is widened at a time; of chunks two, and a gradient of the head's size."""
    count = batch.scored * shape.vocabulary
    size = HALF if half else FLOAT
    if most is not None and count > most:
        return 2 * FLOAT * most + (FLOAT * shape.embedding if backward else 0.0)
    return (2 if backward else 1) * size * count + 2 * FLOAT * min(count, _SCORED)


def _tables(shape: ModelShape, config: TrainingConfig, batch: Batch, *, head: bool) -> float:
    """Return the gradients of embedding and head at the end of backward: of a tied one two, and their sum."""
    if config.adapter is not None:
        return 0.0
    copies = 2 if head and shape.tied else 1
    return FLOAT * shape.embedding * (copies + (1 if batch.several else 0))


def _gathered(state: Memory, total: float, trained: float, stage: int) -> Memory:
    """Return what is there while a checkpoint is written: the moments whole on the first rank, under ZeRO 3 the weights too
    (`stages/training/deepspeed_engine.py: DeepSpeedEngine.save`). Gradients are gone, but for ZeRO 3's buffer of them."""
    whole = 2 * trained * (stage > 0) + total * (stage == 3)
    return {"gathered": FLOAT * whole, "gradients": state["gradients"] if stage == 3 else 0.0}


def _buffers(trained: float, shape: ModelShape, stage: int, ranks: int) -> float:
    """Return DeepSpeed's own: the bucket that gradients are reduced in; under ZeRO 3 the layers that are gathered meanwhile."""
    bucket = FLOAT * min(REDUCED_AT_ONCE if stage == 3 else _BUCKET, trained) if ranks > 1 else 0.0
    gathered = FLOAT * min(_LIVE, 2 * shape.layer + shape.embedding) if stage == 3 else 0.0
    return bucket + gathered


def token_bytes(shape: ModelShape, bytes_a_number: int) -> float:
    """Return the bytes of one token in the KV cache."""
    return 2.0 * shape.layers * shape.keys * bytes_a_number


def room_of_keys(prompt: float, output: float, longest: float) -> float:
    """Return the last width of the `hf` KV cache: what is filled and an eighth, 16 at least; `longest` outputs at most."""

    def room(filled: float) -> float:
        return min(prompt + longest, filled + max(_SPARE, filled // 8))

    found = room(prompt)
    while found < prompt + output:
        found = room(found + 1)
    return found


def hf_memory(
    shape: ModelShape, backend: HFBackendConfig, *, outputs: int, group: int, prompt: float, longest: float, half: bool
) -> Memory:
    """Return the peak of our own decoding loop: the last token of the longest output, or the prefill where that is more.

    Args:
        outputs: of the whole call; `batch_rows` of them are decoded at once.
        half: bfloat16.
    """
    size = HALF if half else FLOAT
    rows = min(backend.batch_rows, outputs)
    room = room_of_keys(prompt, longest, longest)
    keys = rows * room * token_bytes(shape, size)
    # While a layer's cache grows its old and its new keys are there.
    growing = rows * room * 2.0 * shape.keys * size / 2 if room > room_of_keys(prompt, 0, longest) else 0.0
    scores = rows * shape.heads * room * (FLOAT + 2 * size)
    step = rows * (2 * shape.intermediate + 4 * shape.hidden) * size + scores
    prefilled = min(max(1, -(-rows // group)), max(1, int(_PREFILL // prompt)))
    first = prefilled * prompt * (3 * shape.intermediate + 4 * shape.hidden) * size
    first += prefilled * shape.heads * prompt**2 * (FLOAT + 2 * size)
    return {
        "weights": size * float(shape.parameters),
        "keys and values": keys + growing,
        "activations": max(step, first),
        "logits": rows * shape.vocabulary * (_COPIES * FLOAT + (HALF if half else 0)),
    }


def vllm_memory(shape: ModelShape, backend: VLLMBackendConfig, *, memory: float, half: bool, cpu: bool) -> Memory:
    """Return vLLM's share of a GPU, which it takes whole, keys in what the weights leave; on a CPU as much as is configured."""
    weights = (HALF if half else FLOAT) * float(shape.parameters) / backend.tensor_parallel_size
    if cpu:
        return {"weights": weights, "keys and values": backend.cpu_kv_cache_gib * _GIB}
    return {"weights": weights, "keys and values": max(0.0, backend.gpu_memory_utilization * memory - weights)}


def side_by_side(shape: ModelShape, backend: VLLMBackendConfig, parts: Memory, length: float, size: int) -> int:
    """Return how many outputs of so many tokens vLLM decodes at once, in the keys that it has, of `size` bytes a number."""
    each = token_bytes(shape, size) * length / backend.tensor_parallel_size
    return int(min(backend.max_num_seqs, parts["keys and values"] // each))
