"""Checkpoints: a Hugging Face folder with tokenizer and, when trained, optimizer state. Safetensors and JSON only.

`model.safetensors` holds the float32 masters: what training changed by 1e-6 is in the file, and loaders cast; where an adapter
is trained, the base's (`stages/models/tensors.py`). Reading a checkpoint runs no code: no pickle, and of the model's own Python
files only those that the running configuration pins (`stages/models/trusted_code.py`).
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pipeline.artifact import ArtifactError, Folder
from pipeline.diff import StoredTensor, stored_tensors
from pipeline.progress import report
from pipeline.residency import holder_of
from pipeline.store import PrunedArtifactError, StoreError, current_store
from pipeline.store.files import sha256_of
from pipeline.store.folder import recomputed
from stages.models.folders import (
    OPTIMIZER,
    TRAINER,
    WEIGHT_INDEX,
    WEIGHTS,
    copy_description,
    require_buildable,
    weight_files,
)
from stages.models.tensors import filled_folder, model_weights, plain_folder, write_tensors
from stages.models.trusted_code import code_digest, code_files, may_run_code, read_object
from stages.text import require_faithful

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


class Checkpoint(Folder):
    """A model, its tokenizer and, when it was trained, what training needs to continue bit for bit."""


# ------------------------------------------------------------------------------------------------ reading


@contextlib.contextmanager
def model_folder(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Iterator[Path]:
    """Yield a folder with the model of a checkpoint, which is there for the block.

    It is the store's, unless an adapter is to be merged (`plain_folder`). Weights that were not written, and that an engine of
    this process or its ranks has, are handed over in memory, where it has room.

    Args:
        dtype: what the reader casts floating weights to; in bfloat16 they are handed over as that. None: float32.
    """
    half = str(dtype) == "torch.bfloat16"
    holder = holder_of(checkpoint.state) if checkpoint.content is None else None
    hand_over = getattr(holder, "hand_over", None)
    with contextlib.ExitStack() as stack:
        folder = None
        if hand_over is not None:
            with contextlib.suppress(StoreError):  # no room, or by now it has another state
                given = filled_folder(checkpoint.described, lambda at: hand_over(checkpoint.digest, at, half=half))
                folder = stack.enter_context(given)
        yield folder or stack.enter_context(plain_folder(checkpoint.path, half=half))


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


# ------------------------------------------------------------------------------------------------ export

PlainType = Literal["bfloat16", "float32"]
_SIZES: Final[Mapping[str, int]] = {"bfloat16": 2, "float32": 4}
_CAST: Final = ("F64", "F32", "F16", "BF16")
"""Stored types that become the one asked for; integers and 8-bit floats (of quantised models) stay what they are."""


def write_plain(checkpoint: Checkpoint, folder: Path, *, dtype: PlainType, shard_bytes: int) -> None:
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
    with plain_folder(checkpoint.path) as source:
        _write_weights(stored_tensors(source), folder, dtype, shard_bytes)
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
