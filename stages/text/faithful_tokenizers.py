"""Whether transformers reads a tokenizer as its tokenizer.json says, and what to do where it does not.

transformers 5 chooses a class by config.json's `model_type` or tokenizer_config.json's `tokenizer_class`, and some classes take
only vocabulary and merges from tokenizer.json: splitting, normaliser and decoder are their own. A byte-level tokenizer read
as `LlamaTokenizer` (as the DeepSeekMath models name it) or under `qwen2` then loses every space and newline, without a word
(transformers issues 45488, 48206). It also no longer reads `add_bos_token` beside a tokenizer.json, so that the beginning of
sequence, which the DeepSeekMath models were trained with, would be missing from every prompt.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Final, NamedTuple

from pipeline.artifact import ArtifactError

__all__ = ["require_faithful", "settle_start", "settle_tokenizer"]

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
    """A tokenizer as transformers reads it, beside its tokenizer.json."""

    name: str
    """Class that transformers chose."""
    differing: str | None
    """A text that gets other ids; None: all get the same."""
    lost: str | None
    """A text that comes back whole by tokenizer.json and changed by transformers; None: there is none."""


def settle_tokenizer(folder: Path) -> None:
    """See to it that transformers reads the tokenizer in `folder` as its files say; warns of what it changes in them.

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
    """None where there is no tokenizer.json to hold against, or code of the model's own reads it."""
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
