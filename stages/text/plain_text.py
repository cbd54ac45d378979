"""Text as ids of ordinary tokens: no special or added token can come out of it, and no character is lost without a word."""

from __future__ import annotations

import json
import unicodedata
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


class PromptError(ValueError):
    """Text that cannot become a prompt; names the character, token or template at fault."""


@dataclass
class Plain:
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


_PLAIN: Final[weakref.WeakKeyDictionary[PreTrainedTokenizerFast, Plain]] = weakref.WeakKeyDictionary()


def plain_of(tokenizer: PreTrainedTokenizerFast) -> Plain:
    """Return the copies of a tokenizer, kept as long as it lives and knows no further token."""
    decoder = tokenizer.added_tokens_decoder
    added = frozenset(decoder) | frozenset(tokenizer.all_special_ids)
    known = _PLAIN.get(tokenizer)
    if known is None or known.added != added:  # a token may be added to a tokenizer at any time
        harmless = {number for number, token in decoder.items() if len(token.content) == 1 and not token.special}
        forbidden = added - (harmless - set(tokenizer.all_special_ids))
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        # Not `split_special_tokens`, which misses added tokens with special=False.
        text = _copy(description, added_tokens=[], post_processor=None)
        known = _PLAIN[tokenizer] = Plain(added, text, _copy(description), forbidden)
    return known


def _copy(description: dict[str, Any], **changes: Any) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(description | {"truncation": None, "padding": None} | changes))


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Encode each text as ids of ordinary tokens only; nothing is added.

    Raises:
        PromptError: a character the tokenizer cannot express.
    """
    plain = plain_of(tokenizer)
    _require_expressible(plain, texts)
    encoded: list[list[int]] = []
    encodings = plain.text.encode_batch_fast(list(texts), add_special_tokens=False)
    for text, encoding in zip(texts, encodings, strict=True):
        ids: list[int] = encoding.ids
        if not plain.forbidden.isdisjoint(ids):
            ids = _split_around(plain, text)
        encoded.append(ids)
    return encoded


def _split_around(plain: Plain, text: str) -> list[int]:
    """Encode `text` with each forbidden match character by character.

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


def _require_expressible(plain: Plain, texts: Sequence[str]) -> None:
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
