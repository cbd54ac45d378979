"""The files of a model folder: which of them hold weights, which describe a model, which follow it, which stay behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

from pipeline.artifact import ArtifactError
from stages.faithful_tokenizers import settle_tokenizer
from stages.trusted_code import RECORD, code_files, is_trusted, require_known, trust_code

__all__ = [
    "OPTIMIZER",
    "TRAINER",
    "WEIGHTS",
    "WEIGHT_INDEX",
    "copy_description",
    "copy_model",
    "model_files",
    "read_description",
    "weight_files",
]

WEIGHTS: Final = "model.safetensors"
WEIGHT_INDEX: Final = "model.safetensors.index.json"
OPTIMIZER: Final = "optimizer.safetensors"
TRAINER: Final = "trainer_state.json"
_TRAINED: Final = (OPTIMIZER, TRAINER, "sft_curve.json")
"""Files that belong to one state of the weights and do not follow to the next."""
_SEAL: Final = ("manifest.json", "pruned.json")
"""The store's own files in a checkpoint: a checkpoint of one store may be imported into another."""
_DESCRIPTION_SUFFIXES: Final = (".json", ".txt", ".model", ".jinja")
_PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def model_files(folder: Path) -> list[Path]:
    """Files of the folder that make a checkpoint; whatever could run code is left behind, and who says that it may."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; expected config.json, {WEIGHTS} and a tokenizer in it")
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"{folder}: missing config.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ArtifactError(f"{folder}: missing tokenizer.json")
    left = (*_TRAINED, *_SEAL, RECORD)
    described = [f for f in folder.iterdir() if f.suffix in _DESCRIPTION_SUFFIXES and f.name not in left]
    return sorted({*described, *weight_files(folder)})


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


def copy_model(source: Path, target: Path, *, pin: str | None, setting: str, name: str = "") -> None:
    """Make a model folder of others a checkpoint.

    Args:
        pin: what its own code was pinned by; None: none of it is copied.
        setting: what would allow its code, for the message where it needs some.
        name: how to call the model; its folder unless given.

    Raises:
        ArtifactError: as `import_checkpoint`.
    """
    files = model_files(source)
    if pin is None:
        require_known(source, setting=setting, name=name or str(source))
    else:
        trust_code(source, target, pin=pin, name=name or str(source))
    for file in files:
        shutil.copyfile(file, target / file.name)
    settle_tokenizer(target)


def read_description(folder: Path) -> dict[str, bytes]:
    """What describes a model and does not change with training, by file name: configuration, tokenizer, trusted code."""
    skipped = {*_TRAINED, WEIGHT_INDEX, *_SEAL, RECORD}
    files = [f for f in folder.iterdir() if f.suffix in _DESCRIPTION_SUFFIXES and f.name not in skipped]
    if is_trusted(folder):
        files += [*code_files(folder), folder / RECORD]
    return {file.name: file.read_bytes() for file in sorted(files)}


def copy_description(source: Path, target: Path) -> None:
    """Copy what describes a model to another state of its weights."""
    for name, content in read_description(source).items():
        (target / name).write_bytes(content)  # without the read-only mode of the store
