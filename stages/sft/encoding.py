"""Demonstrations as token ids: what supervised fine-tuning trains on, and what stands in the place of sampled outputs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from stages.models import Checkpoint
from stages.text import PromptConfig, encode_completions, encode_prompts

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerFast

__all__ = ["encode_demonstrations"]

Ids = tuple[list[int], list[int]]


def encode_demonstrations(
    policy: Checkpoint, tokenizer: PreTrainedTokenizerFast, table: pa.Table, prompt: PromptConfig
) -> list[Ids]:
    """(prompt ids, completion ids with the end of sequence) of every row of a table of demonstrations.

    Raises:
        PromptError: a character that the tokenizer cannot express.
        ValueError: a demonstration longer than the model's window, by its question.
    """
    questions = encode_prompts(tokenizer, table.column("question").to_pylist(), prompt)
    completions = encode_completions(tokenizer, table.column("completion").to_pylist())
    rows = list(zip(questions, completions, strict=True))
    window = json.loads((policy.path / "config.json").read_text()).get("max_position_embeddings")
    for question_id, (prompt_ids, completion_ids) in zip(table.column("question_id").to_pylist(), rows, strict=True):
        length = len(prompt_ids) + len(completion_ids)
        if window is not None and length > window:
            raise ValueError(
                f"demonstration of question {question_id!r}: expected at most {window} tokens (the model's window), found "
                f"{length}; shorten or drop it, or take a model with a larger window"
            )
    return rows
