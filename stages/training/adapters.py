"""Train LoRA adapters through peft, and hold them in checkpoints (`stages/models/tensors.py` says how)."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.artifact import ArtifactError
from pipeline.config import ConfigError
from pipeline.diff import stored_tensors
from pipeline.store import current_store
from stages.models import (
    WEIGHTS,
    Checkpoint,
    load_model,
    load_weights,
    merged,
    model_weights,
    write_tensors,
)
from stages.models.folders import ADAPTER, ADAPTER_SETTINGS, BASE, FACTORS, is_adapted
from stages.training.config import LoRAConfig, TrainingConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_A, _B, _W = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer.weight"
_LAYER = ".base_layer"
"""How peft names things inside the module that takes a linear layer's place."""
_BASE_NAME = "base_model_name_or_path"


class Adapter(NamedTuple):
    """Describe the adapter of a model in an engine."""

    settings: Mapping[str, Any]
    """What adapter_config.json says."""
    continued: bool
    """Whether the checkpoint that was loaded had it; otherwise it is new there."""


def load_trainable(checkpoint: Checkpoint, config: TrainingConfig, dtype: torch.dtype) -> tuple[Any, Adapter | None]:
    """Load the checkpoint as a model to train or, frozen, to compare with; with adapter layers where the config asks for them.

    The same function makes policy and reference, so that a checkpoint is computed alike as either and their KL is exactly 0.

    Raises:
        ConfigError: peft is not installed, a target module does not exist or cannot be adapted, or the model is no causal
            language model.
    """
    if config.adapter is None:
        return _load(checkpoint, config, dtype), None
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "training.adapter: peft is not installed; pip install 'cohort-rl[lora]', or set adapter to null"
        )
    import peft

    model = _load(checkpoint, config, dtype)
    settings = adapter_settings(model, config.adapter)
    peft.inject_adapter_in_model(peft.LoraConfig(**settings), model)
    return model.eval(), _fill(model, checkpoint, settings, config.adapter.seed)


def _load(checkpoint: Checkpoint, config: TrainingConfig, dtype: torch.dtype) -> Any:
    from stages.training.forward import keep_float32_logits
    from stages.training.sharing import share_prompts

    model = load_model(checkpoint, dtype=dtype, attention=config.attention_kind)
    if config.float32_logits:
        keep_float32_logits(model)
    if config.share_prompts:
        share_prompts(model)
    return model


def reload_trainable(
    model: Any, adapter: Adapter | None, checkpoint: Checkpoint, config: TrainingConfig
) -> Adapter | None:
    """Overwrite what `load_trainable` made for this config, in place, with another checkpoint of the architecture."""
    if adapter is None or config.adapter is None:
        load_weights(model, checkpoint)
        return None
    load_weights(model, checkpoint, {_plain(name): tensor for name, tensor in _without_factors(model_weights(model))})
    settings = {name: value for name, value in adapter.settings.items() if name != _BASE_NAME}
    return _fill(model, checkpoint, settings, config.adapter.seed)


def _fill(model: Any, checkpoint: Checkpoint, settings: Mapping[str, Any], seed: int) -> Adapter:
    """Load the checkpoint's adapter, on its base, into a model that has its merged weights, or draw a new one."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    parameters = dict(model.named_parameters())
    stored = _settings_in(checkpoint.path)
    if stored is None or stored != {_BASE_NAME: stored[_BASE_NAME], **settings}:
        _draw(parameters, seed)
        return Adapter({**settings, _BASE_NAME: checkpoint.digest}, continued=False)
    folder = checkpoint.path / ADAPTER
    with safe_open(checkpoint.path / WEIGHTS if is_adapted(checkpoint.path) else folder / BASE, framework="pt") as base:
        for name, adapted in ((name, name.removesuffix(".weight") + _W) for name in base.keys()):  # noqa: SIM118 - not a mapping
            if adapted in parameters:
                parameters[adapted].data.copy_(base.get_tensor(name))
    factors = load_file(folder / FACTORS)
    for name, parameter in parameters.items():
        if name.endswith((_A, _B)):
            parameter.data.copy_(factors[_name_in_peft(name)])
    return Adapter(stored, continued=True)


def factors_on_base(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, Tensor] | None:
    """Return the factors of a checkpoint by their names in peft's files, where they are on the base of `adapter`, else None.

    The base itself has none.
    """
    from safetensors.torch import load_file

    if adapter.settings[_BASE_NAME] == checkpoint.digest:
        return {}
    if _settings_in(checkpoint.path) != adapter.settings:
        return None
    factors: dict[str, Tensor] = load_file(checkpoint.path / ADAPTER / FACTORS)
    return factors


@contextlib.contextmanager
def with_factors(model: nn.Module, factors: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a model other factors for the block (none: B = 0, the base), its own back afterwards."""
    named = [(name, tensor) for name, tensor in model.named_parameters() if name.endswith((_A, _B))]
    own = [tensor.data for _, tensor in named]
    try:
        for name, tensor in named:
            if factors:
                tensor.data = factors[_name_in_peft(name)].to(tensor.device)
            elif name.endswith(_B):
                tensor.data = tensor.data.new_zeros(tensor.shape)
        yield
    finally:
        for (_, tensor), data in zip(named, own, strict=True):
            tensor.data = data


def _draw(parameters: Mapping[str, Tensor], seed: int) -> None:
    """Draw A uniform and set B to zero; on the CPU, so that devices and ranks agree."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters.items():
        if name.endswith(_A):
            bound = parameter.shape[1] ** -0.5
            parameter.data.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        elif name.endswith(_B):
            parameter.data.zero_()


def merge(weights: Iterable[tuple[str, Tensor]], adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Yield the policy's weights under their plain names: W + s B A in float32 on the CPU, wherever they were trained.

    Of what is not merged yet, the parts of a layer are held until all three came.
    """
    parts: dict[str, Tensor] = {}
    for name, tensor in weights:
        layer, part = next(((name.removesuffix(part), part) for part in (_A, _B, _W) if name.endswith(part)), ("", ""))
        if not part:
            yield _plain(name), tensor
            continue
        parts[name] = tensor.detach().float().cpu()
        if all(layer + part in parts for part in (_A, _B, _W)):
            a, b, w = (parts.pop(layer + part) for part in (_A, _B, _W))
            yield f"{layer}.weight", merged(w, a, b, adapter.settings)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Return the plain names of weights, each with the name that the model with adapter layers has for it."""
    return {_plain(name): name for name in names if not name.endswith((_A, _B))}


def write_adapter_state(
    folder: Path, weights: Mapping[str, Tensor], adapter: Adapter, previous: Checkpoint | None
) -> None:
    """Write the weights of a checkpoint: those of the base, and `adapter/`.

    Args:
        weights: of the model with its adapter layers, by name.
        previous: an earlier checkpoint, whose weights are shared where they are the base's.
    """
    target = folder / ADAPTER
    target.mkdir()
    (target / ADAPTER_SETTINGS).write_text(_as_text(adapter.settings))
    factors = {_name_in_peft(name): tensor for name, tensor in weights.items() if name.endswith((_A, _B))}
    write_tensors(target / FACTORS, factors)
    base = {_plain(name): tensor for name, tensor in _without_factors(weights)}
    if not _shared(previous, adapter, base, folder / WEIGHTS):
        write_tensors(folder / WEIGHTS, base)


def _shared(previous: Checkpoint | None, adapter: Adapter, base: Mapping[str, Tensor], target: Path) -> bool:
    """Link `target` to the weights of `previous`, or of the base itself; False where both are freed or others, or far away.

    Nothing that is not there is made again: this runs in the thread of the writer.
    """
    wanted = {name: ("F32", tuple(tensor.shape)) for name, tensor in base.items()}
    for name in (*(() if previous is None else (previous.digest,)), adapter.settings[_BASE_NAME]):
        folder = current_store().folder(name)
        with contextlib.suppress(OSError):
            if is_adapted(folder):
                same = _settings_in(folder) == adapter.settings
            else:  # the base itself, where it is one file of float32
                kinds = {each: (tensor.kind, tensor.shape) for each, tensor in stored_tensors(folder).items()}
                same = name == adapter.settings[_BASE_NAME] and kinds == wanted
            if same:
                os.link(folder / WEIGHTS, target)
                return True
    return False


def adapter_base(checkpoint: Checkpoint) -> str | None:
    """Return the digest of the checkpoint on which the adapter was begun; None where there is no adapter."""
    settings = _settings_in(checkpoint.path)
    return None if settings is None else str(settings[_BASE_NAME])


def write_adapter(checkpoint: Checkpoint, folder: Path, *, base: str | None = None) -> None:
    """Write only the adapter, as `PeftModel.from_pretrained(base_model, folder)` reads it.

    Args:
        folder: an existing folder.
        base: name or path of the base model, for adapter_config.json; None leaves the base's digest.

    Raises:
        ArtifactError: the checkpoint has no adapter.
    """
    settings = _settings_in(checkpoint.path)
    if settings is None:
        raise ArtifactError(
            f"{checkpoint} has no adapter: it was trained in full (training.adapter null); export it as a model"
        )
    described = {**settings, _BASE_NAME: base or settings[_BASE_NAME]}
    (folder / ADAPTER_SETTINGS).write_text(_as_text(described))
    shutil.copyfile(checkpoint.path / ADAPTER / FACTORS, folder / FACTORS)  # without the read-only mode of the store


def _settings_in(folder: Path) -> dict[str, Any] | None:
    file = folder / ADAPTER / ADAPTER_SETTINGS
    settings: dict[str, Any] | None = json.loads(file.read_text()) if file.exists() else None
    return settings


def _as_text(settings: Mapping[str, Any]) -> str:
    # Not by peft, which writes its version, and target modules in the order of a set: equal adapters must have equal bytes.
    return json.dumps(dict(settings), indent=1, sort_keys=True) + "\n"


def _without_factors(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in weights.items() if not name.endswith((_A, _B)))


def _plain(name: str) -> str:
    """Return the name a weight has without adapters."""
    return name.replace(f"{_LAYER}.", ".")


def _name_in_peft(name: str) -> str:
    """Return the name a factor has in peft's files."""
    return "base_model.model." + name.replace(".default.", ".")


def adapter_settings(model: Any, config: LoRAConfig) -> dict[str, Any]:
    """Return adapter_config.json for a model, but for the base's name; also the arguments of peft's `LoraConfig`.

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
    """Return the full names of the layers to adapt."""
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
