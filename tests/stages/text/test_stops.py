"""Which token completes a stop string: always the first whose text has it, as decoding every prefix says."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from pipeline.config import ConfigError
from stages.text import BPETokenizerConfig, CharacterTokenizerConfig, build_tokenizer, decode_outputs
from stages.text.stops import StopStrings, require_stop_ids
from stages.text.tokenizers import EOS
from tests.stages.text.sentencepiece import with_bytes, without_bytes

BPE = build_tokenizer(["```python\nprint(加加)\n```\n", "加🙂", "a ab abab"], BPETokenizerConfig(vocab_size=300))
CHARACTERS = build_tokenizer(["ab`\n加"], CharacterTokenizerConfig())
LLAMA, METASPACE = with_bytes(), without_bytes()
TOKENIZERS = {"bpe": BPE, "characters": CHARACTERS, "llama": LLAMA, "metaspace": METASPACE}


def first_by_decoding(tokenizer: Any, ids: list[int], strings: list[str]) -> int | None:
    """Decode every prefix, as rewards do; None where none has a string."""
    texts = [decode_outputs(tokenizer, [ids[:end]]).texts[0] for end in range(len(ids) + 1)]
    return next((t - 1 for t, text in enumerate(texts) if any(string in text for string in strings)), None)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@st.composite
def outputs(draw: st.DrawFn) -> tuple[Any, list[int], list[str]]:
    """Random tokens, half of them the pieces of text with what strings are made of, and strings, often parts of the text."""
    tokenizer = TOKENIZERS[draw(st.sampled_from(sorted(TOKENIZERS)))]
    texts = st.text("ab`\n加🙂 ", min_size=1, max_size=3).map(lambda text: ids_of(tokenizer, text))
    anything = st.lists(st.integers(0, len(tokenizer) - 1), max_size=3)
    ids = list(itertools.chain.from_iterable(draw(st.lists(texts | anything, max_size=8))))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    places = st.tuples(st.integers(0, max(0, len(text) - 1)), st.integers(1, 5))
    parts = places.map(lambda place: text[place[0] : place[0] + place[1]]) | st.text("ab`\n加🙂 ", max_size=3)
    strings = draw(st.lists(parts, min_size=1, max_size=3, unique=True))
    return tokenizer, ids, strings


def usable(tokenizer: Any, strings: list[str]) -> StopStrings:
    assume(all(string and "\N{REPLACEMENT CHARACTER}" not in string for string in strings))
    try:
        return StopStrings(tokenizer, strings)
    except ConfigError:
        assume(False)
        raise


@given(outputs(), st.data())
def test_the_first_token_whose_text_has_a_string_is_found_wherever_it_begins(
    drawn: tuple[Any, list[int], list[str]], data: st.DataObject
) -> None:
    """Also where the first ids are given: a prefix of an output that goes on."""
    tokenizer, ids, strings = drawn
    stops, expected = usable(tokenizer, strings), first_by_decoding(tokenizer, ids, strings)
    begun = data.draw(st.integers(0, len(ids) if expected is None else expected))
    found = stops.first(np.array(ids[begun:], dtype=np.int32), ids[:begun])
    assert found == (None if expected is None else expected - begun)


@settings(max_examples=40)
@given(outputs())
def test_a_string_that_is_found_somewhere_is_none_of_those_refused(drawn: tuple[Any, list[int], list[str]]) -> None:
    tokenizer, ids, strings = drawn
    text = tokenizer.decode(ids, skip_special_tokens=True)
    here = [s for s in strings if s and s in text and "\N{REPLACEMENT CHARACTER}" not in s]
    assume(here)
    assert StopStrings(tokenizer, here).first(np.array(ids, dtype=np.int32)) is not None


def test_a_string_is_found_within_a_token_and_across_tokens_by_hand() -> None:
    ids = ids_of(BPE, "```python\n")
    assert BPE.decode(ids[:1]) == "```", "a token with more than a string is what this is about"
    places = {string: StopStrings(BPE, [string]).first(np.array(ids)) for string in ("`", "``", "```p", "on\n", "x")}
    assert places == {"`": 0, "``": 0, "```p": 1, "on\n": len(ids) - 1, "x": None}


def test_a_character_of_several_tokens_is_complete_with_its_last() -> None:
    ids = [*ids_of(BPE, "a"), *ids_of(BPE, "é")]
    assert len(ids) == 3, "no merge for this character"
    assert StopStrings(BPE, ["é"]).first(np.array(ids)) == 2


def test_special_tokens_and_ids_of_no_token_are_passed_over() -> None:
    eos = BPE.convert_tokens_to_ids(EOS)
    a, b = ids_of(BPE, "a")[0], ids_of(BPE, "b")[0]
    assert StopStrings(BPE, ["ba"]).first(np.array([b, eos, len(BPE) + 7, -3, a])) == 4


def test_most_tokens_are_passed_over_without_a_look_at_the_text() -> None:
    stops = StopStrings(BPE, ["\n```"])
    able = stops.may_complete(np.arange(len(BPE)))
    assert {BPE.decode([token]) for token in np.flatnonzero(able)} == {"`", "``", "```", "```\n"}


@pytest.mark.parametrize("tokenizer", [LLAMA, METASPACE], ids=["llama", "metaspace"])
def test_an_engine_that_has_seen_the_prompt_looks_for_no_string_that_begins_with_a_space(tokenizer: Any) -> None:
    """The space before an output's first word is no part of its text, and is one of the text behind a prompt."""
    stops = StopStrings(tokenizer, [" ab", "b a"])
    assert stops.of_any_prompt == ["b a"]
    assert StopStrings(BPE, [" ab", "b a"]).of_any_prompt == [" ab", "b a"]
    ab = tokenizer.convert_tokens_to_ids("▁ab")
    assert stops.first(np.array([ab, ab])) == 1


@pytest.mark.parametrize(
    ("tokenizer", "string", "key"),
    [
        (CHARACTERS, "ac", "stop_strings: .*'ac'"),
        (METASPACE, "a\n", "stop_strings: .*'a"),
        (BPE, f"a{EOS}", r"stop_strings: .*stop_ids to its id, 0"),
        (LLAMA, "</s>", r"stop_strings: .*stop_ids to its id, 1"),
    ],
)
def test_a_string_that_no_text_can_have_is_refused(tokenizer: Any, string: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.{key}"):
        StopStrings(tokenizer, ["a", string])


def test_a_tokenizer_that_joins_words_in_another_way_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "##b": 1}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match=r"rollout\.stop_strings: .*WordPiece"):
        StopStrings(PreTrainedTokenizerFast(tokenizer_object=backend), ["ab"])
    backend.decoder = decoders.Sequence([decoders.Replace("_", " "), decoders.Fuse()])
    with pytest.raises(ConfigError, match=r"rollout\.stop_strings: .*Replace"):
        StopStrings(PreTrainedTokenizerFast(tokenizer_object=backend), ["ab"])


def test_a_stop_id_without_a_token_is_refused() -> None:
    require_stop_ids(BPE, [0, len(BPE) - 1])
    with pytest.raises(ConfigError, match=rf"rollout\.stop_ids: .*0 to {len(BPE) - 1}, found {len(BPE)}"):
        require_stop_ids(BPE, [0, len(BPE)])
