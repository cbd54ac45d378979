"""A checkpoint as a plain Hugging Face folder: what transformers, vLLM and the hub expect, and nothing of ours.

The float32 masters are cast to the type asked for and split into shards; optimizer state, counters and records stay behind.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Literal

from pipeline.diff import StoredTensor, stored_tensors
from pipeline.progress import report
from stages.models.checkpoint import Checkpoint
from stages.models.folders import WEIGHT_INDEX, WEIGHTS, copy_description
from stages.models.trusted_code import code_files
from stages.text import require_faithful

__all__ = ["PlainType", "write_plain"]

PlainType = Literal["bfloat16", "float32"]
_SIZES: Final[Mapping[str, int]] = {"bfloat16": 2, "float32": 4}
_CAST: Final = ("F64", "F32", "F16", "BF16")
"""Stored types that become the one asked for; integers and 8-bit floats (of quantised models) stay what they are."""


def write_plain(checkpoint: Checkpoint, folder: Path, *, dtype: PlainType, shard_bytes: int) -> None:
    """Write the model into an empty folder.

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
    """Names in their order, cut before what would exceed the size."""
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
    """Bytes in the folder; the digits of a type's name are its bits (`I64`, `F8_E4M3`), and a truth value has a byte."""
    bits = re.match(r"[A-Z]+(\d+)", tensor.kind)
    return tensor.size * (_SIZES[dtype] if tensor.kind in _CAST else int(bits[1]) // 8 if bits else 1)


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"
