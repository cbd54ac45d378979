"""The files of a model folder: which hold weights, which describe a model, which are copied; and plain folders for export."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pipeline.artifact import ArtifactError, Folder
from pipeline.diff import StoredTensor, stored_tensors
from pipeline.progress import report
from pipeline.store.files import is_plain_name
from pipeline.store.locks import locked, try_lock
from stages.models.trusted_code import code_files, copy_code, read_object, require_known
from stages.text import require_faithful, settle_tokenizer

WEIGHTS: Final = "model.safetensors"
WEIGHT_INDEX: Final = "model.safetensors.index.json"
OPTIMIZER: Final = "optimizer.safetensors"
TRAINER: Final = "trainer_state.json"
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
_UNWANTED: Final = ("adapter_config.json", "trusted_code.json")


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


# ------------------------------------------------------------------------------------------------ export

PlainType = Literal["bfloat16", "float32"]
_SIZES: Final[Mapping[str, int]] = {"bfloat16": 2, "float32": 4}
_CAST: Final = ("F64", "F32", "F16", "BF16")
"""Stored types that become the one asked for; integers and 8-bit floats (of quantised models) stay what they are."""


def write_plain(checkpoint: Folder, folder: Path, *, dtype: PlainType, shard_bytes: int) -> None:
    """Write the model into an empty folder as transformers, vLLM and the hub expect it, without anything of ours.

    The float32 masters are cast and split into shards; optimizer state, counters and records stay behind.

    Args:
        dtype: of the weights; float32 is what training holds, bfloat16 halves the size and rounds to 8 bits of mantissa.
        shard_bytes: largest weight file; a single tensor beyond it is a file of its own.

    Raises:
        ArtifactError: a tokenizer that would lose text when `AutoTokenizer` reads it from there.
    """
    copy_description(checkpoint.path, folder)
    if code := code_files(folder):
        warnings.warn(
            f"{', '.join(file.name for file in code)} of {checkpoint} is Python code, which comes along and did not run here; "
            "read it before anybody loads the folder with trust_remote_code=True",
            stacklevel=2,
        )
    _state_type(folder / "config.json", dtype)
    _write_weights(stored_tensors(checkpoint.path), folder, dtype, shard_bytes)
    require_faithful(folder)


def _state_type(file: Path, dtype: PlainType) -> None:
    """Name the type of the weights, which `from_pretrained` loads them in; `torch_dtype` is its older name."""
    described = {
        key: value for key, value in json.loads(file.read_text(encoding="utf-8")).items() if key != "torch_dtype"
    }
    text = json.dumps({**described, "dtype": dtype}, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def _write_weights(tensors: Mapping[str, StoredTensor], folder: Path, dtype: PlainType, shard_bytes: int) -> None:
    shards = list(_shards(tensors, dtype, shard_bytes))
    names = [WEIGHTS] if len(shards) == 1 else [_shard_name(number, len(shards)) for number in range(len(shards))]
    for number, (name, members) in enumerate(zip(names, shards, strict=True)):
        _write_shard(folder / name, {member: tensors[member] for member in members}, dtype)
        report("export", done=number + 1, total=len(shards))
    if len(shards) > 1:
        total = sum(_size(tensor, dtype) for tensor in tensors.values())
        places = {member: name for name, members in zip(names, shards, strict=True) for member in members}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / WEIGHT_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, StoredTensor], dtype: PlainType, shard_bytes: int) -> Iterator[list[str]]:
    """Yield names in their order, cut before what would exceed the size."""
    shard: list[str] = []
    filled = 0
    for name, tensor in tensors.items():
        size = _size(tensor, dtype)
        if shard and filled + size > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    yield shard


def _write_shard(file: Path, members: Mapping[str, StoredTensor], dtype: PlainType) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    wanted = {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    values: dict[str, torch.Tensor] = {}
    for name, tensor in members.items():
        with safe_open(tensor.file, framework="pt") as stored:
            value = stored.get_tensor(name)
        values[name] = value.to(wanted) if tensor.kind in _CAST else value
    save_file(values, file, metadata={"format": "pt"})


def _size(tensor: StoredTensor, dtype: PlainType) -> int:
    """Return the bytes in the folder; a type's name has its bits (`I64`, `F8_E4M3`), and a truth value has a byte."""
    bits = re.match(r"[A-Z]+(\d+)", tensor.kind)
    return tensor.size * (_SIZES[dtype] if tensor.kind in _CAST else int(bits[1]) // 8 if bits else 1)


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"
