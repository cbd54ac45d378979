r"""Prompts as token ids: templates around a question whose text can inject nothing.

A prompt is `before + question + after`. Special and added tokens act where *we* wrote them, in `before` and `after`; in the
question they are text: a user who writes `<|im_end|>` gets those characters encoded, not a turn that ends. Between the last
token of `before` and the first of `after` everything is encoded in one piece by a copy of the tokenizer that knows no added
tokens, so that an ordinary template gives the same ids as encoding the whole string. The ids are then checked: no id of that
piece is one of a special or added token.

Also checked: that the tokenizer can express the text. Byte-level BPE drops bytes that are not in its vocabulary silently.

The paper's prompts (DeepSeekMath README) have two backslashes here: in the README's own example "\b" of "\boxed" is a
backspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self

from pydantic import model_validator

from pipeline.config import Config
from stages.plain_text import Plain, PromptError, encode_texts, plain_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "INSTRUCTIONS",
    "PromptConfig",
    "PromptError",
    "encode_completion",
    "encode_completions",
    "encode_prompt",
    "encode_prompts",
    "encode_text",
]

INSTRUCTIONS: Final = {
    "raw": "",
    "deepseek_math_en": "\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "deepseek_math_zh": "\n请通过逐步推理来解答问题，并把最终答案放置于\\boxed{}中。",
}


class PromptConfig(Config):
    """What stands around a question. The parts nest: `prefix`, chat turn, question, instruction, end of turn, `suffix`."""

    template: Literal["raw", "deepseek_math_en", "deepseek_math_zh"] = "raw"
    """The instruction behind the question: none, or the paper's chain-of-thought prompt in English or Chinese."""
    chat: Literal["none", "deepseek_math", "tokenizer"] = "none"
    """The turn around question and instruction: none, the paper's `User: ...` and `Assistant:` (no system prompt), or the
    tokenizer's own chat template with its generation prompt."""
    chat_template: str | None = None
    """With `chat: tokenizer`, a Jinja template in place of the tokenizer's own: its text, or a file that ends in `.jinja`. It
    sees `messages` (one of the role `user`) and `add_generation_prompt`, in transformers' sandbox."""
    prefix: str = ""
    """Text before everything, for example `Question: `. Special tokens written here act as such."""
    suffix: str = ""
    """Text behind everything, for example a newline or `Answer:` on a line of its own. Special tokens written here act."""

    @model_validator(mode="after")
    def _template_is_used(self) -> Self:
        if self.chat_template is not None and self.chat != "tokenizer":
            raise ValueError(
                f"chat_template: is read where chat is tokenizer, and chat is {self.chat}; set chat=tokenizer"
            )
        return self

    def key(self) -> dict[str, Any]:
        """A template of one's own counts by its text; without one the key is what it was before there could be one."""
        parts = super().key()
        del parts["chat_template"]
        return parts if self.chat_template is None else {**parts, "chat_template": self.own_template()}

    def own_template(self) -> str | None:
        """The text of `chat_template`, read from its file where it names one.

        Raises:
            PromptError: the file cannot be read.
        """
        given = self.chat_template
        if given is None or "{" in given or not given.endswith(".jinja"):
            return given
        try:
            return Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(
                f"prompt.chat_template: {given} cannot be read ({error}); name a Jinja file, or its text"
            ) from None


def encode_prompt(tokenizer: PreTrainedTokenizerFast, question: str, config: PromptConfig) -> list[int]:
    """The prompt of one question as ids; see `encode_prompts`."""
    return encode_prompts(tokenizer, [question], config)[0]


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast, questions: Sequence[str], config: PromptConfig
) -> list[list[int]]:
    """The prompts of `questions` as ids, in order.

    A beginning-of-sequence token comes first, once, if the tokenizer adds one; where a chat template is used, the template
    alone decides about it, as in transformers' `apply_chat_template`.

    Raises:
        PromptError: a question holds a character the tokenizer cannot express, or the chat template is missing or unusable.
    """
    frame = _frame(tokenizer, config)
    bodies = encode_texts(tokenizer, [frame.lead + question + frame.tail for question in questions])
    return [frame.head_ids + body + frame.end_ids for body in bodies]


def encode_completion(tokenizer: PreTrainedTokenizerFast, completion: str) -> list[int]:
    """A supervised target as ids: the text, then the end of sequence; see `encode_completions`."""
    return encode_completions(tokenizer, [completion])[0]


def encode_completions(tokenizer: PreTrainedTokenizerFast, completions: Sequence[str]) -> list[list[int]]:
    """Supervised targets as ids. The end of sequence is part of the target: without it a policy never learns to stop.

    Raises:
        PromptError: a character the tokenizer cannot express, or a tokenizer without an end of sequence.
    """
    if tokenizer.eos_token_id is None:
        raise PromptError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    return [[*ids, tokenizer.eos_token_id] for ids in encode_texts(tokenizer, completions)]


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """`text` as ids of ordinary tokens only; nothing is added and no special or added token can come out.

    Raises:
        PromptError: a character the tokenizer cannot express.
    """
    return encode_texts(tokenizer, [text])[0]


class _Frame(NamedTuple):
    """A template cut at its outermost added tokens: ids | text lead, question, text tail | ids."""

    head_ids: list[int]
    lead: str
    tail: str
    end_ids: list[int]


def _frame(tokenizer: PreTrainedTokenizerFast, config: PromptConfig) -> _Frame:
    before, after = "", INSTRUCTIONS[config.template]
    if config.chat == "deepseek_math":
        before, after = "User: " + before, after + "\n\nAssistant:"
    elif config.chat == "tokenizer":
        before, after = _chat_turn(tokenizer, after, config.own_template())
    before, after = config.prefix + before, after + config.suffix
    plain = plain_of(tokenizer)
    head_ids, lead = _cut_behind_last(plain, before)
    tail, end_ids = _cut_before_first(plain, after)
    if config.chat != "tokenizer":
        start = _start_ids(plain)
        head_ids = head_ids if head_ids[: len(start)] == start else start + head_ids
    return _Frame(head_ids, lead, tail, end_ids)


def _chat_turn(tokenizer: PreTrainedTokenizerFast, instruction: str, template: str | None) -> tuple[str, str]:
    """What the chat template writes before the question and behind it, the instruction included."""
    from jinja2 import TemplateError

    if not (template or tokenizer.chat_template):
        raise PromptError(
            "chat is 'tokenizer', but this tokenizer has no chat template; set chat to another value, or chat_template"
        )
    # A stand-in, so that the template sees no user text: two private-use characters that no template trims or tests for.
    stand_in = "\ue000\ue001"
    messages = [{"role": "user", "content": stand_in + instruction}]
    try:
        # `None` is the tokenizer's own. Either is rendered in jinja2's immutable sandbox.
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise PromptError(f"the chat template cannot be rendered: {type(error).__name__}: {error}") from None
    before, found, after = str(rendered).partition(stand_in)
    if not found or stand_in in after:
        raise PromptError("the chat template does not write the user's message exactly once, as it is")
    return before, after


def _cut_behind_last(plain: Plain, text: str) -> tuple[list[int], str]:
    """Ids up to the last added token of `text`, and the text behind it."""
    encoding = plain.template.encode(text, add_special_tokens=False)
    last = max((place for place, number in enumerate(encoding.ids) if number in plain.added), default=None)
    if last is None:
        return [], text
    return encoding.ids[: last + 1], text[encoding.offsets[last][1] :]


def _cut_before_first(plain: Plain, text: str) -> tuple[str, list[int]]:
    """The text before the first added token of `text`, and ids from there on."""
    encoding = plain.template.encode(text, add_special_tokens=False)
    first = next((place for place, number in enumerate(encoding.ids) if number in plain.added), None)
    if first is None:
        return text, []
    return text[: encoding.offsets[first][0]], encoding.ids[first:]


def _start_ids(plain: Plain) -> list[int]:
    """The ids the tokenizer puts before any text: its beginning of sequence, or nothing."""
    encoding = plain.template.encode("a", add_special_tokens=True)
    mask: list[int] = encoding.special_tokens_mask
    return encoding.ids[: mask.index(0)] if 0 in mask else []
