"""Which layers of a model an adapter changes: all linear ones but the output head, or those that are named."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.config import ConfigError
from stages.training.config import LoRAConfig

if TYPE_CHECKING:
    from torch import nn

__all__ = ["adapter_settings"]


def adapter_settings(model: Any, config: LoRAConfig) -> dict[str, Any]:
    """adapter_config.json for a model, but for the base's name; also the arguments of peft's `LoraConfig`.

    Raises:
        ConfigError: a target module that does not exist or cannot be adapted, or a model that is no causal language model.
    """
    from transformers.pytorch_utils import Conv1D

    chosen = _targets(model, config)
    transposed = {isinstance(model.get_submodule(name), Conv1D) for name in chosen}
    if len(transposed) > 1:
        raise ConfigError(
            "training.adapter.target_modules: Linear and Conv1D layers cannot be adapted together; name one kind"
        )
    endings = {name.rsplit(".", 1)[-1] for name in chosen}
    alike = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in endings}
    return {
        "bias": "none",
        "fan_in_fan_out": transposed == {True},
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": config.r,
        "target_modules": sorted(endings if alike == chosen else chosen),
        "task_type": "CAUSAL_LM",
        "use_rslora": config.scaling == "rslora",
    }


def _targets(model: Any, config: LoRAConfig) -> set[str]:
    """Full names of the layers to adapt."""
    head = model.get_output_embeddings()
    if head is None:
        raise ConfigError(
            f"training.adapter: {type(model).__name__} is no causal language model; critics and reward models learn a new head "
            "and are trained in full, set adapter to null"
        )
    linear = dict(_linear_layers(model))
    if config.target_modules == "all-linear":
        return {name for name, module in linear.items() if module is not head}
    chosen: set[str] = set()
    for target in config.target_modules:
        named = {name for name in linear if name == target or name.endswith(f".{target}")}
        if not named or any(linear[name] is head for name in named):
            raise ConfigError(_complaint(target, model, linear, head))
        chosen |= named
    return chosen


def _linear_layers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


def _complaint(target: str, model: Any, linear: Mapping[str, nn.Module], head: nn.Module) -> str:
    known = sorted({name.rsplit(".", 1)[-1] for name, module in linear.items() if module is not head})
    names = [name for name, _ in model.named_modules()]
    if any(name == target or name.endswith(f".{target}") for name in names):
        reason = "is not a linear layer below the output head"
    else:
        near = difflib.get_close_matches(target, known, n=1, cutoff=0.5)
        reason = "does not exist" + (f"; did you mean {near[0]!r}?" if near else "")
    return f"training.adapter.target_modules: {target!r} {reason}; {type(model).__name__} has {', '.join(known)}"
