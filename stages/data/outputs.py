"""Solutions of others as outputs: what reward models read, as if a policy had sampled it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.stage import record_metrics, stage
from stages.identity import DataError
from stages.models import Checkpoint, load_tokenizer
from stages.tables import Rollouts, Solutions
from stages.text import PromptConfig, encode_completions, encode_prompts

__all__ = ["solution_outputs"]


class _Encoded(NamedTuple):
    question_id: str
    sample: int
    prompt_ids: list[int]
    output_ids: list[int]

    @property
    def length(self) -> int:
        """Tokens, the question's included."""
        return len(self.prompt_ids) + len(self.output_ids)


@stage(version="1")
def solution_outputs(
    model: Checkpoint, solutions: Solutions, prompt: PromptConfig, *, max_tokens: int | None = None
) -> Rollouts:
    """Every solution as an output, its question the prompt, in ids of the model's tokenizer; the end of sequence last.

    No policy sampled these rows: they have no log-probabilities, temperature 1, seed 0 and finish reason `stop`.

    Args:
        model: its tokenizer and window; the weights have no influence.
        max_tokens: longer solutions, question included, are left out; None: none is.

    Metrics: `data/tokens_mean` and `data/tokens_most`, question included, and `data/left_out` (solutions).

    Raises:
        PromptError: a character that the tokenizer cannot express.
        DataError: a solution longer than the model's window, by its row; or all are left out.
    """
    from stages.text import decode_outputs

    tokenizer, every = load_tokenizer(model), solutions.rows()
    prompts = encode_prompts(tokenizer, [row["question"] for row in every], prompt)
    outputs = encode_completions(tokenizer, [row["solution"] for row in every])
    encoded = [
        _Encoded(row["question_id"], row["sample"], asked, output)
        for row, asked, output in zip(every, prompts, outputs, strict=True)
    ]
    rows = [row for row in encoded if max_tokens is None or row.length <= max_tokens]
    _check_window(model, rows)
    decoded = decode_outputs(tokenizer, [row.output_ids for row in rows])
    lengths = [row.length for row in rows]
    tokens = {"data/tokens_mean": sum(lengths) / len(lengths), "data/tokens_most": max(lengths)}
    record_metrics({**tokens, "data/left_out": len(encoded) - len(rows)})
    return Rollouts.write(
        {
            "question_id": [row.question_id for row in rows],
            "sample": [row.sample for row in rows],
            "prompt_ids": [row.prompt_ids for row in rows],
            "output_ids": [row.output_ids for row in rows],
            "logprobs": [None] * len(rows),
            "finish_reason": ["stop"] * len(rows),
            "text": decoded.texts,
            "text_ends": decoded.ends,
            "temperature": [1.0] * len(rows),
            "seed": [0] * len(rows),
        }
    )


def _check_window(model: Checkpoint, rows: Sequence[_Encoded]) -> None:
    if not rows:
        raise DataError("every solution is longer than max_tokens; choose a larger one")
    window = json.loads((model.path / "config.json").read_text()).get("max_position_embeddings")
    longest = max(rows, key=lambda row: row.length)
    if window is not None and longest.length > window:
        raise DataError(
            f"solution {(longest.question_id, longest.sample)}: expected at most {window} tokens with its question (the "
            f"model's window), found {longest.length}, the longest of all; leave such out with max_tokens, or take a model "
            "with a larger window"
        )
