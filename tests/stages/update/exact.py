"""The trainer's own step in float64, its gradient kept, and the definition that it is compared with."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from stages.training.engine import StepReport
from stages.training.loop import optimizer_step
from stages.training.sharing import share_prompts
from stages.update.config import UpdateConfig
from stages.update.loss import Example, MiniBatch, policy_loss
from stages.update.metrics import UpdateMetrics
from stages.update.objectives import method_of
from stages.update.stage import pair_up
from tests.stages.training.tiny import tiny_model

T = TypeVar("T")


class ExactEngine:
    """An `Engine` that computes in float64 and keeps the gradient instead of stepping."""

    device = "cpu"
    holds: str | None = None
    skipped = 0
    rank = 0
    world_size = 1

    def __init__(self, model: Any, max_logits: int | None = None) -> None:
        self.model, self.max_logits = model.double(), max_logits
        self.gradient: Tensor | None = None

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        torch.autograd.backward(loss)

    def step(self, *, factor: float = 1.0) -> StepReport:
        self.gradient = gradient_of(self.model)
        self.model.zero_grad()
        return StepReport(float(self.gradient.norm()), 0.0, skipped=False)

    def total(self, value: float) -> float:
        return value


class Rank(ExactEngine):
    """One of several ranks in threads of this process: sums are exchanged at a barrier."""

    def __init__(self, rank: int, shares: list[float], barrier: threading.Barrier) -> None:
        super().__init__(policy_model())
        self.rank, self.world_size = rank, len(shares)
        self._shares, self._barrier = shares, barrier

    def total(self, value: float) -> float:
        self._shares[self.rank] = value
        self._barrier.wait(timeout=60)
        summed = sum(self._shares)
        self._barrier.wait(timeout=60)
        return summed


def in_lockstep(world_size: int, work: Callable[[Rank], T]) -> list[T]:
    """What each of several ranks returns."""
    shares, barrier = [0.0] * world_size, threading.Barrier(world_size)
    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(work, [Rank(rank, shares, barrier) for rank in range(world_size)]))


def policy_model(seed: int = 0) -> Any:
    """A tiny Qwen2 in float64, the caller's own; another seed moves its weights."""
    return copy.deepcopy(_made(seed))


@functools.lru_cache
def _made(seed: int) -> Any:
    model = tiny_model().double()
    model.set_attn_implementation("sdpa")  # the eager one has its softmax in float32, whatever the model's precision
    share_prompts(model)  # definitions are computed by rows, so that each of these tests compares the two as well
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def gradient_of(model: Any) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in model.parameters()])


def trained_gradient(
    examples: Sequence[Example],
    config: UpdateConfig,
    *,
    reference: Any = None,
    old: Any = None,
    temperature: float = 1.0,
    max_logits: int | None = None,
    policy: Any = None,
) -> tuple[Tensor, UpdateMetrics]:
    """The gradient of the loss that `update_policy` uses, negated: what it ascends; and what it noted."""
    engine, noted = ExactEngine(policy or policy_model(), max_logits), UpdateMetrics()
    method = method_of(config.objective)
    ordered = pair_up(examples) if method.pairs else list(examples)
    mini_batch = MiniBatch.of(ordered, engine, temperature, config, method)
    if method.needs_reference:
        mini_batch.compare_with(reference, engine)
    if old is not None:
        mini_batch.remember_policy(ExactEngine(old, max_logits))
    if config.old_logprobs == "rollout":
        mini_batch.trust_rollout()
    loss = policy_loss(engine, mini_batch.temperature, method, config.correction, noted.add)
    noted.stepped(optimizer_step(engine, mini_batch.parts, loss))
    assert engine.gradient is not None or not mini_batch.parts
    found = engine.gradient if engine.gradient is not None else torch.zeros_like(gradient_of(engine.model))
    return -found, noted


def logprobs(model: Any, example: Example, temperature: float = 1.0) -> Tensor:
    """log pi of the output's tokens, one row at a time, without padding: `[T]`."""
    ids = torch.tensor([[*example.prompt_ids, *example.output_ids]])
    start = len(example.prompt_ids)
    table = (model(input_ids=ids).logits[0, start - 1 : -1] / temperature).log_softmax(-1)
    return table.gather(-1, ids[0, start:, None]).squeeze(-1)


def defined_gradient(
    examples: Sequence[Example],
    coefficient: Callable[[Example, Tensor], Tensor],
    *,
    weight: Callable[[Example], float] | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Eq. 5 by definition: sum over outputs of (1/G) (1/|o|) sum_t GC grad log pi_theta, GC held constant.

    Args:
        coefficient: GC of an output, given its detached log-probabilities.
        weight: of each of its tokens instead of (1/G) (1/|o|).
    """
    model = policy_model()
    for example in examples:
        logp = logprobs(model, example, temperature)
        share = weight(example) if weight else 1 / (len(examples) * len(example.output_ids))
        (share * coefficient(example, logp.detach()) * logp).sum().backward()
    return gradient_of(model)


def relative(found: Tensor, expected: Tensor) -> float:
    """Distance of two gradients in units of the expected one's length."""
    return float((found - expected).norm() / expected.norm())
