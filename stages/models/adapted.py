"""Checkpoints of adapters: the weights of the base with the factors beside them, merged for whoever reads the policy.

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
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipeline.store import MissingArtifactError, StoreError
from pipeline.store.disk import free_bytes
from stages.models.folders import (
    ADAPTER,
    ADAPTER_SETTINGS,
    FACTORS,
    WEIGHTS,
    copy_description,
    is_adapted,
    weights_folder,
)
from stages.models.tensors import copy_weights, tensor_file

if TYPE_CHECKING:
    from torch import Tensor

_SHARED_MEMORY: Final = Path("/dev/shm")


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
