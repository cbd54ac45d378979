"""Text to ids of ordinary tokens; ids back to text, where in the text each id ends, and the steps of process supervision.

`text_ends[t]` is the length of the text once id t is decoded, special tokens skipped. Where a token ends inside a character
(byte-level BPE splits those of several bytes) the end stays in front of the character until its last byte has come.

Shapes: N outputs, M their ids one output after another.
"""

from __future__ import annotations

import codecs
import json
import unicodedata
import weakref
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from stages.text.chat_templates import PromptError
from stages.text.tokenizers import byte_symbols

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_OF = {symbol: byte for byte, symbol in byte_symbols().items()}


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
    encodings = plain.text.encode_batch_fast(list(texts), add_special_tokens=False)
    return [
        encoding.ids if plain.forbidden.isdisjoint(encoding.ids) else _split_around(plain, text)
        for text, encoding in zip(texts, encodings, strict=True)
    ]


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


class Decoded(NamedTuple):
    """Outputs as text."""

    texts: list[str]
    """What `batch_decode` makes of each output, special tokens skipped."""
    ends: list[NDArray[np.int32]]
    """For each output one end per id: non-decreasing, the last is the length of the text."""


def decode_outputs(tokenizer: PreTrainedTokenizerFast, outputs: Sequence[Sequence[int] | NDArray[np.int32]]) -> Decoded:
    """Decode every output into its text and ends.

    Bytes that are no character become U+FFFD; those at the very end belong to the last id. A tokenizer whose `batch_decode`
    rewrites text afterwards (spaces before punctuation) has ends cut to the text, right up to the characters rewritten.

    Linear in the ids. (Tokenizers that are not byte-level BPE: but for long runs of bytes that are no character.)
    """
    import numpy as np

    if not outputs:
        return Decoded([], [])
    texts: list[str] = tokenizer.batch_decode(outputs, skip_special_tokens=True)
    backend = tokenizer.backend_tokenizer
    length_N = np.array([len(ids) for ids in outputs])
    size_M = _sizes(backend, np.concatenate(outputs).astype(np.int64))
    output_M = np.repeat(np.arange(len(outputs)), length_N)
    size_N = np.bincount(output_M, weights=size_M, minlength=len(outputs)).astype(np.int64)
    by_bytes_N = _is_by_bytes(backend, texts, size_N)
    ends_M = _ends_by_bytes(size_M * by_bytes_N[output_M], texts, by_bytes_N, output_M)
    ends = np.split(ends_M, np.cumsum(length_N)[:-1])
    for row in np.flatnonzero(~by_bytes_N).tolist():
        ends[row] = _ends_one_by_one(backend, outputs[row], texts[row])
    return Decoded(texts, ends)


def _sizes(backend: Any, ids_M: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bytes that each id adds to its output, in byte-level BPE: none for special tokens and unknown ids."""
    import numpy as np

    added = backend.get_added_tokens_decoder()
    used, place = np.unique(ids_M, return_inverse=True)
    size = np.zeros(len(used), dtype=np.int64)
    for index, token_id in enumerate(used.tolist()):
        token = backend.id_to_token(token_id) or ""
        if token_id not in added:
            size[index] = len(token)  # one symbol is one byte
        elif not added[token_id].special:
            size[index] = len(token.encode())
    return size[place]


def _is_by_bytes(backend: Any, texts: Sequence[str], size_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return whether the bytes of an output's tokens are those of its text: in byte-level BPE, without broken bytes."""
    import numpy as np
    from tokenizers import decoders

    if not isinstance(backend.decoder, decoders.ByteLevel):
        return np.zeros(len(texts), dtype=bool)
    same = [len(text.encode()) == size and REPLACEMENT not in text for text, size in zip(texts, size_N, strict=True)]
    return np.array(same, dtype=bool)


def _ends_by_bytes(
    size_M: NDArray[np.int64], texts: Sequence[str], by_bytes_N: NDArray[np.bool_], output_M: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Return the ends of all tokens at once, by adding up sizes; texts not in `by_bytes_N` count as empty."""
    import numpy as np

    kept = [text if kept else "" for text, kept in zip(texts, by_bytes_N, strict=True)]
    encoded = np.frombuffer("".join(kept).encode(), dtype=np.uint8)
    begins = np.append((encoded & 0xC0) != 0x80, True)
    # Characters begun within the first k bytes of all texts, less the one that is still open there.
    complete = np.append(0, np.cumsum(begins[:-1])) - ~begins
    before_N = np.cumsum([0, *map(len, kept)])[:-1]
    ends: NDArray[np.int32] = (complete[np.cumsum(size_M)] - before_N[output_M]).astype(np.int32)
    return ends


def _ends_one_by_one(backend: Any, ids: Sequence[int] | NDArray[np.int32], text: str) -> NDArray[np.int32]:
    """Return the ends by decoding id after id: for broken bytes, and for tokenizers whose tokens are not bytes."""
    import numpy as np
    from tokenizers import decoders

    step = _byte_stream(backend) if isinstance(backend.decoder, decoders.ByteLevel) else _token_stream(backend)
    lengths = np.cumsum([len(step(int(token_id))) for token_id in ids])
    ends: NDArray[np.int32] = np.minimum(lengths, len(text)).astype(np.int32)
    ends[-1:] = len(text)
    return ends


def _byte_stream(backend: Any) -> Callable[[int], str]:
    """Return what gives each id's addition to the text, for ids of byte-level BPE given in turn."""
    added = backend.get_added_tokens_decoder()
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def step(token_id: int) -> str:
        token = backend.id_to_token(token_id)
        if token is None or (token_id in added and added[token_id].special):
            return ""
        return decode(token_bytes(token))

    return step


def token_bytes(token: str) -> bytes:
    """Return the bytes that a token of byte-level BPE stands for; an added one may be plain text."""
    try:
        return bytes([_BYTE_OF[symbol] for symbol in token])
    except KeyError:
        return token.encode()


def _token_stream(backend: Any) -> Callable[[int], str]:
    """Return what gives each id's addition to the text, for ids given in turn, by any decoder."""
    from tokenizers.decoders import DecodeStream

    stream, ids, length = DecodeStream(skip_special_tokens=True), list[int](), 0

    def step(token_id: int) -> str:
        nonlocal stream, length
        ids.append(token_id)
        try:
            added: str = stream.step(backend, token_id) or ""
        except Exception:  # its only class: bytes that were characters are none together with this one
            added = backend.decode(ids, skip_special_tokens=True)[length:]
            stream = DecodeStream(ids=ids, skip_special_tokens=True)
        length += len(added)
        return added

    return step


def step_ends(text: str, text_ends: Sequence[int]) -> list[int]:
    """Return index(j) of every step of `text` (DeepSeekMath, 4.1.3): places among its tokens, in order.

    The paper does not say how an output is cut. Here a step is a line with its newline, and index(j) the token that completes
    it. The last step reaches to the last token, the end of sequence included. Empty lines belong to the next step, or to
    the last; a text without any line is one step. An output without tokens has none.

    Args:
        text: the output.
        text_ends: for each of its tokens the length of `text` once that token is decoded.
    """
    if not text_ends:
        return []
    last, position, ends = len(text_ends) - 1, 0, []
    for line in text.split("\n"):
        # The newline is part of its line; the first token that reaches behind it ends the step.
        if line:
            ends.append(min(bisect_left(text_ends, position + len(line) + 1), last))
        position += len(line) + 1
    return [*ends[:-1], last]
