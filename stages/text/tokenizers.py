"""Tokenizers made from a corpus: one token per character, or byte-level BPE.

Both are byte-level BPE in the layout of Qwen2's tokenizer, and that is deliberate. transformers 5 reloads whatever lies beside
a `qwen2` config.json as `Qwen2Tokenizer`, which takes vocabulary and merges from tokenizer.json and brings its own
normaliser, splitting rule and decoder; another layout is loaded without a word and then loses spaces and newlines. Built as a
`Qwen2Tokenizer` to begin with, a tokenizer is the same object before saving, after `load_tokenizer` and after
`AutoTokenizer.from_pretrained`.

Two consequences of the layout. Text is NFC-normalised, as Qwen's is: a letter with a combining accent comes back as the one
composed letter. And a byte that is not in the vocabulary vanishes when encoded, without an unknown token; `stages.text.prompts`
refuses such text with the character named.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, assert_never

from pydantic import Field

from pipeline.config import Config

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "EOS",
    "PAD",
    "BPETokenizerConfig",
    "CharacterTokenizerConfig",
    "TokenizerConfig",
    "build_tokenizer",
    "byte_symbols",
]

# Qwen2Tokenizer adds this very token to any vocabulary that lacks it (as its unknown token): any other name for the end of
# sequence would make the vocabulary grow by one when reloaded, past the model's embedding.
EOS: Final = "<|endoftext|>"
PAD: Final = "<|pad|>"


class CharacterTokenizerConfig(Config):
    """One token per character of the corpus."""

    kind: Literal["character"] = "character"
    """Discriminator."""


class BPETokenizerConfig(Config):
    """Byte-level BPE trained on the corpus; every text can be encoded."""

    kind: Literal["bpe"] = "bpe"
    """Discriminator."""
    vocab_size: int = Field(4096, ge=300)
    """Tokens in all: the end of sequence, padding, 256 bytes and the merges. A small corpus may give fewer."""


TokenizerConfig = Annotated[CharacterTokenizerConfig | BPETokenizerConfig, Field(discriminator="kind")]


def build_tokenizer(
    texts: Iterable[str], config: CharacterTokenizerConfig | BPETokenizerConfig
) -> PreTrainedTokenizerFast:
    """A tokenizer for `texts`; equal texts and config give equal ids.

    The end of sequence has id 0, padding id 1 (never the same token: a mask made from padding must not hide the end).

    Raises:
        ValueError: no text at all.
    """
    match config:
        case CharacterTokenizerConfig():
            vocabulary, merges = _character_vocabulary(texts)
        case BPETokenizerConfig():
            vocabulary, merges = _train_bpe(texts, config.vocab_size)
        case _:
            assert_never(config)
    if len(vocabulary) <= 2:
        raise ValueError("a tokenizer needs a corpus; found no text")
    return _as_qwen2(vocabulary, merges)


def _as_qwen2(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    from transformers import Qwen2Tokenizer

    tokenizer: PreTrainedTokenizerFast = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, unk_token=EOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    return tokenizer


def _character_vocabulary(texts: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte symbols and merges under which every character of the corpus is one token.

    A character of several bytes is merged from left to right, over prefixes that occur in no text on their own. A merge cannot
    reach across characters: each begins with the leading byte of one, and no other byte can be a leading byte.
    """
    characters = sorted({character for text in texts for character in unicodedata.normalize("NFC", text)})
    symbols = byte_symbols()
    vocabulary, merges = {EOS: 0, PAD: 1}, []
    prefixes: dict[str, tuple[str, str]] = {}
    for character in characters:
        first, *rest = (symbols[byte] for byte in character.encode())
        for symbol in rest:
            prefixes[first + symbol] = (first, symbol)
            first += symbol
        vocabulary[first] = len(vocabulary)
    # Single bytes and prefixes stand behind the characters, whose ids are then 2, 3, ... in the order of the characters.
    for whole, (left, right) in prefixes.items():
        for part in (left, right, whole):
            vocabulary.setdefault(part, len(vocabulary))
        merges.append((left, right))
    return vocabulary, merges


def _train_bpe(texts: Iterable[str], vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    # Its own normaliser and splitting rule, so that training sees what use will see.
    frame = Qwen2Tokenizer().backend_tokenizer
    backend = Tokenizer(models.BPE())
    backend.normalizer, backend.pre_tokenizer = frame.normalizer, frame.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += bool(text)
            yield text

    backend.train_from_iterator(counted(), trainer)
    return _learned(backend) if seen else ({EOS: 0, PAD: 1}, [])


def _learned(backend: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a trained model; the library offers them through its JSON only."""
    model: dict[str, Any] = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    return model["vocab"], [(left, right) for left, right in merges]


def byte_symbols() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table): ' ' is 'Ġ', newline 'Ċ'."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in symbols:
            symbols[byte] = chr(256 + len(symbols) - len(printable))
    return symbols
