"""Prompts that leave no room for an output: found before anything is sampled, and refused or left out by policy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from pydantic import Field, model_validator

from pipeline.artifact import take_rows
from pipeline.config import Config
from pipeline.stage import record_metrics, stage
from stages.models import Checkpoint, load_tokenizer
from stages.tables import DataError, Questions
from stages.text import PromptConfig, encode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BATCH: Final = 4096


class PromptLimitConfig(Config):
    """How long a prompt may be, and what becomes of a question whose prompt is longer.

    A number or a policy may take its place: `max_prompt_tokens: 512`, `max_prompt_tokens: drop`.
    """

    tokens: int | None = Field(None, ge=1)
    """Tokens of a prompt at most, with all that is around the question; null: as many as the model's window and
    `rollout.backend.max_model_len` leave next to `rollout.max_output_tokens`."""
    longer: Literal["refuse", "drop"] = "refuse"
    """`refuse`: the run does not start. `drop`: it goes on without these questions, held-out ones too, and says how many."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"longer": given}
        return {"tokens": given} if isinstance(given, int) and not isinstance(given, bool) else given


class PromptRoom(NamedTuple):
    """What bounds a prompt."""

    window: int | None
    """Tokens of prompt and output that the model reads; None: it names no limit."""
    max_model_len: int | None
    """That the engine reads; None: no other limit."""
    max_output_tokens: int
    limit: PromptLimitConfig

    @property
    def tokens(self) -> int | None:
        """Return tokens that a prompt may have; None: any number."""
        bounds = [bound - self.max_output_tokens for bound in (self.window, self.max_model_len) if bound is not None]
        return min([*bounds, *([self.limit.tokens] if self.limit.tokens else [])], default=None)

    def __str__(self) -> str:
        parts = [f"data.max_prompt_tokens={self.limit.tokens}"] if self.limit.tokens else []
        if self.window is not None:
            parts.append(f"the model's window of {self.window:,}")
        if self.max_model_len is not None:
            parts.append(f"rollout.backend.max_model_len={self.max_model_len}")
        return f"{', '.join(parts)}, with rollout.max_output_tokens={self.max_output_tokens}"


class PromptLengths(NamedTuple):
    """The prompts of a set."""

    longest: int
    """Tokens of the longest."""
    longest_row: int
    longer: list[int]
    """Rows above the limit."""

    def complaint(self, ids: Sequence[str], room: PromptRoom) -> str:
        """Return why the set cannot be used, with counts and what to do."""
        most = room.limit.tokens
        setting = "drop" if most is None else f"{{tokens: {most}, longer: drop}}"
        count, longest = f"{len(self.longer):,} of {len(ids):,} questions", ids[self.longest_row]
        return (
            f"{count} have prompts above {max(room.tokens or 0, 0):,} tokens ({room}); the longest is that of question "
            f"{longest!r}, of {self.longest:,}: set data.max_prompt_tokens={setting!r} to go on without them, "
            "lower rollout.max_output_tokens, or take a model with a larger window"
        )


@stage(version="1")
def limit_prompts(
    model: Checkpoint,
    questions: Questions,
    prompt: PromptConfig,
    limit: PromptLimitConfig,
    *,
    max_output_tokens: int,
    max_model_len: int | None,
) -> Questions:
    """Keep the questions whose prompts leave room for an output, in their order.

    Args:
        model: its tokenizer and window; the weights have no influence.
        max_model_len: tokens of prompt and output that the engine reads; None: no limit but the model's window.

    Metrics: `data/questions` (that are left), `data/dropped`, `data/longest_prompt` (tokens, of all).

    Raises:
        DataError: there are longer ones, and `limit` refuses them; or none is left.
        PromptError: a character that the tokenizer cannot express.
    """
    table = questions.read()
    window = json.loads((model.described / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    room = PromptRoom(window, max_model_len, max_output_tokens, limit)
    lengths = measure_prompts(load_tokenizer(model), table.column("question").to_pylist(), prompt, room)
    if lengths.longer and (limit.longer == "refuse" or len(lengths.longer) == table.num_rows):
        raise DataError(lengths.complaint(table.column("question_id").to_pylist(), room))
    left_out = set(lengths.longer)
    kept = [row for row in range(table.num_rows) if row not in left_out]
    record_metrics({"data/questions": len(kept), "data/dropped": len(left_out), "data/longest_prompt": lengths.longest})
    return Questions.write(take_rows(table, kept) if left_out else table)


def measure_prompts(
    tokenizer: PreTrainedTokenizerFast, questions: Sequence[str], prompt: PromptConfig, room: PromptRoom
) -> PromptLengths:
    """Measure the prompts of `questions`, and find those that exceed `room`."""
    lengths: list[int] = []
    for start in range(0, len(questions), _BATCH):
        lengths += map(len, encode_prompts(tokenizer, questions[start : start + _BATCH], prompt))
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    most = room.tokens
    longer = [] if most is None else [row for row, length in enumerate(lengths) if length > most]
    return PromptLengths(lengths[longest], longest, longer)
