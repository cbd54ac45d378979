"""Tokenizers survive saving, under the config.json that makes transformers choose another class."""

from __future__ import annotations

import json
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.artifact import ArtifactError
from pipeline.store import Store
from stages.models import ExternalCheckpointConfig, import_checkpoint, load_tokenizer
from stages.text import (
    BPETokenizerConfig,
    CharacterTokenizerConfig,
    PromptConfig,
    build_tokenizer,
    encode_prompt,
    require_faithful,
    settle_tokenizer,
)
from tests.stages.training.tiny import tiny_model

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


TEXT = "a b\n\n    c = 3.5,  café 中文\n#### 42"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


def byte_level() -> Any:
    """A byte-level BPE tokenizer, as DeepSeekMath's is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=[BOS, EOS], show_progress=False
    )
    backend.train_from_iterator(["the answer is 42"] * 4, trainer)
    return backend


def deepseek_folder(folder: Path, model_type: str = "llama") -> Path:
    """The files of a model as deepseek-math-7b has them: byte-level BPE whose class is said to be Llama's."""
    from transformers import AutoConfig

    backend = byte_level()
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2}
    description = AutoConfig.for_model(
        model_type, vocab_size=backend.get_vocab_size(), num_key_value_heads=2, **settings
    )
    tiny_model(**settings, vocab_size=backend.get_vocab_size()).save_pretrained(folder)  # its weights are never read
    description.save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    said = {"add_bos_token": True, "add_eos_token": False, "bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    said |= {"unk_token": None, "legacy": True, "model_max_length": 4096, "sp_model_kwargs": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"tokenizer_class": "LlamaTokenizerFast"}))
    return folder


def test_the_trap_exists(tmp_path: Path) -> None:
    """transformers issue 48206; where this fails, transformers has fixed it and `settle_tokenizer` has less to do."""
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(deepseek_folder(tmp_path))
    ids = read(TEXT, add_special_tokens=False)["input_ids"]
    assert " " not in read.decode(ids)


def test_the_tokenizer_of_deepseek_math_keeps_its_spaces_once_imported(store: Store, tmp_path: Path) -> None:
    folder = deepseek_folder(tmp_path)
    with pytest.warns(UserWarning, match="stored as") as warned:
        imported = import_checkpoint(ExternalCheckpointConfig(path=folder))
    first, second = (str(warning.message) for warning in warned)
    assert "stored as PreTrainedTokenizerFast: transformers would read it as LlamaTokenizer" in first
    assert f"{BOS} is written into tokenizer.json as what comes before every text" in second
    tokenizer = load_tokenizer(imported)
    meant = byte_level()
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == meant.encode(TEXT).ids
    assert tokenizer(TEXT)["input_ids"] == [meant.token_to_id(BOS), *meant.encode(TEXT).ids]
    ids = encode_prompt(tokenizer, TEXT, PromptConfig())
    assert ids == [meant.token_to_id(BOS), *meant.encode(TEXT).ids]
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert (tokenizer.eos_token, tokenizer.pad_token) == (EOS, EOS)
    require_faithful(imported.path)


def test_a_tokenizer_that_no_class_reads_as_it_is_meant_is_refused(store: Store, tmp_path: Path) -> None:
    """Under `qwen2` transformers takes its own class whatever the folder says, splitting rule and decoder with it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {character: number for number, character in enumerate(["</s>", *"abcdef 0123456789+=\n#"])}
    backend = Tokenizer(models.BPE(words, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tiny_model(vocab_size=len(words)).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    before = (tmp_path / "tokenizer_config.json").read_text()
    with pytest.raises(ArtifactError, match="Qwen2Tokenizer, under which 'a b'"):
        import_checkpoint(ExternalCheckpointConfig(path=tmp_path))
    assert (tmp_path / "tokenizer_config.json").read_text() == before, "a folder of others was changed"
    with pytest.raises(ArtifactError, match="Qwen2Tokenizer"):
        require_faithful(tmp_path)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_tokenizer_that_is_read_as_it_is_meant_stays_as_it_is(tmp_path: Path, model_type: str) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    build_tokenizer(["the answer is 42"] * 4, BPETokenizerConfig(vocab_size=300)).save_pretrained(tmp_path)
    before = (tmp_path / "tokenizer_config.json").read_bytes()
    with warnings.catch_warnings(action="error"):
        settle_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer_config.json").read_bytes() == before


def test_a_sentencepiece_tokenizer_is_left_to_its_class(tmp_path: Path) -> None:
    from transformers import AutoConfig, LlamaTokenizer

    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghij"]
    tokenizer = LlamaTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)}, merges=[("▁", "a")][:0]
    )
    tokenizer.save_pretrained(tmp_path)
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        settle_tokenizer(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"].startswith("LlamaTokenizer")
