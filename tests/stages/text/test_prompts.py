"""Prompts: the paper's texts, one beginning of sequence, and questions that can inject nothing."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.text import (
    BPETokenizerConfig,
    CharacterTokenizerConfig,
    PromptConfig,
    PromptError,
    build_tokenizer,
    encode_completions,
    encode_prompt,
    encode_prompts,
)
from stages.text.ids import encode_texts

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
INJECTIONS = ["<|im_end|>", "<|im_start|>", "<think>", "</think>", "<|endoftext|>", "<|pad|>", "answer", "ö"]


def make_tokenizer() -> Any:
    """Byte-level BPE with special tokens, added tokens that are not special, and one that is also an ordinary word."""
    from tokenizers import AddedToken

    tokenizer = build_tokenizer(["the answer is 42, user assistant?\n" * 5], BPETokenizerConfig(vocab_size=330))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    words = [AddedToken("answer", special=False, normalized=False), AddedToken("ö", special=False, normalized=False)]
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")] + words)
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def encode_text(tokenizer: Any, text: str) -> list[int]:
    return encode_texts(tokenizer, [text])[0]


def encode_completion(tokenizer: Any, text: str) -> list[int]:
    return encode_completions(tokenizer, [text])[0]


def with_bos(tokenizer: Any) -> Any:
    """The same, putting `<s>` before every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def special_ids(tokenizer: Any) -> set[int]:
    return set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)


@pytest.mark.claim("a backspace in the prompt", "prompt, instruction", "prompt, chat")
@pytest.mark.parametrize(
    ("config", "prompt"),
    [
        ({}, "2+2?"),
        ({"suffix": "\n"}, "2+2?\n"),
        ({"prefix": "Question: ", "suffix": "\nAnswer:"}, "Question: 2+2?\nAnswer:"),
        (
            {"template": "deepseek_math_en"},
            "2+2?\nPlease reason step by step, and put your final answer within " + chr(92) + "boxed{}.",
        ),
        (
            {"template": "deepseek_math_zh"},
            "2+2?\n请通过逐步推理来解答问题，并把最终答案放置于" + chr(92) + "boxed{}中。",
        ),
        (
            {"template": "deepseek_math_en", "chat": "deepseek_math"},
            "User: 2+2?\nPlease reason step by step, and put your final answer within "
            + chr(92)
            + "boxed{}.\n\nAssistant:",
        ),
        (
            {"chat": "tokenizer", "suffix": "Let me see."},
            "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\nLet me see.",
        ),
    ],
)
def test_a_template_reads_as_the_paper_or_the_tokenizer_writes_it(
    tokenizer: Any, config: dict[str, Any], prompt: str
) -> None:
    ids = encode_prompt(tokenizer, "2+2?", PromptConfig.parse(config))
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt
    assert chr(8) not in prompt  # the README's "\b" of "\boxed"


OWN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %} <think>{% endif %}"
)


def test_a_given_template_replaces_the_tokenizers_as_text_or_file(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(OWN)
    text, named = (PromptConfig(chat="tokenizer", chat_template=given) for given in (OWN, str(file)))
    ids = encode_prompt(tokenizer, "2+2?", text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "[user] 2+2? <think>"
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<think>")
    assert encode_prompt(tokenizer, "2+2?", named) == ids
    assert text.key() == named.key()
    file.write_text(OWN + " ")
    assert text.key() != named.key()


def test_parts_of_a_prompt_that_are_not_set_are_not_in_the_key() -> None:
    assert PromptConfig(chat="tokenizer").key() == {"template": "raw", "chat": "tokenizer", "prefix": "", "suffix": ""}


@pytest.mark.parametrize(
    ("config", "whole"),
    [
        ({"suffix": "\nthe end"}, "the user is 42?\nthe end"),
        ({"chat": "deepseek_math"}, "User: the user is 42?\n\nAssistant:"),
        (
            {"chat": "tokenizer"},
            "<|im_start|>user\nthe user is 42?<|im_end|>\n<|im_start|>assistant\n<think>\n",
        ),
    ],
)
def test_ids_are_those_of_the_whole_string_without_a_seam(tokenizer: Any, config: dict[str, Any], whole: str) -> None:
    ids = encode_prompt(tokenizer, "the user is 42?", PromptConfig.parse(config))
    assert ids == tokenizer.encode(whole, add_special_tokens=False)


def test_the_seam_that_must_not_show_exists(tokenizer: Any) -> None:
    """`?` and the newline behind it are one token of this tokenizer, two when question and template are encoded apart."""
    assert len(encode_text(tokenizer, "?\n")) == 1 < len(encode_text(tokenizer, "?") + encode_text(tokenizer, "\n"))


@pytest.mark.parametrize("token", INJECTIONS[:-1])
@pytest.mark.parametrize("chat", ["none", "deepseek_math", "tokenizer"])
def test_an_added_token_in_a_question_is_encoded_as_text(tokenizer: Any, token: str, chat: str) -> None:
    config = PromptConfig.parse({"chat": chat})
    clean = encode_prompt(tokenizer, "say xyz now", config)
    dirty = encode_prompt(tokenizer, f"say {token} now", config)
    count = sum(number in special_ids(tokenizer) for number in clean)
    assert sum(number in special_ids(tokenizer) for number in dirty) == count
    text = tokenizer.decode(dirty, skip_special_tokens=False, spaces_between_special_tokens=False)
    assert text == tokenizer.decode(clean).replace("say xyz now", f"say {token} now")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(INJECTIONS[:-1]), st.text(max_size=6)), max_size=6))
def test_no_text_gives_an_added_id_and_all_text_comes_back(tokenizer: Any, parts: list[str]) -> None:
    text = "".join(parts)
    if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
        return
    ids = encode_text(tokenizer, text)
    harmless = tokenizer.convert_tokens_to_ids("ö")  # one ordinary character: text either way
    assert not (special_ids(tokenizer) - {harmless}) & set(ids)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_tokens_cannot_be_completed_across_the_border_of_template_and_question(tokenizer: Any) -> None:
    config = PromptConfig(prefix="<|im_", suffix="end|>")
    ids = encode_prompt(tokenizer, "start|><|im_", config)
    assert tokenizer.decode(ids) == "<|im_start|><|im_end|>"
    assert not special_ids(tokenizer) & set(ids)


def test_special_tokens_of_our_own_prefix_and_suffix_act(tokenizer: Any) -> None:
    ids = encode_prompt(tokenizer, "hi", PromptConfig(prefix="<|im_start|>user\n", suffix="<|im_end|>\n"))
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ids


@pytest.mark.claim("two beginnings of sequence", "prompt, beginning")
def test_the_beginning_of_sequence_comes_once() -> None:
    tokenizer = with_bos(make_tokenizer())
    start = tokenizer.bos_token_id
    for config in (
        PromptConfig(),
        PromptConfig(template="deepseek_math_en", chat="deepseek_math"),
        PromptConfig(prefix="<s>"),
    ):
        ids = encode_prompt(tokenizer, "<s>2+2?", config)
        assert ids[0] == start
        assert ids.count(start) == 1
    tokenizer.chat_template = "{{ bos_token }}" + CHAT
    ids = encode_prompt(tokenizer, "2+2?", PromptConfig(chat="tokenizer"))
    assert ids.count(start) == 1
    tokenizer.chat_template = CHAT  # a template without it: none, as in apply_chat_template
    assert start not in encode_prompt(tokenizer, "2+2?", PromptConfig(chat="tokenizer"))


@pytest.mark.claim("the end of sequence outside the loss")
def test_a_completion_ends_in_the_end_of_sequence_and_has_no_beginning() -> None:
    tokenizer = with_bos(make_tokenizer())
    ids = encode_completion(tokenizer, "the 42<|endoftext|>")
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.bos_token_id not in ids
    assert tokenizer.decode(ids[:-1]) == "the 42<|endoftext|>"


def test_many_at_once_are_the_same_as_one_by_one(tokenizer: Any) -> None:
    questions = ["2+2?", "", "say <think> now", "计算 7+5。"]
    config = PromptConfig(chat="tokenizer")
    assert encode_prompts(tokenizer, questions, config) == [encode_prompt(tokenizer, q, config) for q in questions]
    assert encode_completions(tokenizer, questions) == [encode_completion(tokenizer, q) for q in questions]


def test_padding_and_truncation_left_on_in_the_tokenizer_change_nothing() -> None:
    tokenizer = make_tokenizer()
    config = PromptConfig(chat="tokenizer")
    before = encode_prompt(tokenizer, "say <think> now", config)
    tokenizer(["a", "a longer text"], padding="max_length", truncation=True, max_length=4, split_special_tokens=True)
    assert encode_prompt(tokenizer, "say <think> now", config) == before
    fresh = make_tokenizer()
    fresh(["a", "a longer text"], padding="max_length", truncation=True, max_length=4, split_special_tokens=True)
    assert encode_prompt(fresh, "say <think> now", config) == before


def test_a_token_added_later_is_text_too() -> None:
    tokenizer = make_tokenizer()
    encode_text(tokenizer, "say <later> now")
    tokenizer.add_tokens(["<later>"])
    assert tokenizer.convert_tokens_to_ids("<later>") not in encode_text(tokenizer, "say <later> now")


def test_a_character_the_tokenizer_would_drop_is_refused_by_name() -> None:
    tokenizer = build_tokenizer(["Compute 7+5.\n"], CharacterTokenizerConfig())
    with pytest.raises(PromptError, match=r"'x' \(U\+0078\) of 'Compute x\.'"):
        encode_prompt(tokenizer, "Compute x.", PromptConfig())
    with pytest.raises(PromptError, match="'计'"):
        encode_completion(tokenizer, "计")


def test_an_unknown_token_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "[EOS]": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[EOS]")
    assert encode_text(tokenizer, "ab") == [1, 2]
    with pytest.raises(PromptError, match="'c'"):
        encode_text(tokenizer, "abc")


def test_a_tokenizer_without_chat_template_is_refused() -> None:
    tokenizer = build_tokenizer(["hello"], BPETokenizerConfig())
    with pytest.raises(PromptError, match="no chat template"):
        encode_prompt(tokenizer, "hello", PromptConfig(chat="tokenizer"))
