"""The files of a model folder: which hold weights, which describe a model, which are copied."""

from __future__ import annotations

import contextlib
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pipeline.artifact import ArtifactError
from pipeline.store.files import is_plain_name
from pipeline.store.locks import locked, try_lock
from stages.models.trusted_code import code_files, copy_code, read_object, require_known
from stages.text import settle_tokenizer

WEIGHTS: Final = "model.safetensors"
WEIGHT_INDEX: Final = "model.safetensors.index.json"
OPTIMIZER: Final = "optimizer.safetensors"
TRAINER: Final = "trainer_state.json"
ADAPTER: Final = "adapter"
FACTORS: Final = "adapter_model.safetensors"
ADAPTER_SETTINGS: Final = "adapter_config.json"
BASE: Final = "base.safetensors"
_HANDED_OVER: Final = "cohort-weights-"
"""How the names of folders of `weights_folder` begin."""
_TRAINED: Final = (OPTIMIZER, TRAINER, "sft_curve.json")
"""Files that belong to one state of the weights and do not follow to the next."""
_SEAL: Final = ("manifest.json", "pruned.json")
"""The store's own files in a checkpoint: a checkpoint of one store may be imported into another."""
_DESCRIPTION_SUFFIXES: Final = (".json", ".txt", ".model", ".jinja")
_PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_DESCRIPTIONS: Final = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "chat_template.jinja",
        "chat_template.json",
    }
)
"""What comes in with a model of others. A pinned tokenizer of its own may read other files of `_DESCRIPTION_SUFFIXES`."""
_REPEATED: Final = re.compile(r"(^|_)(layers?|experts?|blocks?)$")
"""Names of settings that say how often a part of a model is built."""
_MOST: Final = 10_000
"""Of each; the deepest public models have about 200 layers, the widest about 500 experts."""
_UNWANTED: Final = (ADAPTER_SETTINGS, "trusted_code.json")


def is_adapted(folder: Path) -> bool:
    """Return whether the weights of a checkpoint's folder are those of a base, to which an adapter is to be added."""
    return (folder / ADAPTER / FACTORS).is_file() and not (folder / ADAPTER / BASE).exists()


@contextlib.contextmanager
def weights_folder(place: Path) -> Iterator[Path]:
    """Yield a new folder in a place that all processes share; those that killed processes left there are removed."""
    for name in {path.name.removesuffix(".lock") for path in place.glob(f"{_HANDED_OVER}*")}:
        with contextlib.suppress(OSError), try_lock(place / f"{name}.lock") as abandoned:  # another user's stays
            if abandoned:
                shutil.rmtree(place / name, ignore_errors=True)
    folder = place / f"{_HANDED_OVER}{uuid.uuid4().hex}"
    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(locked(place / f"{folder.name}.lock"))
        folder.mkdir(mode=0o700)
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def model_files(folder: Path, *, own_code: bool = False) -> list[Path]:
    """Return files of the folder that make a checkpoint; whatever could run code is left behind.

    Args:
        own_code: whether code of the model's own comes along, which may read files of other names.

    Raises:
        ArtifactError: what is needed is missing, or leads out of the folder.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; expected config.json, {WEIGHTS} and a tokenizer in it")
    if not (folder / "config.json").is_file():
        files = sorted(folder.glob("*.gguf"))
        raise ArtifactError(f"{folder}: missing config.json" + (f"; name the file itself: {files[0]}" if files else ""))
    require_buildable(read_object(folder / "config.json"), f"{folder}: config.json")
    if is_adapted(folder):
        raise ArtifactError(
            f"{folder}: a checkpoint of an adapter, with the weights of its base; expected a model. `cohort export` "
            "writes one, with merged weights"
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ArtifactError(f"{folder}: missing tokenizer.json")
    known = {name for name in _DESCRIPTIONS if (folder / name).is_file()}
    if own_code:
        left = (*_TRAINED, *_SEAL, *_UNWANTED, WEIGHT_INDEX)
        known |= {f.name for f in folder.iterdir() if _describes(f) and f.name not in left}
    if (folder / WEIGHT_INDEX).is_file():
        known.add(WEIGHT_INDEX)
    files = sorted({*(folder / name for name in known), *weight_files(folder)})
    for file in files:
        _require_inside(folder, file)
    return files


def _describes(file: Path) -> bool:
    return file.suffix in _DESCRIPTION_SUFFIXES and file.is_file()


def _require_inside(folder: Path, file: Path) -> None:
    """Refuse a link that leads out of a model folder; the hub's cache has its files in `blobs` next to all snapshots."""
    home, place = folder.resolve(), file.resolve()
    allowed = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    if not any(place.is_relative_to(root) for root in allowed):
        raise ArtifactError(f"{file}: a link that leads out of the model folder, to {place}; put the file itself there")


def require_buildable(described: Mapping[str, Any], source: str) -> None:
    """Refuse a model of so many parts that building its skeleton, without any weights, would not end.

    Raises:
        ArtifactError: names the setting.
    """
    for name, value in described.items():
        if isinstance(value, Mapping):
            require_buildable(value, source)
        elif _REPEATED.search(name) and isinstance(value, int | float) and value > _MOST:
            raise ArtifactError(
                f"{source}: {name}: expected at most {_MOST:,}, found {value!r:.40}; no model is that deep"
            )


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold the weights: one, or the shards that an index names.

    Raises:
        ArtifactError: no weights, a shard that the index names and the folder lacks, or one that is no safetensors file.
    """
    if (folder / WEIGHT_INDEX).exists():
        return [folder / shard for shard in _indexed(folder)]
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
        if pickles:
            raise ArtifactError(f"{folder}: {pickles[0]} is a pickle and refused; convert it to {WEIGHTS}")
        raise ArtifactError(f"{folder}: missing {WEIGHTS}")
    return [folder / WEIGHTS]


def _indexed(folder: Path) -> list[str]:
    """Return the names in the index: files of the folder, and nothing else than weights."""
    mapping = read_object(folder / WEIGHT_INDEX).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise ArtifactError(f"{folder}: {WEIGHT_INDEX} has no weight_map; copy it again")
    for shard in mapping.values():
        plain = is_plain_name(shard) and "/" not in shard and shard != OPTIMIZER
        if not plain or not shard.endswith(".safetensors"):
            raise ArtifactError(
                f"{folder}: {WEIGHT_INDEX} names {shard!r:.80} as weights; expected names of .safetensors files of the model"
            )
        if not (folder / shard).is_file():
            raise ArtifactError(f"{folder}: shard {shard} is named by {WEIGHT_INDEX} but missing; copy it again")
    return sorted(set(mapping.values()))


def copy_model(source: Path, target: Path, *, pin: str | None, setting: str, name: str = "") -> None:
    """Make a model folder of others a checkpoint.

    Args:
        pin: what its own code was pinned by; None: none of it is copied.
        setting: what would allow its code, for the message where it needs some.
        name: how to call the model; its folder unless given.

    Raises:
        ArtifactError: as `import_checkpoint`.
    """
    files = model_files(source, own_code=pin is not None)
    if pin is None:
        require_known(source, setting=setting, name=name or str(source))
    else:
        copy_code(source, target, name=name or str(source))
    for file in files:
        shutil.copyfile(file, target / file.name)
    settle_tokenizer(target)


def read_description(folder: Path) -> dict[str, bytes]:
    """Return what describes a model and does not change with training, by file name: configuration, tokenizer, its own code."""
    skipped = {*_TRAINED, WEIGHT_INDEX, *_SEAL, *_UNWANTED}
    files = [f for f in folder.iterdir() if _describes(f) and f.name not in skipped]
    return {file.name: file.read_bytes() for file in sorted([*files, *code_files(folder)])}


def copy_description(source: Path, target: Path) -> None:
    """Copy what describes a model to another state of its weights."""
    for name, content in read_description(source).items():
        (target / name).write_bytes(content)  # without the read-only mode of the store
