"""Tensors in safetensors files, read with numpy alone: what there is, and how far two files are apart.

A file is 8 bytes of length (little endian), a JSON header of names, types, shapes and places, then the values. They are
memory-mapped and compared piece by piece, so that files larger than memory can be.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final

import numpy
import numpy.typing as npt
from pydantic import BaseModel, Field, TypeAdapter

__all__ = ["StoredTensor", "TensorDifference", "compare_weights", "stored_tensors"]

_PIECE: Final = 1 << 22
"""Values compared at a time."""
_TYPES: Final[Mapping[str, str]] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # the upper half of a float32
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U8": "<u1",
    "BOOL": "<u1",
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    file: Path
    kind: str
    """The format's name of its type: `F32`, `BF16`, ..."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def pieces(self) -> Iterator[npt.NDArray[numpy.float64]]:
        """The values in order, some millions at a time.

        Raises:
            ValueError: a type that numpy cannot hold (the 8-bit floats).
        """
        if self.kind not in _TYPES:
            raise ValueError(f"{self.file}: tensors of type {self.kind} cannot be compared; known: {', '.join(_TYPES)}")
        if not self.size:
            return
        values = numpy.memmap(self.file, _TYPES[self.kind], "r", self.offset, (self.size,))
        for start in range(0, self.size, _PIECE):
            piece = values[start : start + _PIECE]
            if self.kind == "BF16":
                piece = (piece.astype(numpy.uint32) << 16).view(numpy.float32)
            yield piece.astype(numpy.float64)


class _Tensor(BaseModel):
    """What the header of a file says of a tensor."""

    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]
    data_offsets: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


_HEADER: Final = TypeAdapter(dict[str, _Tensor | dict[str, str]])  # the latter is `__metadata__`


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """Two tensors of one name and shape."""

    name: str
    shape: tuple[int, ...]
    largest: float
    """Largest absolute difference; infinite where one of them is not finite and the other is not the same."""
    changed: int
    """Values that differ."""
    squares: float
    """Sum of squared differences."""


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model folder (`model*.safetensors`, all shards) by name.

    Raises:
        ValueError: a file that is none of the format, by its name.
    """
    found: dict[str, StoredTensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with file.open("rb") as stream:
            length, size = int.from_bytes(stream.read(8), "little"), file.stat().st_size
            text = stream.read(length) if 8 + length <= size else b""  # a made-up length reads nothing
        try:
            header = _HEADER.validate_json(text, strict=True)
        except ValueError:
            raise ValueError(f"{file}: no safetensors file; its header cannot be read") from None
        for name, about in header.items():
            if isinstance(about, _Tensor):
                found[name] = StoredTensor(file, about.dtype, tuple(about.shape), 8 + length + about.data_offsets[0])
    return found


def compare_weights(
    before: Mapping[str, StoredTensor], after: Mapping[str, StoredTensor]
) -> Iterator[TensorDifference]:
    """The tensors of equal name and shape, in the order of `before`, those that are equal included."""
    for name, old in before.items():
        new = after.get(name)
        if new is not None and new.shape == old.shape:
            yield _compare(name, old, new)


def _compare(name: str, old: StoredTensor, new: StoredTensor) -> TensorDifference:
    largest, changed, squares = 0.0, 0, 0.0
    for left, right in zip(old.pieces(), new.pieces(), strict=True):
        unequal = (left != right) & ~(numpy.isnan(left) & numpy.isnan(right))
        if unequal.any():
            distances = numpy.nan_to_num(numpy.abs(right[unequal] - left[unequal]), nan=numpy.inf)
            largest, changed = max(largest, float(distances.max())), changed + int(unequal.sum())
            squares += float(numpy.square(distances).sum())
    return TensorDifference(name, old.shape, largest, changed, squares)
