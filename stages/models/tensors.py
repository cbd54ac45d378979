"""Weights as tensors: of a model, into a model, as safetensors files; and those of an adapter, merged for who reads the policy.

A checkpoint of an adapter has:

* `model.safetensors`: the weights on which the adapter was begun, in float32. All checkpoints of an adapter share this file: a
  hard link where the file system has them, so that each is complete by itself and costs the factors;
* `adapter/adapter_model.safetensors` and `adapter/adapter_config.json`: A and B in peft's own format, so that peft loads this
  folder; `base_model_name_or_path` is the digest of the checkpoint on which the adapter was begun.

Earlier versions wrote the merged weights, and W of the adapted matrices to `adapter/base.safetensors`; these are read as well.

The files lie in a folder of their own: transformers adds an adapter to the weights where `adapter_config.json` lies with them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipeline.artifact import ArtifactError
from pipeline.store import MissingArtifactError, StoreError
from pipeline.store.files import free_bytes
from stages.models.folders import (
    ADAPTER,
    ADAPTER_SETTINGS,
    FACTORS,
    WEIGHTS,
    copy_description,
    is_adapted,
    weights_folder,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SHARED_MEMORY: Final = Path("/dev/shm")
_KINDS: Final = {
    f"torch.{name}": kind
    for name, kind in {
        **{"float32": "F32", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8"},
        **{"uint8": "U8", "bool": "BOOL"},
    }.items()
}
"""What safetensors calls the types of a model's parameters and buffers."""


def model_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers by name, a tied weight once, under the name of its first owner."""
    weights: dict[str, torch.Tensor] = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    weights |= {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return weights


def copy_weights(targets: Mapping[str, torch.Tensor], weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Overwrite weights in place with those of the same names, each cast to the dtype it has here.

    Raises:
        ArtifactError: weights without a target, or targets without a weight.
    """
    import torch

    left = set(targets)
    with torch.no_grad():
        for name, weight in weights:
            if name not in left:
                raise ArtifactError(f"weight {name} is not in the model, or came twice")
            targets[name].copy_(weight)
            left.remove(name)
    if left:
        raise ArtifactError(f"no weights for {', '.join(sorted(left)[:5])}")


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor], *, half: bool = False) -> None:
    """Write tensors as safetensors on the CPU, floating ones as float32 or bfloat16; equal tensors make equal bytes."""
    from safetensors.torch import save_file

    def plain(tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor.detach()
        return kept.to(_stored_dtype(kept.dtype, half=half)).cpu().contiguous()

    save_file({name: plain(tensor) for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def _stored_dtype(dtype: torch.dtype, *, half: bool) -> torch.dtype:
    import torch

    if not dtype.is_floating_point:
        return dtype
    return torch.bfloat16 if half else torch.float32


def tensor_file(
    file: Path, described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], *, half: bool, room: float
) -> dict[str, torch.Tensor]:
    """Make a safetensors file of zeros and return its tensors, whose memory is the file's: what is copied there is written.

    Args:
        described: types and shapes by name; floating types become float32, or bfloat16 where `half`.
        room: bytes that are free there, of which a twentieth is left.

    Raises:
        StoreError: they do not fit there.
    """
    import torch

    stored = {name: (_stored_dtype(dtype, half=half), shape) for name, (dtype, shape) in described.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(stored, key=lambda name: (-stored[name][0].itemsize, name)):  # as aligned as save_file has them
        (dtype, shape), begin = stored[name], end
        end += dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _KINDS[str(dtype)], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if room < 1.05 * end + 2**20:
        raise StoreError(f"{file}: weights of {end:,} bytes do not fit, {room:,} are free")
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.flush()
        try:
            os.posix_fallocate(
                opened.fileno(), 0, opened.tell() + end
            )  # mapped memory of a full file system would kill us
        except OSError as error:
            raise StoreError(f"{file}: weights of {end:,} bytes do not fit ({error})") from None
    mapped = torch.from_file(str(file), shared=True, size=8 + len(text) + end, dtype=torch.uint8)[8 + len(text) :]
    return {
        name: mapped[slice(*header[name]["data_offsets"])].view(dtype).view(shape)
        for name, (dtype, shape) in stored.items()
    }


@contextlib.contextmanager
def plain_folder(folder: Path, *, half: bool = False) -> Iterator[Path]:
    """Yield a folder with the policy's own weights, for the block: `folder`, or one in memory where an adapter is merged.

    Args:
        half: where they are merged, as bfloat16, not float32.

    Raises:
        StoreError: they fit neither in shared memory nor in the folder for temporary files.
    """
    if not is_adapted(folder):
        yield folder
        return
    with filled_folder(folder, lambda target: _write_merged(folder, target, half=half)) as merged:
        yield merged


@contextlib.contextmanager
def filled_folder(described: Path, fill: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a folder with what describes a model and the weights that `fill` writes, which is there for the block.

    It is in shared memory, or a temporary folder where that has no room.

    Raises:
        StoreError: what `fill` raised.
    """
    places = (*([_SHARED_MEMORY] if _SHARED_MEMORY.is_dir() else []), Path(tempfile.gettempdir()))
    with contextlib.ExitStack() as stack:
        for place in places:
            folder = stack.enter_context(weights_folder(place))
            copy_description(described, folder)
            try:
                fill(folder)
            except StoreError as error:
                if isinstance(error, MissingArtifactError) or place == places[-1]:
                    raise
                continue
            break
        yield folder


def merged(w: Tensor, a: Tensor, b: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """Return W + s B A, of float32 factors on the CPU; s is alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""
    change = (b @ a).T if settings["fan_in_fan_out"] else b @ a
    return w + _scale(settings) * change


def _scale(settings: Mapping[str, Any]) -> float:
    """Return s: alpha / r, or alpha / sqrt(r)."""
    r: int = settings["r"]
    return float(settings["lora_alpha"]) / (math.sqrt(r) if settings["use_rslora"] else r)


def _write_merged(source: Path, target: Path, *, half: bool) -> None:
    """Write the merged weights, one at a time straight into the file."""
    from safetensors import safe_open

    settings = json.loads((source / ADAPTER / ADAPTER_SETTINGS).read_text(encoding="utf-8"))
    with (
        safe_open(source / WEIGHTS, framework="pt") as base,
        safe_open(source / ADAPTER / FACTORS, framework="pt") as factors,
    ):
        names, adapted = list(base.keys()), set(factors.keys())

        def weights() -> Iterator[tuple[str, Tensor]]:
            for name in names:
                layer = f"base_model.model.{name.removesuffix('.weight')}.lora_"
                weight, parts = base.get_tensor(name), (f"{layer}A.weight", f"{layer}B.weight")
                if adapted.issuperset(parts):
                    a, b = map(factors.get_tensor, parts)
                    weight = merged(weight, a, b, settings)
                yield name, weight

        described = {
            name: (each.dtype, tuple(each.shape)) for name, each in zip(names, map(base.get_tensor, names), strict=True)
        }
        copy_weights(tensor_file(target / WEIGHTS, described, half=half, room=free_bytes(target)), weights())
