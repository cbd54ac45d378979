"""Read the shape of a decoder, how many parameters it has and where, from a config.json, without weights and torch.

Architectures with gated MLPs and RMS norms (Llama, Mistral, Qwen2, Qwen3), whose parameters a layer are

    q, k, v, o projections   H q + 2 H kv + q H      q = heads * head size, kv = key heads * head size
    gate, up, down           3 H I
    two norms                2 H

with H the hidden size and I the intermediate size. The rest is the embedding V H, the final norm and, unless it is tied, the
output head V H.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from flows.config import IterativeRLConfig, PretrainedPolicy
from flows.runs.ledger import Ledger
from flows.runs.paths import Places
from pipeline.artifact import ArtifactError
from pipeline.config import ConfigError
from stages.models import gguf_description, is_gguf, read_gguf
from stages.sft import PolicyConfig
from stages.text import BPETokenizerConfig

_NEEDED: Final = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_QKV_BIAS: Final = {"qwen2": True, "llama": False, "mistral": False, "qwen3": False}
"""Supported model types, and whether their q, k and v projections have a bias unless `attention_bias` says otherwise."""
_MAKERS: Final = ("create_policy", "import_checkpoint", "fetch_checkpoint")
"""Stages that make a policy from nothing, a folder or the hub."""
_CHARACTERS: Final = 64
"""Vocabulary of a character tokenizer that was not made yet; ours: it has as many as the demonstrations (the demo's 26)."""
_DEFAULTS: Final[dict[str, dict[str, int]]] = {
    "qwen2": {
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
"""transformers 5.19's Qwen2Config and LlamaConfig: what a policy made from scratch has where its settings are silent."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that formulas need."""

    name: str
    """Its name, or where it was read from."""
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    """Whether the output head is the embedding."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Whether the attention's output projection has a bias too."""
    qk_norm: bool = False
    window: int | None = None
    """Most tokens of prompt and output."""

    @property
    def queries(self) -> int:
        """Return the width of all query heads."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Return the width of all key heads, which is that of the values."""
        return self.kv_heads * self.head_size

    @property
    def layer_matrices(self) -> int:
        """Return the numbers in the matrices of one layer."""
        return 2 * self.hidden * (self.queries + self.keys) + 3 * self.hidden * self.intermediate

    @property
    def layer(self) -> int:
        """Return the parameters of one layer."""
        biases = (self.queries + 2 * self.keys) * self.qkv_bias + self.hidden * self.output_bias
        return self.layer_matrices + biases + 2 * self.hidden + 2 * self.head_size * self.qk_norm

    @property
    def matrices(self) -> int:
        """Return the numbers in the matrices of all layers: what every token is multiplied with."""
        return self.layers * self.layer_matrices

    @property
    def embedding(self) -> int:
        """Return V H: the embedding, and as large a head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Return all parameters, a tied head once."""
        return self.layers * self.layer + self.hidden + self.embedding * (1 if self.tied else 2)

    @property
    def trunk(self) -> int:
        """Return the parameters of a critic or reward model of this shape: with a head of a single output."""
        return self.layers * self.layer + 2 * self.hidden + self.embedding

    def adapter(self, rank: int) -> int:
        """Return r (in + out) for every linear layer but the head (LoRA, Hu et al. 2021)."""
        attention = 2 * (self.hidden + self.queries) + 2 * (self.hidden + self.keys)
        return rank * self.layers * (attention + 3 * (self.hidden + self.intermediate))


def shape_of(description: Mapping[str, Any], name: str) -> ModelShape:
    """Return the shape that a config.json describes; raise ConfigError for a wrong field or a model type without formulas."""
    kind = description.get("model_type", "llama")
    if kind not in _QKV_BIAS:
        raise ConfigError(
            f"{name}: model_type {kind!r} is not one that `cohort plan` knows ({', '.join(_QKV_BIAS)}); give the figures of a "
            "model of like size with --model-config"
        )
    given = {field: description.get(field) for field in _NEEDED}
    wrong = [f"{field} (found {value!r})" for field, value in given.items() if type(value) is not int or value <= 0]
    if wrong:
        raise ConfigError(f"{name}: expected positive integers, missing or wrong: {', '.join(wrong)}")
    heads = description["num_attention_heads"]
    size = description.get("head_dim") or description["hidden_size"] // heads
    bias = description.get("attention_bias", _QKV_BIAS[kind])
    return ModelShape(
        name=name,
        hidden=description["hidden_size"],
        intermediate=description["intermediate_size"],
        layers=description["num_hidden_layers"],
        heads=heads,
        kv_heads=description.get("num_key_value_heads") or heads,
        head_size=size,
        vocabulary=description["vocab_size"],
        tied=bool(description.get("tie_word_embeddings", False)),
        qkv_bias=bool(bias),
        output_bias=bool(bias) and kind in ("llama", "mistral"),
        qk_norm=kind == "qwen3",
        window=description.get("max_position_embeddings"),
    )


def read_shape(file: Path) -> ModelShape:
    """Read the shape from a config.json, a folder with one or a GGUF file; raise ConfigError where it is none of these, or as
    `shape_of`."""
    if is_gguf(file):
        return _gguf_shape(file)
    path = file / "config.json" if file.is_dir() else file
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{path}: expected a model's config.json, cannot be read: {error}") from None
    if not isinstance(description, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(description).__name__}")
    return shape_of(description, str(path))


def known_shape(name: str) -> ModelShape | None:
    """Find a shape by the last part of a model's path, whatever its suffix: `deepseek-math-7b-instruct`. None: not known."""
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    found = [known for known in KNOWN_SHAPES if last.startswith(known)]
    return None if not found else replace(KNOWN_SHAPES[found[0]], name=f"{found[0]}, a known shape")


def shape_for(
    config: IterativeRLConfig, places: Places, ledger: Ledger, file: Path | None
) -> tuple[ModelShape, list[str]]:
    """Return the policy's shape, and what was assumed about it. No model is loaded or downloaded.

    Args:
        ledger: the calls that the store has; the policy's own config.json wins over a guess.
        file: `--model-config`, which wins over everything.

    Raises:
        ConfigError: no config.json was found, or it lacks something.
    """
    if file is not None:
        return read_shape(file), []
    for call in ledger.calls.values():
        made = places.payload(call.digest) / "config.json"  # not verified: that would read all weights
        if call.stage in _MAKERS and made.is_file():
            return read_shape(made), []
    if isinstance(config.policy, PolicyConfig):
        return _scratch_shape(config.policy)
    return _pretrained_shape(config.policy)


def teacher_shape(config: IterativeRLConfig, policy: ModelShape) -> tuple[ModelShape | None, list[str]]:
    """Return the teacher's shape, where there is one, and what was assumed about it: one that is not here is as the policy."""
    if config.teacher is None:
        return None, []
    try:
        return _pretrained_shape(config.teacher)
    except ConfigError:
        return policy, [f"the teacher is not here: {config.teacher.path} is taken to be of the policy's size"]


def _scratch_shape(policy: PolicyConfig) -> tuple[ModelShape, list[str]]:
    bpe = isinstance(policy.tokenizer, BPETokenizerConfig)
    vocabulary = policy.tokenizer.vocab_size if isinstance(policy.tokenizer, BPETokenizerConfig) else _CHARACTERS
    known = _DEFAULTS.get(policy.architecture, {})
    description = {"model_type": policy.architecture, **known, **policy.settings, "vocab_size": vocabulary}
    assumed = [] if bpe else [f"a vocabulary of {_CHARACTERS} characters, since the tokenizer is not made yet"]
    return shape_of(description, "policy.settings"), assumed


def _pretrained_shape(policy: PretrainedPolicy) -> tuple[ModelShape, list[str]]:
    folder = Path(policy.path).expanduser()
    if is_gguf(folder) or (folder / "config.json").is_file():
        return read_shape(folder), []
    if (found := _in_hub_cache(policy)) is not None:
        return read_shape(found), []
    if (shape := known_shape(policy.path)) is not None:
        return shape, [f"the model is not here: {policy.path} is taken for a {shape.name}"]
    raise ConfigError(
        f"policy.path: {policy.path} is no folder with a config.json here, and no known shape ({', '.join(KNOWN_SHAPES)}); "
        "name the model's config.json with --model-config"
    )


def _gguf_shape(file: Path) -> ModelShape:
    """Read the shape from the metadata of a GGUF file; a bias of the projections is seen by its tensor."""
    try:
        model = read_gguf(file)
    except ArtifactError as error:
        raise ConfigError(f"policy.path: {error}") from None
    biased = "blk.0.attn_q.bias" in model.tensors
    return shape_of({**gguf_description(model), "attention_bias": biased}, str(file))


def _in_hub_cache(policy: PretrainedPolicy) -> Path | None:
    """Return the config.json of a hub model that was fetched before."""
    if "/" not in policy.path:
        return None
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # a path that is no repository's name
        found = try_to_load_from_cache(policy.path, "config.json", revision=policy.revision)
        return Path(found) if isinstance(found, str) else None
    return None


def _qwen(hidden: int, intermediate: int, layers: int, heads: int) -> ModelShape:
    """Return the shape of a Qwen2 or Qwen2.5 of below 3 B parameters: two key heads, tied."""
    sizes = (hidden, intermediate, layers, heads, 2, hidden // heads, 151_936)
    return ModelShape("", *sizes, tied=True, qkv_bias=True, window=32_768)


KNOWN_SHAPES: Final = {
    "deepseek-math-7b": ModelShape("", 4096, 11_008, 30, 32, 32, 128, 102_400, tied=False, window=4096),
    "qwen2.5-0.5b": _qwen(896, 4864, 24, 14),
    "qwen2.5-1.5b": _qwen(1536, 8960, 28, 12),
    "qwen2.5-math-1.5b": replace(_qwen(1536, 8960, 28, 12), window=4096),
}
"""Models that need not be there, by the config.json that their authors publish (deepseek-ai/deepseek-math-7b-base,
Qwen/Qwen2.5-0.5B-Instruct, Qwen/Qwen2.5-1.5B-Instruct and Qwen/Qwen2.5-Math-1.5B on the hub)."""
