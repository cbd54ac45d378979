"""The seam between training loops and what runs them: one Protocol, plain torch and DeepSpeed behind it.

An engine is a cache of a checkpoint, not state: `holds` names the checkpoint whose weights and optimizer state it has right
now, and everything it knows can be loaded again from there, bit for bit, or replayed where that was not written.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from pipeline.derivation.materialise import write_payload
from pipeline.store import StoreError, current_store
from pipeline.store.files import free_bytes
from stages.models import WEIGHTS, Checkpoint, copy_weights, model_weights, read_description, tensor_file
from stages.training.adapters import Adapter, merge, plain_names
from stages.training.config import TrainingConfig
from stages.training.hardware import training_device
from stages.training.optimizers import TrainerState, write_checkpoint


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
    """Run forward, backward and step of one model, as the only process or as one of several ranks that share the rows.

    Ranks act in lockstep: each makes equally many forward passes with `backward`, and each calls `step`, `load`, `save` and
    `total` in the same order. A rank with fewer micro-batches than another forwards any batch and multiplies its loss by 0.
    """

    model: Any
    """Call it (under `autocast()`) with input_ids, attention_mask and position_ids; has an output head."""
    device: str
    """Where batches belong."""
    max_logits: int | None
    """Logits to have at a time in a forward pass (`TrainingConfig.max_logits`)."""
    holds: str | None
    """`Artifact.state` of the checkpoint it is equal to; None once anything changed."""
    skipped: int
    """Steps skipped because of a gradient that was not finite, since training began."""
    rank: int
    """Which of the ranks this process is; rank 0 writes files."""
    world_size: int
    """How many ranks there are; 1 where one process trains."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context for forward passes, with and without gradient."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of `loss`, summed over micro-batches and ranks, never averaged.

        Args:
            loss: already divided by the count of the whole batch, over all micro-batches and ranks.
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

    def hold(self, checkpoint: Checkpoint, state: str | None) -> None:
        """Note that it was published as the checkpoint.

        Args:
            state: `Artifact.state` of what was published; None: less than it has.
        """
        ...

    def describe(self, folder: Path) -> None:
        """Write what describes the checkpoint and does not change with training; only rank 0 calls it."""
        ...

    def snapshot(self) -> Callable[[Path], None]:
        """Return what writes the checkpoint as it is now, from a copy in memory; every rank takes part in gathering."""
        ...

    def save(self, folder: Path, *, optimizer: bool = True) -> None:
        """Write a complete checkpoint: description, float32 masters and (unless left out) the optimizer's state.

        Every rank takes part in gathering what is partitioned; only rank 0 writes.
        """
        ...

    def total(self, value: float) -> float:
        """Sum a number over the ranks: each rank's part of a loss, for example."""
        ...


class CheckpointedEngine:
    """Keep what the engines share: counters, the checkpoint they hold, and what is written of them."""

    model: Any
    rank = 0
    world_size = 1
    _adapter: Adapter | None
    _description: Mapping[str, bytes]
    _previous: Checkpoint
    """The checkpoint with weights that training went on from last."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self.device = training_device()
        self.max_logits = config.max_logits
        self.holds: str | None = None
        self.skipped = self._updates = self._in_a_row = 0
        self._losses: list[Tensor] = []
        """Of this rank's micro-batches since the last step."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context for forward passes of this and of other models."""
        return autocast(self.device, self._config)

    def total(self, value: float) -> float:
        """Return the value itself: there is one rank."""
        return value

    def hold(self, checkpoint: Checkpoint, state: str | None) -> None:
        """Note which checkpoint the engine was published as, and the name of its state where that is all of it."""
        self.holds = state
        if checkpoint.content is not None:
            self._previous = checkpoint

    def save(self, folder: Path, *, optimizer: bool = True) -> None:
        """Write a complete checkpoint, gathered from all partitions; on a rank other than 0 only take part in that."""
        weights = {name: tensor.detach().cpu() for name, tensor in self._weights() if self.rank == 0}
        self._writer(weights, self._moments() if optimizer else None)(folder)

    def snapshot(self) -> Callable[[Path], None]:
        """Return what writes the checkpoint as it is now, from a copy in memory, whatever the engine becomes."""
        copies = [
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors if self.rank == 0}
            for tensors in (self._weights(), self._moments().items())
        ]
        return self._writer(*copies)

    def has(self, state: str) -> bool:
        """Return whether it holds a state (`Holder`)."""
        return self.holds == state

    def write(self, name: str) -> None:
        """Write what the engine holds as the artifact `name`, of which only the description is in the store."""
        if self.rank == 0:
            write_payload(current_store(), name, self.save)
        else:
            self.save(Path())

    def hand_over(self, name: str, folder: Path, *, half: bool) -> None:
        """Write the weights of the artifact `name`, which the engine holds, into a folder; all ranks take part.

        They go straight into the file, one at a time: partitioned ones are nowhere whole.

        Args:
            half: as bfloat16, not float32.

        Raises:
            StoreError: they do not fit there.
        """
        targets, complaint = {}, ""
        if self.rank == 0:
            try:
                targets = tensor_file(folder / WEIGHTS, self._shapes(), half=half, room=free_bytes(folder))
            except StoreError as error:
                complaint = str(error)
        if self.total(float(bool(complaint))):  # else the others would wait for a rank that gathers nothing
            raise StoreError(complaint or "the first rank has no room for the weights")
        if self.rank == 0:
            copy_weights(targets, self.weights())
        else:
            collections.deque(self._weights(), maxlen=0)

    def describe(self, folder: Path) -> None:
        """Write what describes the checkpoint, as links to the files of the one before where they are there."""
        before = current_store().folder(self._previous.digest)
        for name, content in self._description.items():
            with contextlib.suppress(OSError):
                if (before / name).read_bytes() == content:
                    os.link(before / name, folder / name)
                    continue
            (folder / name).write_bytes(content)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of the checkpoint by name: of the plain model, whatever they are trained as."""
        return self._weights() if self._adapter is None else merge(self._weights(), self._adapter)

    def _shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return types and shapes of what `weights` yields, without gathering anything."""
        own = model_weights(getattr(self.model, "module", self.model))
        names = dict(zip(own, own, strict=True)) if self._adapter is None else plain_names(own)
        return {
            plain: (own[name].dtype, tuple(getattr(own[name], "ds_shape", own[name].shape)))
            for plain, name in names.items()
        }

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of the model in the engine by name; where they are partitioned, all ranks take all of them."""
        yield from model_weights(self.model).items()

    def _moments(self) -> Mapping[str, Tensor]:
        """Return the optimizer's state by name; where it is partitioned, all ranks call it."""
        raise NotImplementedError

    def _take_over(self, checkpoint: Checkpoint, state: TrainerState) -> None:
        """Take over the counters of a checkpoint whose weights and moments the engine has now."""
        self._description = read_description(checkpoint.path)
        self._updates, self.skipped, self._in_a_row = state.updates, state.skipped, state.skipped_in_a_row
        self._losses = []
        self.hold(checkpoint, checkpoint.state)

    def _stepped(self, norm: float, rate: float, *, skipped: bool, gradient: str) -> StepReport:
        """Count a step; stop where too many were skipped, as `check_skipped`."""
        self._updates += not skipped
        self.skipped += skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        check_skipped(self, self._in_a_row, self._config.max_skipped_steps, self._losses, gradient)
        self._losses.clear()
        return StepReport(grad_norm=norm, learning_rate=rate, skipped=skipped)

    def _writer(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor] | None) -> Callable[[Path], None]:
        """Return what writes a complete checkpoint; without counters and moments where `moments` is None."""
        if self.rank > 0:
            return lambda folder: None
        return functools.partial(
            write_checkpoint,
            description=self._description,
            weights=weights,
            state=None if moments is None else TrainerState(self._updates, self.skipped, moments, self._in_a_row),
            config=self._config,
            adapter=self._adapter,
            previous=self._previous,
        )


def check_skipped(
    engine: Engine | CheckpointedEngine, in_a_row: int, limit: int | None, losses: Sequence[Tensor], gradient: str
) -> None:
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
    """Return the largest of the ranks' values, by sums: one round for each rank, to which only that rank contributes."""
    return max(engine.total(value if rank == engine.rank else 0.0) for rank in range(engine.world_size))


def autocast(device: str, config: TrainingConfig) -> AbstractContextManager[Any]:
    """Return a context of bfloat16 matrix products with float32 parameters, or of float32 throughout."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=config.bf16)


def checkpoint_activations(model: nn.Module, *, reentrant: bool = False) -> None:
    """Make every layer of `model` recompute its inside in backward.

    transformers' own switch acts in training mode only, which would bring dropout with it: ratios must be exactly 1. Without
    dropout nothing is random, so no state of random numbers is kept.

    Args:
        reentrant: make backward of a layer a graph of its own. ZeRO 3 needs it: its hooks gather partitioned parameters for the
            graph they were set in, and recomputation releases them again.

    Raises:
        ValueError: an architecture whose layers transformers does not mark as ones that can be recomputed.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"training.activation_checkpointing: {type(model).__name__} has no layers that transformers can recompute; "
            "set it to false"
        )
    for layer in layers:
        module: Any = layer
        module.forward = functools.partial(_recomputed, layer.forward, reentrant)


def _recomputed(forward: Callable[..., Any], reentrant: bool, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    inside = functools.partial(forward, **kwargs)
    return recompute(inside, *args, use_reentrant=reentrant, preserve_rng_state=False)
