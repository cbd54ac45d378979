"""Make optimizers over named parameters, their schedule, and their state: kept by parameter name, restored by any engine."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from stages.kernels.head import Float32Head
from stages.kernels.muon import orthogonalise
from stages.models import (
    OPTIMIZER,
    TRAINER,
    WEIGHTS,
    Checkpoint,
    load_optimizer_state,
    load_trainer_state,
    write_tensors,
)
from stages.training.adapters import Adapter, adapter_base, write_adapter_state
from stages.training.config import AdamWConfig, MuonConfig, TrainingConfig


def build_optimizer(model: nn.Module, config: AdamWConfig | MuonConfig) -> torch.optim.Optimizer:
    """Return the configured optimizer over the parameters of `model` that are trained."""
    match config:
        case AdamWConfig():
            return _adamw(_decay_groups(trainable(model).values(), config), config)
        case MuonConfig():
            return _MuonWithAdamW(model, config)
        case _ as unknown:
            assert_never(unknown)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name: all, or those of an adapter."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_values(model: nn.Module) -> int:
    """Count the numbers that are trained, over all ranks: parameters that ZeRO 3 partitions count whole."""
    return sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in trainable(model).values())


def matrix_names(model: nn.Module) -> set[str]:
    """Return the names of the hidden layers' matrices: two-dimensional, and neither embedding nor output head."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables |= {id(parameter) for head in heads(model) for parameter in head.parameters()}
    return {name for name, tensor in model.named_parameters() if tensor.ndim == 2 and id(tensor) not in tables}


def heads(model: nn.Module) -> list[nn.Module]:
    """Return the output head, or that of scores or classes."""
    find_head: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    found = (find_head(), getattr(model, "score", None), getattr(model, "classifier", None))
    return [head for head in found if head is not None]


def rounded_by_autocast(model: nn.Module, spared: Collection[nn.Module]) -> list[Tensor]:
    """Return the weights that are used under autocast only: those of linear layers, unless tied to another part.

    Args:
        spared: layers that compute outside of autocast.
    """
    layers = (module for module in model.modules() if isinstance(module, nn.Linear))
    linear = {layer for layer in layers if type(layer) in (nn.Linear, Float32Head)} - {*spared}
    others = (module for module in model.modules() if module not in linear)
    tied = {id(weight) for module in others for weight in module.parameters(recurse=False)}
    return [module.weight for module in linear if id(module.weight) not in tied]


def set_learning_rate(optimizer: Any, factor: float) -> float:
    """Give every group `factor` times its configured rate; return the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("configured_lr", group["lr"]) * factor
    rate: float = optimizer.param_groups[0]["lr"]
    return rate


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return every tensor of the optimizer's state as `<parameter name>/<slot>`."""
    return {
        f"{name}/{slot}": tensor
        for name, parameter in model.named_parameters()
        for slot, tensor in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Make the optimizer's state a copy of `state`, bit for bit; parameters that `state` does not name have none."""
    optimizer.state.clear()
    parameters = dict(model.named_parameters())
    for key, tensor in state.items():
        name, slot = key.rsplit("/", 1)
        if name not in parameters:
            raise ValueError(f"optimizer state {key!r} belongs to no parameter of the model")
        # Fused AdamW keeps its step count on the device of the parameter.
        optimizer.state[parameters[name]][slot] = tensor.to(parameters[name].device, copy=True)


def _decay_groups(parameters: Iterable[Tensor], config: AdamWConfig) -> list[dict[str, Any]]:
    """Return one parameter group, or a second one with the norms and biases that are spared the decay."""
    given = list(parameters)
    if config.weight_decay == 0 or config.decayed == "all":
        return [{"params": given}]
    matrices, vectors = ([tensor for tensor in given if (tensor.ndim >= 2) is is_matrix] for is_matrix in (True, False))
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _adamw(groups: list[dict[str, Any]], config: AdamWConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


class _Muon(torch.optim.Muon):
    """Run `torch.optim.Muon` with its orthogonalisation over all matrices of a shape at once, in float32 on a CPU.

    The update rule is the library's; only it calls Newton-Schulz in bfloat16, matrix by matrix.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            used = sorted((p for p in group["params"] if p.grad is not None), key=lambda p: tuple(p.shape))
            for _, alike in itertools.groupby(used, key=lambda p: tuple(p.shape)):
                self._step_alike(list(alike), group)

    def _step_alike(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov
        updates_NRC = orthogonalise(
            torch.stack(list(directions)),
            coefficients=group["ns_coefficients"],
            steps=group["ns_steps"],
            eps=group["eps"],
            dtype=torch.bfloat16 if parameters[0].is_cuda else torch.float32,
        )
        rate = group["lr"] * _shape_factor(group["adjust_lr_fn"], parameters[0].shape)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates_NRC), alpha=-rate)


def _shape_factor(scale: str, shape: torch.Size) -> float:
    rows, columns = shape
    return float(max(1.0, rows / columns) ** 0.5 if scale == "original" else 0.2 * max(rows, columns) ** 0.5)


class _MuonWithAdamW(torch.optim.Optimizer):
    """Let two optimizers share this one's groups and state, so that an engine sees a single optimizer."""

    def __init__(self, model: nn.Module, config: MuonConfig) -> None:
        names = matrix_names(model)
        matrices, rest = (
            [tensor for name, tensor in model.named_parameters() if (name in names) is is_matrix]
            for is_matrix in (True, False)
        )
        if not matrices:
            raise ValueError("optimizer muon: the model has no matrices in hidden layers")
        super().__init__([{"params": matrices}, *_decay_groups(rest, config.rest)], {})
        self._matrices = _Muon(
            self.param_groups[:1],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            adjust_lr_fn=config.scale,
        )
        self._rest = _adamw(self.param_groups[1:], config.rest)
        self._matrices.state = self._rest.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        self._matrices.step()
        self._rest.step()


def name_of_broken_gradient(model: nn.Module) -> str:
    """Return the first parameter whose gradient is not finite; empty where there is none."""
    named = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return next((name for name, gradient in named if gradient is not None and not gradient.isfinite().all()), "")


def clip_gradients(model: nn.Module, limit: float) -> float:
    """Return the global L2 norm of the gradient, after scaling it down to `limit` where it is larger and finite (0: never)."""
    parameters = list(model.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    value = norm.item()
    if 0 < limit < value < math.inf:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return value


def learning_rate_factor(updates: int, config: TrainingConfig) -> float:
    """Return the factor for the update that follows `updates` applied ones: linear warm-up, then the schedule.

    Counted in optimizer updates, never in micro-batches; skipped updates do not count.
    """
    if updates < config.warmup_steps:
        return (updates + 1) / config.warmup_steps
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            assert config.total_steps is not None  # the config demands it
            return max(0.0, (config.total_steps - updates) / (config.total_steps - config.warmup_steps))
        case _ as unknown:
            assert_never(unknown)


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """Hold the counters and moments of a training."""

    updates: int = 0
    """Optimizer updates applied; the schedule counts these."""
    skipped: int = 0
    """Steps skipped because of a gradient that was not finite."""
    optimizer: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """`<parameter name>/<slot>`; empty before the first update, and where moments are not kept."""
    skipped_in_a_row: int = 0
    """Of the skipped steps, those since the last update."""


def read_trainer_state(checkpoint: Checkpoint, config: TrainingConfig, adapter: Adapter | None) -> TrainerState:
    """Return what the checkpoint stores of a trainer: its counters, and moments as `TrainingConfig.optimizer_state` says.

    Args:
        adapter: what is trained in place of the weights.

    Raises:
        ValueError: moments to be carried are of another kind of optimizer, or of other trained parameters.
    """
    stored = load_trainer_state(checkpoint)
    state = TrainerState(
        stored.get("updates", 0), stored.get("skipped", 0), skipped_in_a_row=stored.get("skipped_in_a_row", 0)
    )
    # Without a kind of optimizer there are no moments: none were kept.
    if "optimizer" not in stored or config.optimizer_state == "none":
        return state
    objection = _objection(checkpoint, stored["optimizer"], config, adapter)
    if config.optimizer_state == "reset_once":
        begun = stored.get("optimizer_state") == "reset_once"
        return (
            dataclasses.replace(state, optimizer=load_optimizer_state(checkpoint)) if begun and not objection else state
        )
    if objection:
        raise ValueError(
            f"{checkpoint} holds the optimizer state of {objection}; set training.optimizer_state=reset_once to begin with "
            "fresh moments here and carry these from then on"
        )
    return dataclasses.replace(state, optimizer=load_optimizer_state(checkpoint))


def _objection(checkpoint: Checkpoint, kind: str, config: TrainingConfig, adapter: Adapter | None) -> str | None:
    """Say why the moments that a checkpoint holds cannot be those of what is trained; None where they can."""
    if kind != config.optimizer.kind:
        return f"{kind}, the config asks for {config.optimizer.kind}"
    continued = adapter_base(checkpoint) is None if adapter is None else adapter.continued
    if continued:
        return None
    trained = "all weights" if adapter_base(checkpoint) is None else "an adapter"
    asked = "all weights" if adapter is None else "an adapter" if trained == "all weights" else "another adapter"
    merged = "" if asked == "an adapter" else " (an adapter is then merged into the weights)"
    return f"{trained}, the config asks for training {asked}{merged}"


def write_checkpoint(
    folder: Path,
    *,
    description: Mapping[str, bytes],
    weights: Mapping[str, Tensor],
    state: TrainerState | None,
    config: TrainingConfig,
    adapter: Adapter | None,
    previous: Checkpoint | None,
) -> None:
    """Write weights, adapter, and `state` unless it is None, and the files that describe the model.

    Args:
        description: these files, by name (`read_description`); in memory, since the checkpoint they came with may be pruned
            by now.
        previous: the checkpoint that training went on from.
    """
    for name, content in description.items():
        (folder / name).write_bytes(content)
    if adapter is None:
        write_tensors(folder / WEIGHTS, weights)
    else:
        write_adapter_state(folder, weights, adapter, previous)
    if state is None:
        return
    counters: dict[str, int | str] = {"skipped": state.skipped, "updates": state.updates}
    if state.skipped_in_a_row:
        counters["skipped_in_a_row"] = state.skipped_in_a_row
    if config.optimizer_state != "none":
        write_tensors(folder / OPTIMIZER, state.optimizer)
        counters["optimizer"] = config.optimizer.kind
    if config.optimizer_state == "reset_once":
        counters["optimizer_state"] = "reset_once"
    (folder / TRAINER).write_text(json.dumps(counters, sort_keys=True) + "\n")
