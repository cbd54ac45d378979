r"""Prompts as token ids: templates around a question whose text can inject nothing.

A prompt is `before + question + after`. Special and added tokens act where *we* wrote them, in `before` and `after`; in the
question they are text: a user who writes `<|im_end|>` gets those characters encoded, not a turn that ends. Between the last
token of `before` and the first of `after` everything is encoded in one piece by a copy of the tokenizer that knows no added
tokens, so that an ordinary template gives the same ids as encoding the whole string. The ids are then checked: no id of that
piece is one of a special or added token.

Also checked: that the tokenizer can express the text. Byte-level BPE drops bytes that are not in its vocabulary silently.

The paper's prompts (DeepSeekMath README) are raw strings here: in the README's own example "\b" of "\boxed" is a backspace.
"""

from __future__ import annotations

import json
import unicodedata
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from pipeline.config import Config

if TYPE_CHECKING:
    from tokenizers import Tokenizer
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


class PromptError(ValueError):
    """Text that cannot become a prompt; names the character, token or template at fault."""


class PromptConfig(Config):
    """What stands around a question. The parts nest: `prefix`, chat turn, question, instruction, end of turn, `suffix`."""

    template: Literal["raw", "deepseek_math_en", "deepseek_math_zh"] = "raw"
    """The instruction behind the question: none, or the paper's chain-of-thought prompt in English or Chinese."""
    chat: Literal["none", "deepseek_math", "tokenizer"] = "none"
    """The turn around question and instruction: none, the paper's `User: ...` and `Assistant:` (no system prompt), or the
    tokenizer's own chat template with its generation prompt."""
    prefix: str = ""
    """Text before everything, for example `Question: `. Special tokens written here act as such."""
    suffix: str = ""
    """Text behind everything, for example a newline or `Answer:` on a line of its own. Special tokens written here act."""


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
    bodies = _encode_texts(tokenizer, [frame.lead + question + frame.tail for question in questions])
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
    return [[*ids, tokenizer.eos_token_id] for ids in _encode_texts(tokenizer, completions)]


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """`text` as ids of ordinary tokens only; nothing is added and no special or added token can come out.

    Raises:
        PromptError: a character the tokenizer cannot express.
    """
    return _encode_texts(tokenizer, [text])[0]


class _Frame(NamedTuple):
    """A template cut at its outermost added tokens: ids | text lead, question, text tail | ids."""

    head_ids: list[int]
    lead: str
    tail: str
    end_ids: list[int]


@dataclass
class _Plain:
    """What encoding needs of one tokenizer, made once: copies, because calls with padding, truncation or
    `split_special_tokens` leave those switched on in the tokenizer they were made on."""

    added: frozenset[int]
    """Ids of every special and added token."""
    text: Tokenizer
    """A copy of the backend that knows no added tokens."""
    template: Tokenizer
    """A copy that knows them."""
    forbidden: frozenset[int]
    """Ids that text must not give: `added` less added tokens that are one ordinary character (Gemma's newline)."""
    expressible: set[str] = field(default_factory=set)
    """Characters found to be encoded without loss."""


_PLAIN: Final[weakref.WeakKeyDictionary[PreTrainedTokenizerFast, _Plain]] = weakref.WeakKeyDictionary()


def _plain(tokenizer: PreTrainedTokenizerFast) -> _Plain:
    decoder = tokenizer.added_tokens_decoder
    added = frozenset(decoder) | frozenset(tokenizer.all_special_ids)
    known = _PLAIN.get(tokenizer)
    if known is None or known.added != added:  # a token may be added to a tokenizer at any time
        harmless = {number for number, token in decoder.items() if len(token.content) == 1 and not token.special}
        forbidden = added - (harmless - set(tokenizer.all_special_ids))
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        # Not `split_special_tokens`, which misses added tokens with special=False.
        text = _copy(description, added_tokens=[], post_processor=None)
        known = _PLAIN[tokenizer] = _Plain(added, text, _copy(description), forbidden)
    return known


def _copy(description: dict[str, Any], **changes: Any) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(description | {"truncation": None, "padding": None} | changes))


def _encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    plain = _plain(tokenizer)
    _require_expressible(plain, texts)
    encoded: list[list[int]] = []
    encodings = plain.text.encode_batch_fast(list(texts), add_special_tokens=False)
    for text, encoding in zip(texts, encodings, strict=True):
        ids: list[int] = encoding.ids
        if not plain.forbidden.isdisjoint(ids):
            ids = _split_around(plain, text)
        encoded.append(ids)
    return encoded


def _split_around(plain: _Plain, text: str) -> list[int]:
    """`text` with each forbidden match encoded character by character.

    For added tokens that the model's own vocabulary also holds as a word, which encoding can then reach without them.
    """
    ids: list[int] = []
    encoding = plain.text.encode(text, add_special_tokens=False)
    for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if number not in plain.forbidden:
            ids.append(number)
            continue
        for character in text[start:end]:
            ids += plain.text.encode(character, add_special_tokens=False).ids
    if found := plain.forbidden.intersection(ids):
        raise PromptError(f"text gives the special or added tokens {sorted(found)}: {text[:80]!r}")
    return ids


def _require_expressible(plain: _Plain, texts: Sequence[str]) -> None:
    """Refuse characters that a tokenizer drops or replaces; each is tried once for a tokenizer.

    Texts are read in NFC: a tokenizer that composes accents loses nothing.
    """
    characters: set[str] = set()
    for text in texts:
        characters.update(text if text.isascii() else unicodedata.normalize("NFC", text))
    for character in sorted(characters - plain.expressible):
        ids = plain.text.encode(character, add_special_tokens=False).ids
        decoded = plain.text.decode(ids, skip_special_tokens=False)
        lost = not ids or not plain.forbidden.isdisjoint(ids) or ("\ufffd" in decoded and character != "\ufffd")
        if lost:
            where = next(text for text in texts if character in unicodedata.normalize("NFC", text))
            raise PromptError(
                f"the tokenizer cannot express the character {character!r} (U+{ord(character):04X}) of {where[:80]!r}; "
                "use a byte-level tokenizer or one made from this text"
            )
        plain.expressible.add(character)


def _frame(tokenizer: PreTrainedTokenizerFast, config: PromptConfig) -> _Frame:
    before, after = "", INSTRUCTIONS[config.template]
    if config.chat == "deepseek_math":
        before, after = "User: " + before, after + "\n\nAssistant:"
    elif config.chat == "tokenizer":
        before, after = _chat_turn(tokenizer, after)
    before, after = config.prefix + before, after + config.suffix
    plain = _plain(tokenizer)
    head_ids, lead = _cut_behind_last(plain, before)
    tail, end_ids = _cut_before_first(plain, after)
    if config.chat != "tokenizer":
        start = _start_ids(plain)
        head_ids = head_ids if head_ids[: len(start)] == start else start + head_ids
    return _Frame(head_ids, lead, tail, end_ids)


def _chat_turn(tokenizer: PreTrainedTokenizerFast, instruction: str) -> tuple[str, str]:
    """What the tokenizer's chat template writes before the question and behind it, the instruction included."""
    if not tokenizer.chat_template:
        raise PromptError("chat is 'tokenizer', but this tokenizer has no chat template; set chat to another value")
    # A stand-in, so that the template sees no user text: two private-use characters that no template trims or tests for.
    stand_in = "\ue000\ue001"
    messages = [{"role": "user", "content": stand_in + instruction}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, found, after = str(rendered).partition(stand_in)
    if not found or stand_in in after:
        raise PromptError("the tokenizer's chat template does not write the user's message exactly once, as it is")
    return before, after


def _cut_behind_last(plain: _Plain, text: str) -> tuple[list[int], str]:
    """Ids up to the last added token of `text`, and the text behind it."""
    encoding = plain.template.encode(text, add_special_tokens=False)
    last = max((place for place, number in enumerate(encoding.ids) if number in plain.added), default=None)
    if last is None:
        return [], text
    return encoding.ids[: last + 1], text[encoding.offsets[last][1] :]


def _cut_before_first(plain: _Plain, text: str) -> tuple[str, list[int]]:
    """The text before the first added token of `text`, and ids from there on."""
    encoding = plain.template.encode(text, add_special_tokens=False)
    first = next((place for place, number in enumerate(encoding.ids) if number in plain.added), None)
    if first is None:
        return text, []
    return text[: encoding.offsets[first][0]], encoding.ids[first:]


def _start_ids(plain: _Plain) -> list[int]:
    """The ids the tokenizer puts before any text: its beginning of sequence, or nothing."""
    encoding = plain.template.encode("a", add_special_tokens=True)
    mask: list[int] = encoding.special_tokens_mask
    return encoding.ids[: mask.index(0)] if 0 in mask else []
