"""A tiny policy and rows for tests of training."""

from __future__ import annotations

import random
from typing import Any

import torch

from stages.models import Checkpoint, save
from stages.training.batching import Row, micro_batches
from stages.training.engine import Engine, StepReport
from stages.training.forward import completion_logprobs

VOCABULARY = 26


def tiny_model(**settings: Any) -> Any:
    """A Qwen2 of 2 layers, hidden 32, seeded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    description = AutoConfig.for_model(
        "qwen2",
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            **settings,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(description, attn_implementation="eager").eval()


def tiny_tokenizer() -> Any:
    """Its vocabulary is what the tests of training never look at."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(number): number for number in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="1", pad_token="2")


def tiny_checkpoint(**settings: Any) -> Checkpoint:
    """The tiny model as a checkpoint in the current store."""
    model, tokenizer = tiny_model(**settings), tiny_tokenizer()
    return Checkpoint.write(lambda folder: save(folder, model, tokenizer))


def random_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows of 2-6 prompt and 1-9 output tokens."""
    rng = random.Random(seed)

    def ids(shortest: int, longest: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(shortest, longest))]

    return [Row(ids(2, 6), ids(1, 9)) for _ in range(count)]


def accumulate(engine: Engine, rows: list[Row], *, max_tokens: int = 40, weight: float = 1.0) -> None:
    """Accumulate the gradient of the mean negative log-likelihood, times `weight`, over micro-batches."""
    targets = sum(len(row.output_ids) for row in rows)
    batches = list(micro_batches(rows, max_tokens))
    for number, batch in enumerate(batches):
        with engine.autocast():
            scored = completion_logprobs(engine.model, batch.to(engine.device))
        engine.backward(-weight * scored.logp_BO.sum() / targets, last=number == len(batches) - 1)


def update(engine: Engine, rows: list[Row], **options: Any) -> StepReport:
    """One supervised update."""
    accumulate(engine, rows, **options)
    return engine.step()
