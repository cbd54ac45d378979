"""The least that a step can cost: its matrix products at the speed the machine gives them right now."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

from benchmarks.workload import Workload

__all__ = ["GemmRate", "floor_flops", "gemm_gflops"]

GemmRate = dict[str, float]


def floor_flops(workload: Workload, prompt_tokens: float) -> dict[str, float]:
    """Multiply-adds times two, by phase: each question prefilled once, each token through the model once.

    Backward is twice a forward. Attention is counted at the mean context, the output head for output tokens only.
    """
    outputs = workload.questions * workload.group
    hidden, layers = workload.hidden, workload.layers
    keys_and_values = 2 * hidden * hidden * workload.kv_heads / workload.heads
    matrices = layers * (2 * hidden * hidden + keys_and_values + 3 * hidden * workload.intermediate)
    head = workload.vocabulary * hidden
    length = prompt_tokens + workload.tokens

    def forward(rows: int, tokens: float, context: float, scored: float) -> float:
        attention = 4.0 * layers * hidden * context
        return rows * (tokens * (2.0 * matrices + attention) + scored * 2.0 * head)

    prefill = forward(workload.questions, prompt_tokens, prompt_tokens / 2, 1)
    decode = forward(outputs, workload.tokens - 1, prompt_tokens + workload.tokens / 2, workload.tokens)
    whole = forward(outputs, length, length / 2, workload.tokens)
    return {"generation": prefill + decode, "reference": whole, "update": 3 * whole}


def gemm_gflops(workload: Workload) -> GemmRate:
    """Median GFLOP/s of the model's middle matrix product, as decoding (512 rows) and as training (4096 rows) has it."""
    import torch

    torch.set_num_threads(workload.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind: dict[str, Any] = {
        "dtype": torch.bfloat16 if workload.precision == "bf16" else torch.float32,
        "device": device,
    }
    settle = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    weight = torch.randn(workload.intermediate, workload.hidden, **kind)
    rates = {}
    for name, rows in (("decode", workload.questions * workload.group), ("train", 4096)):
        given = torch.randn(rows, workload.hidden, **kind)
        took = []
        for _ in range(20):
            settle()
            started = time.perf_counter()
            torch.nn.functional.linear(given, weight)
            settle()
            took.append(time.perf_counter() - started)
        rates[name] = 2e-9 * rows * weight.numel() / median(took)
    return rates
