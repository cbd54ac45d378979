"""Tokenizers made from a corpus, and fixes of tokenizer files that transformers would misread.

A tokenizer of a corpus has one token per character, or is byte-level BPE. Both have the layout of Qwen2's tokenizer:
transformers 5 reloads any tokenizer next to a `qwen2` config.json as `Qwen2Tokenizer`. That class takes vocabulary and merges
from tokenizer.json, and brings its own normaliser, splitting rule and decoder; another layout would lose spaces and newlines.
Built as a `Qwen2Tokenizer`, a tokenizer is the same object before saving, after `load_tokenizer` and after `AutoTokenizer`.

Two consequences. Text is NFC-normalised: a letter with a combining accent comes back as the one composed letter. A byte that is
not in the vocabulary vanishes when encoded, without an unknown token; `stages.text.prompts` refuses such text.

A tokenizer of others is compared with its tokenizer.json (`settle_tokenizer`). A byte-level tokenizer that is read as
`LlamaTokenizer` (as the DeepSeekMath models name it) or under `qwen2` loses every space and newline, without a word
(transformers issues 45488, 48206). transformers also no longer reads `add_bos_token` next to a tokenizer.json: the beginning of
sequence that the DeepSeekMath models were trained with would be missing from every prompt.
"""

from __future__ import annotations

import json
import unicodedata
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, assert_never

from pydantic import Field

from pipeline.artifact import ArtifactError
from pipeline.config import Config

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

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
    """Build a tokenizer for `texts`; equal texts and config give equal ids.

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
    """Return byte symbols and merges under which every character of the corpus is one token.

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
    """Return vocabulary and merges of a trained model; the library offers them through its JSON only."""
    model: dict[str, Any] = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    return model["vocab"], [(left, right) for left, right in merges]


def byte_symbols() -> dict[int, str]:
    """Return the printable character of each byte in byte-level BPE (GPT-2's table): ' ' is 'Ġ', newline 'Ċ'."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in symbols:
            symbols[byte] = chr(256 + len(symbols) - len(printable))
    return symbols


# ------------------------------------------------------------------------------------------------ tokenizers of others

_PROBES: Final = (
    "a b",
    "1 + 2 = 3\n#### 3",
    "if x:\n\n    y = 10",
    "  two  spaces ",
    "So 3.5 times $20 is $70.",
    "café",
    "中文 数学",
)
_FAITHFUL: Final = "PreTrainedTokenizerFast"
"""The class that takes all of tokenizer.json."""


class _Comparison(NamedTuple):
    """A tokenizer as transformers reads it, compared with its tokenizer.json."""

    name: str
    """Class that transformers chose."""
    differing: str | None
    """A text that gets other ids; None: all get the same."""
    lost: str | None
    """A text that comes back whole by tokenizer.json and changed by transformers; None: there is none."""


def settle_tokenizer(folder: Path) -> None:
    """Make transformers read the tokenizer in `folder` as its files say; warn of what is changed in them.

    Where transformers would not, tokenizer_config.json is made to name the class that takes tokenizer.json whole, and a
    beginning of sequence that only `add_bos_token` asks for is written into tokenizer.json.

    Raises:
        ArtifactError: text is lost under that class too.
    """
    _settle_class(folder)
    settle_start(folder)


def _settle_class(folder: Path) -> None:
    found = _compare(folder)
    if found is None or found.differing is None:
        return
    before = _described(folder)
    _describe(folder, before | {"tokenizer_class": _FAITHFUL})
    after = _compare(folder)
    if after is not None and after.differing is None:
        warnings.warn(
            f"the tokenizer is stored as {_FAITHFUL}: transformers would read it as {found.name}, which gives "
            f"{found.differing!r} other ids than its tokenizer.json does",
            stacklevel=2,
        )
        return
    _describe(folder, before)
    _refuse(found)
    warnings.warn(
        f"transformers reads this tokenizer as {found.name}, which gives {found.differing!r} other ids than its tokenizer.json "
        "does; what is trained and what is exported both use the former",
        stacklevel=2,
    )


def settle_start(folder: Path) -> None:
    """Write a beginning of sequence that only `add_bos_token` asks for into tokenizer.json; warns of it."""
    from tokenizers import Tokenizer, processors

    described, file = _described(folder), folder / "tokenizer.json"
    token = described.get("bos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if not file.is_file() or not token or described.get("add_bos_token") is not True:
        return
    backend = Tokenizer.from_file(str(file))
    number = backend.token_to_id(token)
    if number is None or backend.encode("a").ids[:1] == [number]:
        return
    start = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, number)]
    )
    before = backend.post_processor
    backend.post_processor = start if before is None else processors.Sequence([before, start])
    backend.save(str(file))
    warnings.warn(
        f"{token} is written into tokenizer.json as what comes before every text: add_bos_token asks for it, and transformers "
        "no longer reads that setting",
        stacklevel=2,
    )


def require_faithful(folder: Path) -> None:
    """Refuse a folder whose tokenizer loses text when `AutoTokenizer.from_pretrained` reads it.

    Raises:
        ArtifactError: names a text and the class.
    """
    found = _compare(folder)
    if found is not None:
        _refuse(found)


def _refuse(found: _Comparison) -> None:
    if found.lost is not None:
        raise ArtifactError(
            f"transformers reads this tokenizer as {found.name}, under which {found.lost!r} does not come back as it does by "
            "tokenizer.json, whatever tokenizer_config.json says; give config.json another model_type, or build the tokenizer "
            f"as a {found.name}"
        )


def _compare(folder: Path) -> _Comparison | None:
    """Compare; None where there is no tokenizer.json to compare with, or code of the model's own reads it."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    own_code = any(file.suffix.lower() == ".py" for file in folder.iterdir()) and "auto_map" in _described(folder)
    if own_code or not (folder / "tokenizer.json").is_file():
        return None
    meant = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    read = loaded.backend_tokenizer
    differing = lost = None
    for text in _PROBES:
        expected, ids = (part.encode(text, add_special_tokens=False).ids for part in (meant, read))
        if expected != ids:
            differing = differing or text
            whole = meant.decode(expected) == text
            lost = lost or (text if whole and read.decode(ids) != text else None)
    return _Comparison(type(loaded).__name__, differing, lost)


def _described(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    described: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return described


def _describe(folder: Path, described: dict[str, Any]) -> None:
    text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
