"""Where the steps of an output end: by hand, and as the process labels of the built-in world cut them."""

from __future__ import annotations

import pytest

from stages.reward.components import label_steps
from stages.text import BPETokenizerConfig, CharacterTokenizerConfig, build_tokenizer, decode_outputs, step_ends

TEXTS = [
    "7+5=12\n12-3=9\n#### 9",
    "7+5=12\n\n12-3=9\n\n\n#### 9\n",
    "\n\n",
    "7+5",
    "no line of this world\nnor this",
    "\n9",
]


def one_token_per_character(text: str, *, stopped: bool = True) -> list[int]:
    return [*range(1, len(text) + 1), *([len(text)] if stopped else [])]


def test_a_step_is_a_line_with_its_newline_and_the_last_one_has_the_end_of_sequence() -> None:
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


@pytest.mark.parametrize("tokenizer_config", [CharacterTokenizerConfig(), BPETokenizerConfig(vocab_size=300)])
def test_steps_end_where_the_process_labels_of_the_built_in_world_do(
    tokenizer_config: CharacterTokenizerConfig | BPETokenizerConfig,
) -> None:
    tokenizer = build_tokenizer([*TEXTS, "Compute 7+5-3."], tokenizer_config)
    ids = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in TEXTS]
    texts, ends = decode_outputs(tokenizer, ids)
    for text, each in zip(texts, ends, strict=True):
        labelled = label_steps("Compute 7+5-3.", text, each.tolist(), "right")
        assert step_ends(text, each.tolist()) == labelled.ends
