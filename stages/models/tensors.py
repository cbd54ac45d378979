"""Weights as tensors: of a model, into a model, and as safetensors files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipeline.artifact import ArtifactError
from pipeline.store import StoreError

if TYPE_CHECKING:
    import torch

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
