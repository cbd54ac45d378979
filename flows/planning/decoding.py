"""Bytes that sampling needs on one device: weights, keys and values, logits; of vLLM also how many outputs go side by side.

keys and values     2 L kv bytes a token, L layers, kv = key heads * head size
"""

from __future__ import annotations

from typing import Final

from flows.planning.memory import FLOAT, HALF, Memory
from flows.planning.shapes import ModelShape
from stages.rollout import HFBackendConfig, VLLMBackendConfig

__all__ = ["hf_memory", "room_of_keys", "side_by_side", "token_bytes", "vllm_memory"]

_PREFILL: Final = 16_384
"""Prompt tokens of a prefill forward (`stages/rollout/hf.py`)."""
_FIRST_ROOM: Final = 64
"""Tokens of room after the prompt at first, which grows by half (`stages/rollout/kv_cache.py`)."""
_COPIES: Final = 5
"""Of a step's logits in float32: as computed, over T, their log softmax, its exp, and that in blocks
(`stages/rollout/sampling.py`)."""
_GIB: Final = 2.0**30


def token_bytes(shape: ModelShape, bytes_a_number: int) -> float:
    """Keys and values of one token."""
    return 2.0 * shape.layers * shape.keys * bytes_a_number


def room_of_keys(prompt: float, output: float, longest: float) -> float:
    """Columns that the `hf` cache has in the end: prompt and 64, then by half as much again, `longest` outputs at most."""
    columns = prompt + longest
    room = min(columns, prompt + _FIRST_ROOM)
    while room < prompt + output:
        room = min(columns, max(room + 1, room * 3 // 2))
    return room


def hf_memory(
    shape: ModelShape, backend: HFBackendConfig, *, outputs: int, group: int, prompt: float, longest: float, half: bool
) -> Memory:
    """Our own decoding loop at its last token, whose longest output has `longest` tokens; or its prefill where that is more.

    Args:
        outputs: of the whole call; `batch_rows` of them are decoded side by side.
        half: bfloat16.
    """
    size = HALF if half else FLOAT
    rows = min(backend.batch_rows, outputs)
    room = room_of_keys(prompt, longest, longest)
    keys = rows * room * token_bytes(shape, size)
    # While a layer's cache grows its old and its new keys are there.
    growing = rows * room * 2.0 * shape.keys * size / 2 if room > prompt + _FIRST_ROOM else 0.0
    scores = rows * shape.heads * room * (FLOAT + 2 * size)
    step = rows * (2 * shape.intermediate + 4 * shape.hidden) * size + scores
    logits = rows * shape.vocabulary * (_COPIES * FLOAT + (HALF if half else 0))
    prefilled = min(max(1, -(-rows // group)), max(1, int(_PREFILL // prompt)))
    first = prefilled * prompt * (3 * shape.intermediate + 4 * shape.hidden) * size
    first += prefilled * shape.heads * prompt**2 * (FLOAT + 2 * size)
    return {
        "weights": size * float(shape.parameters),
        "keys and values": keys + growing,
        "activations": max(step, first),
        "logits": logits,
    }


def vllm_memory(shape: ModelShape, backend: VLLMBackendConfig, *, memory: float, half: bool, cpu: bool) -> Memory:
    """vLLM takes its share of a GPU whole, and what the weights leave of it is for keys; on a CPU it is told how much."""
    size = HALF if half else FLOAT
    weights = size * float(shape.parameters) / backend.tensor_parallel_size
    if cpu:
        return {"weights": weights, "keys and values": backend.cpu_kv_cache_gib * _GIB}
    share = backend.gpu_memory_utilization * memory
    return {"weights": weights, "keys and values": max(0.0, share - weights)}


def side_by_side(shape: ModelShape, backend: VLLMBackendConfig, parts: Memory, length: float, size: int) -> int:
    """How many outputs of so many tokens vLLM decodes at once, in the keys that it has, of `size` bytes a number."""
    each = token_bytes(shape, size) * length / backend.tensor_parallel_size
    return int(min(backend.max_num_seqs, parts["keys and values"] // each))
