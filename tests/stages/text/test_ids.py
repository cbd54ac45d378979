"""Where in the text each sampled id ends: by characters, inside characters of several bytes, and where there are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from stages.text import BPETokenizerConfig, CharacterTokenizerConfig, build_tokenizer, decode_outputs, step_ends
from tests.stages.text.sentencepiece import WORDS, with_bytes

TEXTS = ["7加5等于12\n12减3等于9 🙂", "the answer is 42.\n#### 42"]
CHARACTERS = build_tokenizer(TEXTS, CharacterTokenizerConfig())
BPE = build_tokenizer(["the answer is 42.\n#### 42"], BPETokenizerConfig(vocab_size=300))
EOS = 0


def ends_of(tokenizer: Any, ids: list[int]) -> tuple[str, list[int]]:
    decoded = decode_outputs(tokenizer, [ids])
    return decoded.texts[0], decoded.ends[0].tolist()


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def test_ends_count_characters_and_a_skipped_token_adds_none() -> None:
    assert ends_of(CHARACTERS, [*ids_of(CHARACTERS, "7加5\n🙂"), EOS]) == ("7加5\n🙂", [1, 2, 3, 4, 5, 5])


@pytest.mark.claim("step borders from encoding text again")
def test_the_text_up_to_an_end_is_what_the_tokens_up_to_it_decode_to() -> None:
    ids = ids_of(BPE, "the answer is 42.\n#### 42")
    text, ends = ends_of(BPE, ids)
    assert len(ids) < len(text), "a token of several characters is what this test is about"
    assert [text[:end] for end in ends] == [BPE.decode(ids[: t + 1]) for t in range(len(ids))]


def test_an_end_waits_in_front_of_a_character_until_its_last_byte() -> None:
    ids = ids_of(BPE, "a加🙂b")  # three and four bytes, none of them merged
    assert len(ids) == 1 + 3 + 4 + 1
    assert ends_of(BPE, ids) == ("a加🙂b", [1, 1, 1, 2, 2, 2, 2, 3, 4])


def test_bytes_that_begin_a_character_and_never_end_it_belong_to_the_last_token() -> None:
    text, ends = ends_of(BPE, [*ids_of(BPE, "a🙂")[:-1], EOS])
    assert text == "a\N{REPLACEMENT CHARACTER}"
    assert ends == [1, 1, 1, 1, 2]


def test_bytes_that_are_no_character_end_where_the_text_shows_their_replacement() -> None:
    broken = ids_of(BPE, "加")[:1] + ids_of(BPE, "b")
    assert ends_of(BPE, broken) == ("\N{REPLACEMENT CHARACTER}b", [0, 2])


def test_an_output_without_ids_and_a_batch_without_outputs_have_no_ends() -> None:
    assert ends_of(BPE, []) == ("", [])
    assert decode_outputs(BPE, []) == ([], [])


def test_each_output_of_a_batch_has_the_ends_it_has_alone() -> None:
    rows = [ids_of(BPE, "answer 4"), [], ids_of(BPE, "加")[:2], ids_of(BPE, "42\n")]
    together = decode_outputs(BPE, rows)
    assert [ends.tolist() for ends in together.ends] == [ends_of(BPE, row)[1] for row in rows]


@given(st.lists(st.integers(0, len(BPE) - 1), max_size=12))
def test_ends_never_fall_and_the_last_is_the_length_of_the_text(ids: list[int]) -> None:
    text, ends = ends_of(BPE, ids)
    assert ends == sorted(ends)
    assert len(ends) == len(ids)
    assert ends[-1:] == [len(text)][: len(ids)]


@given(st.lists(st.integers(0, len(BPE) - 1), max_size=12))
def test_whatever_is_sampled_the_text_up_to_an_end_is_fixed_by_the_ids_up_to_it(ids: list[int]) -> None:
    text, ends = ends_of(BPE, ids)
    for t, end in enumerate(ends[:-1]):
        assert BPE.decode(ids[: t + 1], skip_special_tokens=True).startswith(text[:end])


@given(st.text(alphabet="ab 加🙂é\n", max_size=12))
def test_adding_up_bytes_and_decoding_token_by_token_agree(text: str) -> None:
    ids = ids_of(BPE, text)
    stream = DecodeStream(skip_special_tokens=True)
    lengths = np.cumsum([len(stream.step(BPE.backend_tokenizer, token) or "") for token in ids])
    assert ends_of(BPE, ids)[1] == lengths.tolist()


def test_a_long_run_of_broken_bytes_costs_no_more_than_any_other_output() -> None:
    """A policy that collapses onto one byte must not stall the rollout: decoding its growing rest anew took minutes."""
    broken = ids_of(BPE, "加")[:1] * 50_000
    text, ends = ends_of(BPE, broken)
    assert len(text) == 50_000
    assert ends == [*range(50_000 - 1), 50_000]


def test_another_kind_of_tokenizer_is_decoded_token_by_token() -> None:
    """Words with a mark for the space before them, as SentencePiece has."""
    backend = Tokenizer(models.WordLevel({"▁the": 0, "▁answer": 1, ".": 2}, unk_token="."))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    assert ends_of(tokenizer, [0, 1, 2]) == ("the answer.", [3, 10, 11])


def test_bytes_that_were_characters_until_the_next_one_are_decoded_again() -> None:
    """SentencePiece's bytes are characters all together or none of them is, which its stream refuses to go back on."""
    text, ends = ends_of(with_bytes(), [*(len(WORDS) + byte for byte in (0x61, 0xFF, 0x61)), 3, 4])
    assert (text, ends) == (3 * "\N{REPLACEMENT CHARACTER}" + "ab", [1, 1, 1, 4, 5])


def one_token_per_character(text: str, *, stopped: bool = True) -> list[int]:
    return [*range(1, len(text) + 1), *([len(text)] if stopped else [])]


def test_the_last_step_has_the_end_of_sequence() -> None:
    assert step_ends("ab\ncd\ne", one_token_per_character("ab\ncd\ne")) == [2, 5, 7]
    assert step_ends("ab\ncd\ne", one_token_per_character("ab\ncd\ne", stopped=False)) == [2, 5, 6]


def test_empty_lines_belong_to_the_step_that_follows_or_to_the_last() -> None:
    assert step_ends("ab\n\ncd\n\n", one_token_per_character("ab\n\ncd\n\n")) == [2, 8]


def test_an_output_without_a_line_is_one_step_and_one_without_tokens_has_none() -> None:
    assert step_ends("\n", [1, 1]) == [1]
    assert step_ends("", [0]) == [0]
    assert step_ends("", []) == []


def test_a_token_that_spans_lines_ends_the_steps_it_completes() -> None:
    assert step_ends("ab\ncd\ne", [2, 4, 6, 7]) == [1, 2, 3]
