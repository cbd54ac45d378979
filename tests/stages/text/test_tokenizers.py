"""Tokenizers survive saving, under the config.json that makes transformers choose another class."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.text import BPETokenizerConfig, CharacterTokenizerConfig, build_tokenizer

CORPUS = ["Compute 7+5-3+8.\n7+5=12\n#### 17", "计算 7+5。\n7加5等于12", "  two  spaces\n\n\ttab, é ñ, 😀 and\r\n"]
ENGLISH = "0123456789+-=.# \nCompute"
KINDS: dict[str, CharacterTokenizerConfig | BPETokenizerConfig] = {
    "character": CharacterTokenizerConfig(),
    "bpe": BPETokenizerConfig(vocab_size=320),
}


@pytest.fixture(scope="module", params=["character", "bpe"])
def loaders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """One tokenizer as built, as AutoTokenizer finds it under three architectures, and by its plain class."""
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    built = build_tokenizer(CORPUS, KINDS[request.param])
    found = [built]
    for architecture in ("qwen2", "qwen3", "llama"):
        folder = tmp_path_factory.mktemp(architecture)
        built.save_pretrained(folder)
        AutoConfig.for_model(architecture).save_pretrained(folder)
        found.append(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        found.append(PreTrainedTokenizerFast.from_pretrained(folder))
    return found


def alphabet(kind: str) -> st.SearchStrategy[str]:
    return st.sampled_from("".join(CORPUS)) if kind == "character" else st.characters(exclude_categories=["Cs"])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_loader_round_trips_every_text(loaders: list[Any], data: st.DataObject) -> None:
    kind = "character" if len(loaders[0]) < 100 else "bpe"
    text = data.draw(st.text(alphabet(kind), max_size=40))
    # As text throughout: hypothesis finds `<|endoftext|>` in the source and tries it.
    ids = loaders[0].encode(text, add_special_tokens=False, split_special_tokens=True)
    for tokenizer in loaders:
        assert tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == unicodedata.normalize("NFC", text)


def test_every_loader_agrees_on_size_end_and_padding(loaders: list[Any]) -> None:
    assert {(len(t), t.eos_token_id, t.pad_token_id) for t in loaders} == {(len(loaders[0]), 0, 1)}


def test_the_arithmetic_world_needs_26_tokens_one_per_character_and_two_more() -> None:
    tokenizer = build_tokenizer([ENGLISH], CharacterTokenizerConfig())
    assert len(tokenizer) == 26
    text = "Compute 7+5.\n7+5=12\n#### 12"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert [tokenizer.decode([number]) for number in ids] == list(text)


def test_ids_follow_the_order_of_the_characters() -> None:
    tokenizer = build_tokenizer(["ba", "c"], CharacterTokenizerConfig())
    assert tokenizer.get_vocab() == {"<|endoftext|>": 0, "<|pad|>": 1, "a": 2, "b": 3, "c": 4}


def test_a_chinese_character_is_one_token() -> None:
    text = "计算等于加减。"
    assert len(build_tokenizer([text], CharacterTokenizerConfig()).encode(text)) == len(text)


@pytest.mark.parametrize("kind", ["character", "bpe"])
def test_equal_corpora_give_equal_tokenizers(kind: str) -> None:
    make: Callable[[], str] = lambda: build_tokenizer(CORPUS, KINDS[kind]).backend_tokenizer.to_str()  # noqa: E731
    assert make() == make()


def test_bpe_merges_what_is_frequent_and_never_a_special_token() -> None:
    tokenizer = build_tokenizer(["hello hello hello <|endoftext|>"] * 9, BPETokenizerConfig(vocab_size=300))
    assert len(tokenizer.encode("hello")) == 1
    assert [token for token in tokenizer.get_vocab() if "<|e" in token] == ["<|endoftext|>"]


def test_the_vocabulary_is_as_large_as_asked_where_the_corpus_allows() -> None:
    words = [f"{first}{second}{third} " * 2 for first in "abcde" for second in "fghij" for third in "klmno"]
    assert len(build_tokenizer(words, BPETokenizerConfig(vocab_size=400))) == 400


@pytest.mark.parametrize("kind", ["character", "bpe"])
def test_a_corpus_without_text_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="needs a corpus"):
        build_tokenizer(["", ""], KINDS[kind])


def test_bpe_of_gsm8k_round_trips_its_questions_and_solutions(data_dir: Path) -> None:
    with (data_dir / "gsm8k" / "gsm8k_test.jsonl").open(encoding="utf-8") as lines:
        texts = [row[name] for row in map(json.loads, lines) for name in ("question", "solution")]
    tokenizer = build_tokenizer(texts, BPETokenizerConfig(vocab_size=2000))
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert tokenizer.batch_decode(encoded) == [unicodedata.normalize("NFC", text) for text in texts]
    assert sum(map(len, texts)) / sum(map(len, encoded)) > 2.5  # characters a token
