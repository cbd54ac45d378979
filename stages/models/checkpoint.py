"""Checkpoints: a Hugging Face folder with tokenizer and, when trained, optimizer state. Safetensors and JSON only.

`model.safetensors` holds the float32 masters: what training changed by 1e-6 is in the file, and loaders cast. Reading a
checkpoint runs no code: no pickle, and of the model's own Python files only those that the running configuration pins
(`stages/models/trusted_code.py`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipeline.artifact import ArtifactError, Folder
from pipeline.residency import holder_of
from pipeline.store import MissingArtifactError, PrunedArtifactError, StoreError, current_store
from pipeline.store.files import sha256_of
from pipeline.store.folder import recomputed
from stages.models.folders import (
    OPTIMIZER,
    TRAINER,
    WEIGHTS,
    copy_description,
    require_buildable,
    weight_files,
    weights_folder,
)
from stages.models.trusted_code import code_digest, code_files, may_run_code, read_object

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_HEADS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
}
"""How the name of an architecture ends, and the class of transformers that loads such a model."""
_SHARED_MEMORY: Final = Path("/dev/shm")
_KINDS: Final = {
    f"torch.{name}": kind
    for name, kind in {
        **{"float32": "F32", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8"},
        **{"uint8": "U8", "bool": "BOOL"},
    }.items()
}
"""What safetensors calls the types of a model's parameters and buffers."""


class Checkpoint(Folder):
    """A model, its tokenizer and, when it was trained, what training needs to continue bit for bit."""


# ------------------------------------------------------------------------------------------------ reading


@contextlib.contextmanager
def model_folder(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Iterator[Path]:
    """Yield a folder with the model of a checkpoint, which is there for the block.

    It is the store's. Weights that were not written, and that an engine of this process or its ranks has, are handed over in
    shared memory, or in a temporary folder where that has no room.

    Args:
        dtype: what the reader casts floating weights to; in bfloat16 they are handed over as that. None: float32.
    """
    holder = holder_of(checkpoint.state) if checkpoint.content is None else None
    hand_over = getattr(holder, "hand_over", None)
    if hand_over is None:
        yield checkpoint.path
        return
    with contextlib.ExitStack() as stack:
        for place in (*([_SHARED_MEMORY] if _SHARED_MEMORY.is_dir() else []), Path(tempfile.gettempdir())):
            folder = stack.enter_context(weights_folder(place))
            copy_description(checkpoint.described, folder)
            try:
                hand_over(checkpoint.digest, folder, half=str(dtype) == "torch.bfloat16")
            except MissingArtifactError:  # by now it has another state
                break
            except StoreError:  # no room
                continue
            yield folder
            return
    yield checkpoint.path


def load_model(checkpoint: Checkpoint, *, dtype: torch.dtype, attention: str = "eager") -> PreTrainedModel:
    """Load the model in evaluation mode (no dropout: ratios must be exactly 1), its weights cast to `dtype`.

    Which head it has, the checkpoint's own `architectures` say: a policy's (causal language model, also where they are
    absent), a critic's (token classification) or a reward model's (sequence classification).

    Raises:
        ArtifactError: a head of another kind, or weights that do not fit the architecture, by name; they would otherwise be
            drawn at random.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with model_folder(checkpoint, dtype) as folder:
        weight_files(folder)  # what an index names, before transformers follows it
        model, found = _auto_class(checkpoint).from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=may_run_code(checkpoint.described),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    wrong = {kind: sorted(map(str, found[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    parts = "; ".join(f"{kind.removesuffix('_keys')} {names[:5]}" for kind, names in wrong.items() if names)
    if parts:
        raise ArtifactError(f"{checkpoint}: weights do not fit the architecture: {parts}")
    return model.eval()


def _auto_class(checkpoint: Checkpoint) -> Any:
    """Return the class that loads the head that config.json names."""
    import transformers

    described = read_object(checkpoint.described / "config.json")
    require_buildable(described, f"{checkpoint}: config.json")
    names = described.get("architectures") or ["ForCausalLM"]
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ArtifactError(
            f"{checkpoint}: architectures in config.json: expected a list of names, found {names!r:.80}"
        )
    for ending, auto_class in _HEADS.items():
        if names[0].endswith(ending):
            return getattr(transformers, auto_class)
    raise ArtifactError(
        f"{checkpoint}: config.json names the architecture {names[0]}; expected one that ends in {', '.join(_HEADS)}; "
        "convert the model to one of these"
    )


def architecture_of(checkpoint: Checkpoint) -> str:
    """Return what decides which module is built, whatever its weights: config.json, and the code that is to read it.

    A module kept warm may take the weights of another checkpoint of the same architecture.
    """
    described = (checkpoint.described / "config.json").read_text(encoding="utf-8")
    return sha256_of(f"{described}\0{code_digest(code_files(checkpoint.described))}")


def load_weights(
    model: PreTrainedModel, checkpoint: Checkpoint, targets: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Overwrite the weights of `model` in place, each cast to the dtype it has there; tied weights follow their twin.

    Args:
        targets: the weights by the names that the checkpoint knows them by; None: `model_weights`.

    Raises:
        ArtifactError: names or shapes that differ from the model's.
    """
    targets = model_weights(model) if targets is None else targets
    left = set(targets)
    with model_folder(checkpoint) as folder:
        for file in weight_files(folder):
            left.difference_update(_load_file(file, model, checkpoint, targets))
    if left:
        raise ArtifactError(f"{checkpoint}: no weights for {', '.join(sorted(left)[:5])}")


def _load_file(
    file: Path, model: PreTrainedModel, checkpoint: Checkpoint, targets: Mapping[str, torch.Tensor]
) -> Iterator[str]:
    """Load the weights of a file, and yield the name of each."""
    import torch
    from safetensors import safe_open

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
            yield name


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


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerFast:
    """Load the tokenizer of the checkpoint."""
    from transformers import AutoTokenizer

    require_buildable(
        read_object(checkpoint.described / "config.json"), f"{checkpoint}: config.json"
    )  # which it reads too
    trusted = may_run_code(checkpoint.described)
    return AutoTokenizer.from_pretrained(checkpoint.described, trust_remote_code=trusted, local_files_only=True)


def load_optimizer_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Load optimizer state as `<parameter name>/<slot>`; empty where the checkpoint has none.

    Raises:
        PrunedArtifactError: it had one, which was freed (`keep.optimizer`, `cohort store prune --optimizer`).
    """
    from safetensors.torch import load_file

    file, store = checkpoint.path / OPTIMIZER, current_store()
    freed = not file.exists() and OPTIMIZER in store.freed(checkpoint.digest)
    if freed and not store.make_whole(checkpoint.digest):
        raise PrunedArtifactError(
            f"{checkpoint}: its optimizer state {recomputed(checkpoint.digest)}; without it training would go on otherwise"
        )
    state: dict[str, torch.Tensor] = load_file(file) if file.exists() else {}
    return state


def load_trainer_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Load the trainer's counters, and the kind of its optimizer where moments are kept; empty where there is none."""
    file = checkpoint.path / TRAINER
    state: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return state


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
    """Return parameters and persistent buffers by name, a tied weight once, under the name of its first owner."""
    weights: dict[str, torch.Tensor] = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    weights |= {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return weights


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
