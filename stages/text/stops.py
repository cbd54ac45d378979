"""Stop strings: find the token whose text completes one, in ids that are sampled one after another.

The text is what the tokenizer's decoder makes of the ids of an output, special tokens left out, before any clean-up of spaces:
for byte-level BPE the text that rewards read. A token completes a string when the text has the string with the token and not
without it, be it within the token or across several, the beginning of further text in it or not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.config import ConfigError
from stages.text.ids import REPLACEMENT, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Integers = NDArray[np.int32] | NDArray[np.int64]
_SPACE: Final = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's mark for a space."""
_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte of a character that is no token, as SentencePiece spells it."""


class StopStrings:
    """Say which tokens complete one of some strings. `V` is the vocabulary, `N` are tokens.

    Most tokens cannot end a string, which a table of the vocabulary says of many tokens at once; the ids before a token are
    looked at only where it can.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, strings: Sequence[str], *, setting: str = "rollout.stop_strings"
    ) -> None:
        """Prepare for the ids of a tokenizer; `setting` is what names the strings, for errors.

        Raises:
            ConfigError: a decoder of another kind, or a string that no text can have or that stands for a special token.
        """
        self.strings = tuple(strings)
        self._backend = tokenizer.backend_tokenizer
        self._by_bytes = _is_by_bytes(self._backend)
        self._pieces = _pieces(self._backend, by_bytes=self._by_bytes)
        self._wanted = [string.encode() for string in strings]
        _refuse_special(self._backend, strings, setting)
        for string, wanted in zip(strings, self._wanted, strict=True):
            if not _can_be_spelled(wanted, self._pieces):
                raise ConfigError(
                    f"{setting}: expected text that the policy's tokenizer can write, found {string!r}, which no "
                    "sequence of its tokens has; correct the string"
                )
        # What a string ends with is what a token that ends it begins with, unless it has all of it.
        endings = tuple({wanted[at:] for wanted in self._wanted for at in range(len(wanted))})
        able = [piece.startswith(endings) or any(wanted in piece for wanted in self._wanted) for piece in self._pieces]
        self._able_V = np.array([*able, False])

    @property
    def of_any_prompt(self) -> list[str]:
        """Return the strings that an engine whose decoder has seen the prompt finds no earlier than they are completed.

        SentencePiece writes no space before an output's first word, and one behind a prompt.
        """
        return [string for string in self.strings if self._by_bytes or not string.startswith(" ")]

    def may_complete(self, ids_N: Integers) -> NDArray[np.bool_]:
        """Return whether each token could complete a string; False for ids that are no token."""
        none = len(self._able_V) - 1
        found: NDArray[np.bool_] = self._able_V[np.where((ids_N < 0) | (ids_N > none), none, ids_N)]
        return found

    def completes(self, ids_N: Integers) -> bool:
        """Return whether the last of an output's ids, of which it `may_complete` a string, does so."""
        if not self._by_bytes:
            return self._appears(ids_N)
        last, at = self._pieces[ids_N[-1]], len(ids_N) - 1
        text, enough = last, len(last) + max(map(len, self._wanted)) - 1
        while at > 0 and len(text) < enough:
            at -= 1
            text = (self._pieces[ids_N[at]] if 0 <= ids_N[at] < len(self._pieces) else b"") + text
        return any(wanted in text[1 - len(last) - len(wanted) :] for wanted in self._wanted)

    def first(self, ids_N: Integers, begun: Sequence[int] = ()) -> int | None:
        """Return the place of the first token that completes a string; None where none does.

        Args:
            begun: ids in front of these that belong to the output.
        """
        places = np.flatnonzero(self.may_complete(ids_N))
        whole = np.concatenate([np.array(begun, dtype=ids_N.dtype), ids_N]) if len(places) else ids_N
        return next((int(place) for place in places if self.completes(whole[: len(begun) + place + 1])), None)

    def _appears(self, ids_N: Integers) -> bool:
        """Do what `completes` says by decoding twice: what a token adds to the text depends on those before it."""
        ids = ids_N.tolist()
        before, after = (self._backend.decode(part, skip_special_tokens=True) for part in (ids[:-1], ids))
        same = len(before.rstrip(REPLACEMENT))  # what is broken may become a character
        return any(string in after[max(0, same + 1 - len(string)) :] for string in self.strings)


def require_stop_ids(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> None:
    """Refuse ids that are no token of the tokenizer.

    Raises:
        ConfigError: names the first.
    """
    wrong = next((number for number in ids if tokenizer.backend_tokenizer.id_to_token(number) is None), None)
    if wrong is not None:
        raise ConfigError(
            f"rollout.stop_ids: expected ids of the policy's tokenizer, 0 to {len(tokenizer) - 1}, found {wrong}; correct it"
        )


def _is_by_bytes(backend: Any) -> bool:
    """Return whether tokens are bytes of the text; else they are SentencePiece's.

    Raises:
        ConfigError: neither.
    """
    from tokenizers import decoders

    if isinstance(backend.decoder, decoders.ByteLevel):
        return True
    described = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": None}
    unknown = next((part for part in described.get("decoders", [described]) if not _is_of_sentencepiece(part)), None)
    if unknown is not None:
        raise ConfigError(
            "rollout.stop_strings: expected a tokenizer that decodes as byte-level BPE or SentencePiece do, found the decoder "
            f"{unknown['type']}; set rollout.stop_strings=[] and name tokens in rollout.stop_ids"
        )
    return False


def _is_of_sentencepiece(decoder: dict[str, Any]) -> bool:
    match decoder:
        case {"type": "ByteFallback" | "Fuse"}:
            return True
        case {"type": "Metaspace", "replacement": mark} | {
            "type": "Replace",
            "pattern": {"String": mark},
            "content": " ",
        }:
            return bool(mark == _SPACE)
        case {"type": "Strip", "stop": 0}:
            return True
    return False


def _pieces(backend: Any, *, by_bytes: bool) -> list[bytes]:
    """Return for each id the bytes that it brings to the text at most: none for special tokens and gaps."""
    added, vocabulary = backend.get_added_tokens_decoder(), backend.get_vocab(with_added_tokens=True)
    pieces, bytes_of = [b""] * (max(vocabulary.values()) + 1), token_bytes if by_bytes else _marked_bytes
    for token, number in vocabulary.items():
        if number not in added or not added[number].special:
            pieces[number] = bytes_of(token)
    return pieces


def _marked_bytes(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()


def _refuse_special(backend: Any, strings: Sequence[str], setting: str) -> None:
    for number, token in backend.get_added_tokens_decoder().items():
        named = next(
            (string for string in strings if token.special and token.content and token.content in string), None
        )
        if named is not None:
            raise ConfigError(
                f"{setting}: expected text, found {named!r} with the special token {token.content!r}, which is no "
                f"part of an output's text; set rollout.stop_ids to its id, {number}"
            )


def _can_be_spelled(wanted: bytes, pieces: Sequence[bytes]) -> bool:
    """Return whether some sequence of tokens has these bytes: the end of one, whole ones, the beginning of another."""
    starts = tuple(wanted[:at] for at in range(1, len(wanted)))
    whole, reached = set(pieces), {0}
    for piece in whole:
        if wanted in piece:
            return True
        if starts and piece.endswith(starts):
            reached |= {len(start) for start in starts if piece.endswith(start)}
    for at in range(len(wanted)):
        if at in reached:
            reached |= {end for end in range(at + 1, len(wanted) + 1) if wanted[at:end] in whole}
    endings = tuple(wanted[at:] for at in reached if at < len(wanted))
    return len(wanted) in reached or any(piece.startswith(endings) for piece in whole)
