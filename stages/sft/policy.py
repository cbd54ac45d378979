"""A first policy: an architecture, random weights, and a tokenizer made from demonstrations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, field_validator

from pipeline.config import Config, ConfigError
from pipeline.stage import record_metrics, stage
from stages.models import Checkpoint, require_buildable, save
from stages.tables import Demonstrations
from stages.text import CharacterTokenizerConfig, PromptConfig, TokenizerConfig, build_tokenizer


class PolicyConfig(Config):
    """A causal language model with random weights."""

    kind: Literal["scratch"] = "scratch"
    """Discriminator: a policy made here, not one that others trained."""
    architecture: str = "qwen2"
    """Model type as transformers names it: qwen2, llama, ..."""
    settings: dict[str, bool | int | float | str | None] = Field(
        default={
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
        }
    )
    """Settings of that type which differ from its defaults. The vocabulary size and special tokens are the tokenizer's."""
    tokenizer: TokenizerConfig = CharacterTokenizerConfig()
    """Made from the demonstrations."""
    seed: NonNegativeInt = 0
    """Draws the weights."""

    @field_validator("settings")
    @classmethod
    def _buildable(cls, settings: dict[str, Any]) -> dict[str, Any]:
        require_buildable(settings, "settings")
        return settings


@stage(version="1")
def create_policy(config: PolicyConfig, corpus: Demonstrations | None, prompt: PromptConfig) -> Checkpoint:
    """A model with random weights; its tokenizer knows the corpus and what `prompt` puts around a question.

    Raises:
        ConfigError: no corpus, an architecture that transformers does not know, or a setting that it does not have.
    """
    if corpus is None:
        raise ConfigError("policy: a tokenizer is made from demonstrations, and the data set has none")
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = build_tokenizer(
        list(policy_texts(corpus, prompt)), config.tokenizer
    )  # read here: it iterates in a thread of its own
    description = _describe(config)
    description.vocab_size = len(tokenizer)
    description.bos_token_id = tokenizer.bos_token_id
    description.eos_token_id = tokenizer.eos_token_id
    description.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = AutoModelForCausalLM.from_config(description, dtype=torch.float32, trust_remote_code=False)
    record_metrics({"policy/parameters": model.num_parameters(), "policy/vocabulary": len(tokenizer)})
    return Checkpoint.write(lambda folder: save(folder, model, tokenizer))


def _describe(config: PolicyConfig) -> Any:
    from transformers import AutoConfig

    try:
        description = AutoConfig.for_model(config.architecture)
    except ValueError as error:
        raise ConfigError(f"policy.architecture: {error}") from None
    unknown = sorted(name for name in config.settings if not hasattr(description, name))
    if unknown:
        raise ConfigError(f"policy.settings: {config.architecture} has no setting {', '.join(unknown)}")
    return AutoConfig.for_model(config.architecture, **config.settings)


def policy_texts(corpus: Demonstrations, prompt: PromptConfig) -> Iterator[str]:
    """Yield everything the policy will read or write; the prompt's own parts once."""
    table = corpus.read()
    yield from (prompt.prefix, "".join(prompt.around()), prompt.suffix)
    if prompt.chat == "deepseek_math":
        yield "User: \n\nAssistant: "
    if (template := prompt.own_template()) is not None:
        yield template
    if prompt.system is not None:
        yield prompt.system
    if prompt.chat_template_kwargs:
        yield json.dumps(prompt.chat_template_kwargs, ensure_ascii=False)
    for column in ("question", "completion"):
        yield from table.column(column).to_pylist()
