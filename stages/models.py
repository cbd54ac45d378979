"""Checkpoints: a Hugging Face folder with tokenizer and, when trained, optimizer state. Safetensors and JSON only.

`model.safetensors` holds the float32 masters: what training changed by 1e-6 is in the file, and loaders cast. Reading a
checkpoint never runs code: no pickle, `trust_remote_code=False`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import ArtifactError, Folder
from pipeline.config import Config
from pipeline.stage import stage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "Checkpoint",
    "ExternalCheckpointConfig",
    "copy_description",
    "import_checkpoint",
    "load_model",
    "load_optimizer_state",
    "load_tokenizer",
    "load_trainer_state",
    "load_weights",
    "model_weights",
    "save",
    "write_tensors",
]

WEIGHTS = "model.safetensors"
WEIGHT_INDEX = "model.safetensors.index.json"
OPTIMIZER = "optimizer.safetensors"
TRAINER = "trainer_state.json"
_TRAINED = (OPTIMIZER, TRAINER, "sft_curve.json")
"""Files that belong to one state of the weights and do not follow to the next."""
_HEADS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
}
"""How the name of an architecture ends, and the class of transformers that loads such a model."""
_SEAL = "manifest.json"
"""The store's own file in a checkpoint: a checkpoint of one store may be imported into another."""
_DESCRIPTION_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class Checkpoint(Folder):
    """A model, its tokenizer and, when it was trained, what training needs to continue bit for bit."""


# ------------------------------------------------------------------------------------------------ reading


def load_model(checkpoint: Checkpoint, *, dtype: torch.dtype, attention: str = "eager") -> PreTrainedModel:
    """The model in evaluation mode (no dropout: ratios must be exactly 1), its weights cast to `dtype`.

    Which head it has, the checkpoint's own `architectures` say: a policy's (causal language model, also where they are
    absent), a critic's (token classification) or a reward model's (sequence classification).

    Raises:
        ArtifactError: a head of another kind, or weights that do not fit the architecture, by name; they would otherwise be
            drawn at random.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model, found = _auto_class(checkpoint).from_pretrained(
        checkpoint.path,
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    wrong = {kind: sorted(map(str, found[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise ArtifactError(f"{checkpoint}: weights do not fit the architecture: {_shown(wrong)}")
    return model.eval()


def _auto_class(checkpoint: Checkpoint) -> Any:
    """What loads the head that config.json names."""
    import transformers

    file = checkpoint.path / "config.json"
    names = json.loads(file.read_text()).get("architectures") or ["ForCausalLM"]
    for ending, auto_class in _HEADS.items():
        if names[0].endswith(ending):
            return getattr(transformers, auto_class)
    raise ArtifactError(
        f"{checkpoint}: config.json names the architecture {names[0]}; expected one that ends in {', '.join(_HEADS)}; "
        "convert the model to one of these"
    )


def load_weights(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Overwrite the weights of `model` in place, each cast to the dtype it has there; tied weights follow their twin.

    Raises:
        ArtifactError: names or shapes that differ from the model's.
    """
    import torch
    from safetensors import safe_open

    targets = model_weights(model)
    left = set(targets)
    for file in weight_files(checkpoint.path):
        with safe_open(file, framework="pt") as tensors, torch.no_grad():
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                if name not in targets:
                    if name in model.state_dict():
                        continue  # a stored copy of a tied weight
                    raise ArtifactError(f"{checkpoint}: weight {name} is not in the model")
                stored = tensors.get_tensor(name)
                if stored.shape != targets[name].shape:
                    shapes = f"{tuple(stored.shape)} stored, {tuple(targets[name].shape)} in the model"
                    raise ArtifactError(f"{checkpoint}: weight {name}: {shapes}")
                targets[name].copy_(stored)
                left.discard(name)
    if left:
        raise ArtifactError(f"{checkpoint}: no weights for {', '.join(sorted(left)[:5])}")


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerFast:
    """The tokenizer stored beside the weights."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)


def load_optimizer_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Optimizer state as `<parameter name>/<slot>`; empty where the checkpoint has none."""
    from safetensors.torch import load_file

    file = checkpoint.path / OPTIMIZER
    state: dict[str, torch.Tensor] = load_file(file) if file.exists() else {}
    return state


def load_trainer_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Counters of the trainer (`updates`, `skipped`, `optimizer`); empty where the checkpoint has none."""
    file = checkpoint.path / TRAINER
    state: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return state


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights: one, or the shards that an index names.

    Raises:
        ArtifactError: no weights, or a shard that the index names and the folder lacks.
    """
    index = folder / WEIGHT_INDEX
    if index.exists():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for shard in shards:
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise ArtifactError(f"{folder}: shard {shard} is named by {WEIGHT_INDEX} but missing; copy it again")
        return [folder / shard for shard in shards]
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
        if pickles:
            raise ArtifactError(f"{folder}: {pickles[0]} is a pickle and refused; convert it to {WEIGHTS}")
        raise ArtifactError(f"{folder}: missing {WEIGHTS}")
    return [folder / WEIGHTS]


# ------------------------------------------------------------------------------------------------ writing


def save(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, eos_token_ids: list[int] | None = None
) -> None:
    """Write a model that was just made, as float32, with its tokenizer; for `Checkpoint.write(lambda folder: ...)`."""
    model.config.architectures = [
        type(model).__name__
    ]  # as `save_pretrained` of the model would: how it is loaded again
    model.config.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)  # only where the head generates
    if generation is not None:
        generation.eos_token_id = generation.eos_token_id if eos_token_ids is None else eos_token_ids
        generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_tensors(folder / WEIGHTS, model_weights(model))


def model_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, a tied weight once, under the name of its first owner."""
    weights: dict[str, torch.Tensor] = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    weights |= {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return weights


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors on the CPU, floating ones as float32; equal tensors make equal bytes."""
    from safetensors.torch import save_file

    def plain(tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor.detach()
        return (kept.float() if kept.is_floating_point() else kept).cpu().contiguous()

    save_file({name: plain(tensor) for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def copy_description(source: Path, target: Path) -> None:
    """Copy what describes a model and does not change with training: configuration and tokenizer."""
    skipped = {*_TRAINED, WEIGHT_INDEX, _SEAL}
    for file in sorted(source.iterdir()):
        if file.suffix in _DESCRIPTION_SUFFIXES and file.name not in skipped:
            shutil.copyfile(file, target / file.name)  # without the read-only mode of the store


# ------------------------------------------------------------------------------------------------ importing


class ExternalCheckpointConfig(Config):
    """A Hugging Face folder outside the store."""

    path: Path
    """Folder with config.json, safetensors and tokenizer files, as `save_pretrained` or a download leaves it."""

    def key(self) -> dict[str, Any]:
        """The content decides, not the place."""
        return {file.name: _sha256(file) for file in _checked_files(self.path)}


@stage(version="1")
def import_checkpoint(config: ExternalCheckpointConfig) -> Checkpoint:
    """Copy a model folder into the store, as it is; weights are cast when they are loaded.

    Raises:
        ArtifactError: a missing configuration, shard or tokenizer, or weights that are pickles, by file name.
    """
    files = _checked_files(config.path)

    def fill(folder: Path) -> None:
        for file in files:
            shutil.copyfile(file, folder / file.name)

    return Checkpoint.write(fill)


def _checked_files(folder: Path) -> list[Path]:
    """Files of the folder that make a checkpoint; whatever could run code is left behind."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; expected config.json, {WEIGHTS} and a tokenizer in it")
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"{folder}: missing config.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ArtifactError(f"{folder}: missing tokenizer.json")
    described = [f for f in folder.iterdir() if f.suffix in _DESCRIPTION_SUFFIXES and f.name not in (*_TRAINED, _SEAL)]
    return sorted({*described, *weight_files(folder)})


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _shown(wrong: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{kind.removesuffix('_keys')} {names[:5]}" for kind, names in wrong.items() if names)
