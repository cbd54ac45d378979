"""The least that a step can cost: its matrix products at the speed the machine gives them right now.

Importable in the peers' environment, as `workload.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.workload import Workload

__all__ = ["Forward", "GemmRate", "Group", "alone", "floor_flops", "gemm_gflops", "generated", "learned", "step_work"]

GemmRate = dict[str, float]
Group = tuple[int, Sequence[Sequence[int]]]
"""One question: tokens of its prompt, and the ids of each of its outputs, which end where sampling ended."""


@dataclass(frozen=True)
class Forward:
    """What goes through a model: a token's logits are those of the token behind it, so an output's last token does not."""

    tokens: int = 0
    positions: int = 0
    """Positions that the tokens attend to, their own included, added up."""
    logits: int = 0
    """Rows of them."""

    def __add__(self, other: Forward) -> Forward:
        return Forward(self.tokens + other.tokens, self.positions + other.positions, self.logits + other.logits)

    def flops(self, workload: Workload) -> float:
        """Multiply-adds times two."""
        hidden, layers = workload.hidden, workload.layers
        keys_and_values = 2 * hidden * hidden * workload.kv_heads / workload.heads
        matrices = layers * (2 * hidden * hidden + keys_and_values + 3 * hidden * workload.intermediate)
        attention = 4.0 * layers * hidden * self.positions
        return self.tokens * 2.0 * matrices + attention + self.logits * 2.0 * workload.vocabulary * hidden


def _prompt(length: int) -> Forward:
    return Forward(length, length * (length + 1) // 2, 1)


def _behind(prompt: int, tokens: int) -> Forward:
    """So many tokens behind a prompt, one after another."""
    return Forward(tokens, tokens * prompt + tokens * (tokens + 1) // 2, tokens)


def _sum(parts: Iterable[Forward]) -> Forward:
    return sum(parts, Forward())


def generated(groups: Sequence[Group]) -> Forward:
    """Sampling: each question once, each prefix that outputs of a question share once."""
    total = Forward()
    for prompt, outputs in groups:
        prefixes = {tuple(ids[:length]) for ids in outputs for length in range(1, len(ids))}
        total += _sum([_prompt(prompt), *(Forward(1, prompt + len(prefix), 1) for prefix in prefixes)])
    return total


def learned(groups: Sequence[Group]) -> Forward:
    """A forward pass of reference or update: each question once, each of its different outputs once."""
    return _sum(
        part
        for prompt, outputs in groups
        for part in (_prompt(prompt), *(_behind(prompt, len(ids) - 1) for ids in {tuple(ids) for ids in outputs}))
    )


def alone(groups: Sequence[Group]) -> Forward:
    """A forward pass that shares nothing: each output with its question."""
    return _sum(_prompt(prompt) + _behind(prompt, len(ids) - 1) for prompt, outputs in groups for ids in outputs)


def floor_flops(workload: Workload, groups: Sequence[Group]) -> dict[str, float]:
    """FLOPs of one step by phase; a backward pass is two forward ones."""
    whole = learned(groups).flops(workload)
    return {"generation": generated(groups).flops(workload), "reference": whole, "update": 3 * whole}


def step_work(workload: Workload, groups: Sequence[Group], rewards: Sequence[float]) -> dict[str, Any]:
    """What a step was about, as a worker answers it; `unshared` is the update's forward and backward without sharing."""
    outputs = [tuple(ids) for _, group in groups for ids in group]
    return {
        "outputs": len(outputs),
        "prompt_tokens": sum(prompt for prompt, _ in groups) / len(groups),
        "output_tokens": sum(map(len, outputs)) / len(outputs),
        "different": sum(len({tuple(ids) for ids in group}) for _, group in groups) / len(outputs),
        "reward": sum(rewards) / len(rewards),
        "floor_flops": floor_flops(workload, groups),
        "unshared_flops": 3 * alone(groups).flops(workload),
    }


def gemm_gflops(workload: Workload) -> GemmRate:
    """Median GFLOP/s of the model's middle matrix product, as decoding (a row an output) and as training (4096) has it."""
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
