"""Which model a configuration trains, without loading it: from its config.json, the store, known shapes, or its settings."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Final

from flows.config import IterativeRLConfig
from flows.ledger import Ledger
from flows.places import Places
from flows.planning.shapes import KNOWN_SHAPES, ModelShape, known_shape, read_shape, shape_of
from flows.pretrained import PretrainedPolicy
from pipeline.config import ConfigError
from stages.sft import PolicyConfig
from stages.tokenizers import BPETokenizerConfig

__all__ = ["shape_for"]

_MAKERS: Final = ("create_policy", "import_checkpoint", "fetch_checkpoint")
_CHARACTERS: Final = 64
"""Vocabulary of a character tokenizer that was not made yet; ours: it has as many as the demonstrations (the demo's 26)."""
_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
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
"""Of transformers 5.19's Qwen2Config and LlamaConfig: what a policy made from scratch has where its settings are silent."""


def shape_for(
    config: IterativeRLConfig, places: Places, ledger: Ledger, file: Path | None
) -> tuple[ModelShape, list[str]]:
    """The policy's shape, and what was assumed about it.

    Args:
        ledger: the calls that the store has; the policy's own config.json wins over a guess.
        file: `--model-config`, which wins over everything.

    Raises:
        ConfigError: no config.json is to be had, or it lacks something.
    """
    if file is not None:
        return read_shape(file), []
    for call in ledger.calls.values():
        if call.stage in _MAKERS:
            made = places.payload(call.digest) / "config.json"  # as it is: to verify it is to read all weights
            if made.is_file():
                return read_shape(made), []
    if isinstance(config.policy, PolicyConfig):
        return _scratch(config.policy)
    return _pretrained(config.policy)


def _scratch(policy: PolicyConfig) -> tuple[ModelShape, list[str]]:
    said: list[str] = []
    if isinstance(policy.tokenizer, BPETokenizerConfig):
        vocabulary = policy.tokenizer.vocab_size
    else:
        vocabulary = _CHARACTERS
        said.append(f"a vocabulary of {vocabulary} characters, since the tokenizer is not made yet")
    known = _DEFAULTS.get(policy.architecture, {})
    description = {"model_type": policy.architecture, **known, **policy.settings, "vocab_size": vocabulary}
    return shape_of(description, "policy.settings"), said


def _pretrained(policy: PretrainedPolicy) -> tuple[ModelShape, list[str]]:
    folder = Path(policy.path).expanduser()
    if (folder / "config.json").is_file():
        return read_shape(folder), []
    if (found := _in_hub_cache(policy)) is not None:
        return read_shape(found), []
    if (shape := known_shape(policy.path)) is not None:
        return shape, [f"the model is not here: {policy.path} is taken for a {shape.name}"]
    raise ConfigError(
        f"policy.path: {policy.path} is no folder with a config.json here, and no known shape ({', '.join(KNOWN_SHAPES)}); "
        "name the model's config.json with --model-config"
    )


def _in_hub_cache(policy: PretrainedPolicy) -> Path | None:
    """The config.json of a hub model that was fetched before; nothing is downloaded."""
    if "/" not in policy.path:
        return None
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # a path that is no repository's name
        found = try_to_load_from_cache(policy.path, "config.json", revision=policy.revision)
        return Path(found) if isinstance(found, str) else None
    return None
