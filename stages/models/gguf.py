"""GGUF files: what one says of its model and tokenizer, and the plain checkpoint that transformers makes of it.

The weights are dequantised to float32, which holds every value that blocks of GGUF stand for. What transformers reads is
compared with what the file says, since transformers leaves out in silence what it has no name for: tensors, ways to scale
positions, the rule that splits text before the merges. A difference is refused.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipeline.artifact import ArtifactError
from pipeline.config import ConfigError
from stages.models.folders import require_buildable
from stages.text import settle_tokenizer
from stages.text.tokenizers import byte_symbols

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MAGIC: Final = b"GGUF"
_ALIASES: Final = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "minimax-m2": "minimax_m2"}
"""What transformers calls architectures that the file spells otherwise."""
_NO_POLICIES: Final = ("general", "tokenizer", "t5", "umt5", "deci")
"""Entries of transformers' table of architectures that are no decoders that it builds."""
_DIGITS: Final = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Names of llama.cpp for GPT-2's rule after each digit was split off, which transformers' reader of GGUF leaves out."""
_GPT2: Final = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion")
"""Names of llama.cpp for GPT-2's rule."""
_ROLES: Final = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
_ENDS: Final = ("eos", "eot", "eom")
"""Tokens of the file that end an output: of sequence, turn, message."""
_PLACES: Final = ("_name_or_path", "_model_name_or_path")
_PART: Final = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True)
class GGUF:
    """The metadata of a GGUF file."""

    path: Path
    values: Mapping[str, Any]
    """By key: numbers, texts and lists."""
    tensors: Mapping[str, int]
    """Names of the tensors, and how many numbers each has."""

    @property
    def architecture(self) -> str:
        """Return the architecture by the name that transformers' table has."""
        name = str(self.values["general.architecture"])
        return _ALIASES.get(name, name)

    def of_tokenizer(self, name: str) -> Any:
        """Return what the file says of its tokenizer; None: nothing."""
        return self.values.get(f"tokenizer.ggml.{name}")


def is_gguf(path: Path) -> bool:
    """Return whether a path is to a GGUF file, by its name."""
    return path.suffix.lower() == ".gguf"


def gguf_file(path: Path) -> Path:
    """Return the path of a GGUF file; raise ArtifactError where there is none."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; expected a GGUF file of a model")
    with path.open("rb") as file:
        if (found := file.read(4)) != _MAGIC:
            raise ArtifactError(f"{path}: no GGUF file: it begins with {found!r} instead of {_MAGIC!r}; copy it again")
    return path


def read_gguf(path: Path) -> GGUF:
    """Read what a GGUF file says of its model; no weights are read and torch is not imported.

    Raises:
        ConfigError: the package `gguf` is missing.
        ArtifactError: no such file, one that is no GGUF, is cut off or one of several parts, or an architecture that
            transformers does not read from GGUF.
    """
    gguf_file(path)
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ConfigError(f"{path}: the package gguf is not installed; pip install 'cohort-rl[gguf]'") from None
    try:
        reader = GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{path}: cut off or damaged: its {path.stat().st_size:,} bytes cannot be read ({str(error)[:80]}); copy it again"
        ) from None
    if values.get("split.count", 0) > 1 or _PART.search(path.name):
        raise ArtifactError(
            f"{path}: one of several parts of a model; join them (llama.cpp: `llama-gguf-split --merge FIRST OUT`) and name OUT"
        )
    missing = [
        key for key in ("general.architecture", "tokenizer.ggml.tokens", "tokenizer.ggml.model") if not values.get(key)
    ]
    if missing or not tensors:
        raise ArtifactError(f"{path}: expected a model with its tokenizer, found no {', '.join(missing) or 'tensors'}")
    model = GGUF(path, values, tensors)
    _require_known(model)
    return model


def _require_known(model: GGUF) -> None:
    from transformers import __version__
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    known = sorted(set(GGUF_CONFIG_MAPPING) - set(_NO_POLICIES))
    if model.architecture not in known:
        raise ArtifactError(
            f"{model.path}: transformers {__version__} reads no policy of the architecture {model.architecture!r} from GGUF, "
            f"only {', '.join(known)}; take the model as safetensors"
        )
    scaled = {key: value for key, value in model.values.items() if ".rope.scaling." in key}
    kinds = {value for key, value in scaled.items() if key.endswith(".type")} - {"none"}
    if kinds and model.architecture != "gpt_oss":
        raise ArtifactError(
            f"{model.path}: {', '.join(sorted(scaled))}: transformers does not read from GGUF how positions are scaled "
            f"({', '.join(sorted(kinds))}); take the model as safetensors"
        )


def gguf_description(model: GGUF) -> dict[str, Any]:
    """Return what the metadata says of a model's sizes, by the names of config.json."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    prefix = str(model.values["general.architecture"])
    names = GGUF_CONFIG_MAPPING[model.architecture]
    said = {name: model.values.get(f"{prefix}.{key}") for key, name in names.items() if name not in (None, -1)}
    tied = "output.weight" not in model.tensors or model.architecture in ("falcon", "bloom")
    sizes = {"vocab_size": len(model.of_tokenizer("tokens")), "tie_word_embeddings": tied}
    described = {"model_type": model.architecture, **sizes, **{n: v for n, v in said.items() if v is not None}}
    require_buildable(described, str(model.path))
    return described


# ------------------------------------------------------------------------------------------------ to a folder


def describe_gguf(model: GGUF, folder: Path) -> None:
    """Write config.json and the tokenizer of a GGUF file into a folder, as `AutoTokenizer` reads it from there.

    Raises:
        ArtifactError: transformers reads them otherwise than the file says them; names the difference.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    said = gguf_description(model)
    with _in_a_folder(model) as place:
        config = AutoConfig.from_pretrained(place, gguf_file=_NAME, local_files_only=True)
        for name, value in said.items():
            found = getattr(config, name, value)
            if name != "model_type" and isinstance(value, int) and isinstance(found, int) and found != value:
                raise ArtifactError(f"{model.path}: {name}: the file says {value}, transformers reads {found}")
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=_NAME, local_files_only=True)
        except Exception as error:  # the library's own errors have no kind of their own
            raise ArtifactError(f"{model.path}: transformers cannot build its tokenizer: {str(error)[:200]}") from None
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    described = {key: value for key, value in config.to_diff_dict().items() if key not in _PLACES}
    _write(folder / "config.json", described | {"dtype": "float32"})
    _settle_split(tokenizer, model)
    tokenizer.save_pretrained(folder)
    _name_start(folder / "tokenizer_config.json", model)
    _name_ends(folder / "generation_config.json", model)
    settle_tokenizer(folder)
    _require_same(AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True), model)


_NAME: Final = "model.gguf"


@contextlib.contextmanager
def _in_a_folder(model: GGUF) -> Iterator[Path]:
    """Yield a folder with nothing but the file: transformers would also read a tokenizer that lies next to it."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="cohort-gguf-") as place:
        (Path(place) / _NAME).symlink_to(model.path.resolve())
        yield Path(place)


def _settle_split(tokenizer: PreTrainedTokenizerFast, model: GGUF) -> None:
    """Split text as the file says before the merges of a byte-level tokenizer; transformers knows some of the rules."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    rule = model.of_tokenizer("pre")
    if model.of_tokenizer("model") != "gpt2" or rule in GGUF_PRE_TOKENIZER_SPLITS or rule in _GPT2:
        return
    if rule in _DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        return
    if rule in (None, "default"):
        warnings.warn(
            f"{model.path} does not say by which rule its tokenizer splits text; GPT-2's is taken", stacklevel=2
        )
        return
    raise ArtifactError(
        f"{model.path}: tokenizer.ggml.pre: the tokenizer splits text by the rule {rule!r}, which transformers does not read "
        "from GGUF: words would become other tokens; take the model as safetensors"
    )


def _name_start(file: Path, model: GGUF) -> None:
    """Name in tokenizer_config.json whether texts begin with a token, which `settle_tokenizer` sees to."""
    if (start := model.of_tokenizer("add_bos_token")) is not None:
        _write(file, json.loads(file.read_text(encoding="utf-8")) | {"add_bos_token": bool(start)})


def _name_ends(file: Path, model: GGUF) -> None:
    """Name every token that ends an output where the file has several, as generation_config.json does."""
    found = [model.of_tokenizer(f"{end}_token_id") for end in _ENDS]
    ends = sorted({int(number) for number in found if number is not None})
    if len(ends) > 1:
        _write(file, {"eos_token_id": ends})


def _write(file: Path, described: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(described, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _require_same(tokenizer: PreTrainedTokenizerFast, model: GGUF) -> None:
    """Compare a tokenizer with what the file says."""
    path, tokens = model.path, list(map(str, model.of_tokenizer("tokens")))
    if len(tokenizer) != len(tokens):
        raise ArtifactError(
            f"{path}: tokenizer.ggml.tokens: the file has {len(tokens):,}, transformers {len(tokenizer):,}"
        )
    symbols = byte_symbols()
    for number, (token, found) in enumerate(
        zip(tokens, tokenizer.convert_ids_to_tokens(list(range(len(tokens)))), strict=True)
    ):
        if found != token and found not in (
            "".join(symbols[byte] for byte in token.encode()),
            token.replace(" ", "\u2581"),
        ):
            raise ArtifactError(f"{path}: token {number}: the file has {token!r}, transformers {found!r}")
    for role, name in _ROLES.items():
        said, found = model.of_tokenizer(f"{name}_token_id"), getattr(tokenizer, f"{role}_token_id")
        if said is not None and said != found:
            raise ArtifactError(
                f"{path}: tokenizer.ggml.{name}_token_id: the file says {said}, transformers reads {found}"
            )
    if (said := model.values.get("tokenizer.chat_template")) != tokenizer.chat_template:
        raise ArtifactError(
            f"{path}: tokenizer.chat_template: the file has {said!r:.60}, transformers reads {tokenizer.chat_template!r:.60}"
        )
    ids = tokenizer("a").input_ids
    for name, end, token in (
        ("add_bos_token", 0, tokenizer.bos_token_id),
        ("add_eos_token", -1, tokenizer.eos_token_id),
    ):
        said, found = model.of_tokenizer(name), token is not None and ids[end] == token
        if said is not None and bool(said) != found:
            raise ArtifactError(
                f"{path}: tokenizer.ggml.{name}: the file says {bool(said)}, transformers reads {found}"
            )


def copy_gguf(path: Path, folder: Path) -> None:
    """Make a GGUF file a checkpoint: configuration, tokenizer, and the weights dequantised to float32.

    Raises:
        ConfigError, ArtifactError: as `read_gguf` and `describe_gguf`; weights that are left out or missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from stages.models.folders import WEIGHTS
    from stages.models.tensors import model_weights, write_tensors

    model = read_gguf(path)
    describe_gguf(model, folder)
    try:
        # transformers draws a bar of its own there, whatever `disable_progress_bar` says.
        with _in_a_folder(model) as place, contextlib.redirect_stderr(io.StringIO()):
            loaded, found = AutoModelForCausalLM.from_pretrained(
                place, gguf_file=_NAME, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except ImportError as error:
        raise ConfigError(f"{path}: {error}; pip install 'cohort-rl[gguf]'") from None
    wrong = sorted(f"{kind} {name}" for kind in ("missing_keys", "mismatched_keys") for name in map(str, found[kind]))
    left = _left_out(model, sum(parameter.numel() for parameter in loaded.parameters()))
    if wrong or left:
        raise ArtifactError(f"{path}: weights do not fit the architecture: {', '.join([*wrong[:5], *left])}")
    write_tensors(folder / WEIGHTS, model_weights(loaded))


def _left_out(model: GGUF, taken: int) -> list[str]:
    """Say how many numbers of the file no weight of the model has; a tied head is the embedding again."""
    tied = gguf_description(model)["tie_word_embeddings"]
    held = sum(count for name, count in model.tensors.items() if not (tied and name == "output.weight"))
    if held == taken:
        return []
    others = [name for name in model.tensors if not name.startswith(("blk.", "token_embd.", "output"))]
    named = f", perhaps {', '.join(others[:5])}" if others else ""
    return [f"the file holds {held:,} numbers, the model takes {taken:,}{named}"]
