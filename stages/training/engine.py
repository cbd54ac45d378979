"""The seam between training loops and what runs them: one Protocol, plain torch and DeepSpeed behind it.

An engine is a cache of a checkpoint, not state: `holds` names the checkpoint whose weights and optimizer state it has right
now, and everything it knows can be loaded again from there, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, assert_never

import torch
from torch import Tensor

from pipeline.residency import resident
from stages.models import Checkpoint, architecture_of
from stages.training.config import DeepSpeedEngineConfig, TorchEngineConfig, TrainingConfig

__all__ = ["Engine", "GradientError", "StepReport", "check_skipped", "largest", "publish", "resident_engine"]


class GradientError(ValueError):
    """Too many steps in a row had a gradient that is not finite; names what is not finite and what to do."""


class StepReport(NamedTuple):
    """What one optimizer step did."""

    grad_norm: float
    """Global L2 norm of the gradient before clipping; not finite when the step was skipped."""
    learning_rate: float
    """Rate of the first parameter group (Muon: of the matrices)."""
    skipped: bool
    """True when the gradient was not finite: parameters, moments and schedule are as before."""
    loss: float = 0.0
    """This rank's share of the loss before the step, where `stages.training.loop.train` made it."""


class Engine(Protocol):
    """Runs forward, backward and step of one model, alone or as one rank of several with a share of the rows each.

    Ranks act in lockstep: every rank makes equally many forward passes with `backward`, and every rank calls `step`, `load`,
    `save` and `total`, in the same order. A rank that has fewer micro-batches than another (or none) forwards any batch and
    multiplies its loss by 0.
    """

    model: Any
    """Call it (under `autocast()`) with input_ids, attention_mask and position_ids; has an output head."""
    device: str
    """Where batches belong."""
    max_logits: int | None
    """Logits to have at a time in a forward pass (`TrainingConfig.max_logits`)."""
    holds: str | None
    """Digest of the checkpoint it is equal to; None once anything changed."""
    skipped: int
    """Steps skipped because of a gradient that was not finite, since training began."""
    rank: int
    """Which of the ranks this process is; rank 0 writes files."""
    world_size: int
    """How many ranks there are; 1 where a process trains alone."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Context for forward passes, with and without gradient."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of `loss`, which is already divided by the global denominator.

        Global: the count of the whole batch, over all micro-batches and ranks. Gradients are summed over both, never averaged.

        Args:
            last: this is the final micro-batch before `step`.
        """
        ...

    def step(self, *, factor: float = 1.0) -> StepReport:
        """Clip, schedule, update, and forget the gradient; `factor` multiplies the scheduled learning rate.

        Raises:
            GradientError: as `check_skipped`, on all ranks alike.
        """
        ...

    def load(self, checkpoint: Checkpoint) -> None:
        """Become the checkpoint: weights, optimizer state and counters; accumulated gradients are dropped."""
        ...

    def save(self, folder: Path, *, optimizer: bool = True) -> None:
        """Write a complete checkpoint: description, float32 masters and (unless left out) the optimizer's state.

        Every rank takes part in gathering what is partitioned; rank 0 alone writes.
        """
        ...

    def total(self, value: float) -> float:
        """Sum of a number over the ranks: of each rank's part of a loss, for example."""
        ...


def resident_engine(checkpoint: Checkpoint, config: TrainingConfig, slot: str = "trainer") -> Engine:
    """The engine kept warm in `slot`, holding exactly `checkpoint`; it loads only when it holds something else."""
    key = (json.dumps(config.key(), sort_keys=True), config.max_skipped_steps, architecture_of(checkpoint))
    engine = resident(slot, key, lambda: _make_engine(checkpoint, config))
    if engine.holds != checkpoint.digest or config.optimizer_state == "none":
        engine.load(checkpoint)
    return engine


def publish(engine: Engine, *, optimizer: bool = True, files: Mapping[str, str] | None = None) -> Checkpoint:
    """Publish what the engine has as a checkpoint, which it then holds; all ranks return what rank 0 wrote.

    Args:
        optimizer: with the optimizer's state.
        files: further text files of the checkpoint, by name.
    """

    def fill(folder: Path) -> None:
        engine.save(folder, optimizer=optimizer)
        for name, text in (files or {}).items():
            (folder / name).write_text(text)

    if engine.rank == 0:
        checkpoint = Checkpoint.write(fill)
    else:
        engine.save(Path(), optimizer=optimizer)  # takes part in gathering, writes nothing
        checkpoint = Checkpoint("")
    if engine.world_size > 1:
        checkpoint = Checkpoint(_digest_of_rank_zero(checkpoint.digest, engine.device))
    # Without its optimizer state the checkpoint is less than the engine: the next stage call must start from the artifact.
    engine.holds = checkpoint.digest if optimizer else None
    return checkpoint


def check_skipped(engine: Engine, in_a_row: int, limit: int | None, losses: Sequence[Tensor], gradient: str) -> None:
    """Stop where more steps in a row were skipped than `limit`; all ranks call it together, with equal counts.

    Args:
        losses: of this rank's micro-batches since the last step.
        gradient: the first parameter whose gradient is not finite; empty where that is not known.

    Raises:
        GradientError: with the first cause in the order weights, loss, gradient.
    """
    if limit is None or in_a_row <= limit:
        return
    broken = next((name for name, weight in engine.model.named_parameters() if not weight.isfinite().all()), "")
    # Ranks have different micro-batches, and under ZeRO 3 different parts of the weights.
    weights = engine.total(float(bool(broken)))
    lost = engine.total(float(sum(not loss.isfinite().all() for loss in losses)))
    if weights:
        cause = f"weights are not finite{f' ({broken})' if broken else ''}; go on from an earlier checkpoint"
    elif lost:
        cause = (
            f"the loss of {lost:g} micro-batches is not finite; look at what it is made of (policy/kl, policy/ratio_max, "
            "rewards, returns), lower the learning rate, or refresh the reference more often"
        )
    else:
        where = f" of {gradient}" if gradient else ""
        cause = f"the loss is finite and the gradient{where} is not; lower the learning rate, or set precision=fp32"
    raise GradientError(
        f"{in_a_row} steps in a row were skipped, since their gradient was not finite (training.max_skipped_steps={limit}): "
        f"{cause}. Skipped steps leave the parameters as they are"
    )


def largest(engine: Engine, value: float) -> float:
    """The largest of the ranks' values, by sums alone: in each of as many rounds as there are ranks, one rank says its own."""
    return max(engine.total(value if rank == engine.rank else 0.0) for rank in range(engine.world_size))


def _digest_of_rank_zero(digest: str, device: str) -> str:
    """`digest` of rank 0 on every rank, sent as bytes: collectives of objects would unpickle what they receive."""
    sent = torch.zeros(32, dtype=torch.uint8, device=device)
    if digest:
        sent.copy_(torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8))
    torch.distributed.broadcast(sent, src=0)
    return bytes(sent.tolist()).hex()


def _make_engine(checkpoint: Checkpoint, config: TrainingConfig) -> Engine:
    match config.engine:
        case TorchEngineConfig():
            from stages.training.torch_engine import TorchEngine

            return TorchEngine(checkpoint, config)
        case DeepSpeedEngineConfig():
            from stages.training.deepspeed_engine import DeepSpeedEngine

            return DeepSpeedEngine(checkpoint, config)
        case _ as unknown:
            assert_never(unknown)


def autocast(device: str, config: TrainingConfig) -> AbstractContextManager[Any]:
    """bfloat16 matrix products with float32 parameters, or float32 throughout."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=config.precision == "bf16")
