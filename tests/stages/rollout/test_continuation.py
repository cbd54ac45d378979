"""Outputs continued from the ends of their steps: cut at tokens, each prefix once, sampled as a longer prompt would be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.progress import listen
from pipeline.store import Store, use_store
from stages.models import load_model
from stages.rollout import HFBackendConfig, RolloutConfig, continue_outputs, cut_into_prefixes
from stages.rollout.continuation import Prefix, complete
from stages.rollout.generator import Output, Progress, Prompt, PromptTooLongError, Sampling
from stages.rollout.hf import HFGenerator
from stages.tables import Rollouts, StepPrefixes
from stages.text import BPETokenizerConfig, build_tokenizer, decode_outputs
from stages.text.tokenizers import EOS
from tests.stages.rollout.markov import ids_of, markov_policy
from tests.stages.rows import output_row, rollout_row

pytestmark = pytest.mark.usefixtures("store")

CONFIG = RolloutConfig(G=2, max_output_tokens=8, backend=HFBackendConfig(dtype="float32", threads=1))
CHANCES = {
    ":": {"good\n": 0.5, "bad\n": 0.5},
    "good\n": {"good\n": 0.2, "#### 1": 0.6, "#### 0": 0.2},
    "bad\n": {"bad\n": 0.25, "#### 0": 0.75},
}
"""Lines are single tokens; what follows depends on the last one."""


def outputs_of(tokenizer: Any, rows: dict[tuple[str, int], Sequence[int]], prompt: Sequence[int] = (2,)) -> Rollouts:
    """Rollouts with the ids given; one that has no end of sequence at its end was cut."""
    decoded = decode_outputs(tokenizer, list(rows.values()))
    made = []
    for ((question, sample), ids), text, ends in zip(rows.items(), *decoded, strict=True):
        reason = "stop" if ids[-1] == tokenizer.eos_token_id else "length"
        made.append(rollout_row(question, sample, ids, prompt, finish_reason=reason, text=text, text_ends=ends))
    return Rollouts.write(made)


def world(tokenizer: Any) -> Rollouts:
    """Three outputs of one question, two of which begin alike, and one of another."""
    rows = {
        ("q0", 0): ("good\n", "good\n", "#### 1", EOS),
        ("q0", 1): ("good\n", "bad\n", "#### 0", EOS),
        ("q0", 2): ("bad\n", "#### 0", EOS),
        ("q1", 0): ("good\n", "#### 1", EOS),
    }
    return outputs_of(tokenizer, {key: ids_of(tokenizer, *tokens) for key, tokens in rows.items()})


def steps_of(prefixes: StepPrefixes) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in prefixes.rows()]


def test_equal_prefixes_of_a_question_have_one_number() -> None:
    _, tokenizer = markov_policy(CHANCES)
    prefixes = cut_into_prefixes(world(tokenizer))
    assert steps_of(prefixes) == [
        ("q0", 0, 0, 0, 0), ("q0", 0, 1, 1, 1), ("q0", 0, 2, 3, None),
        ("q0", 1, 0, 0, 0), ("q0", 1, 1, 1, 2), ("q0", 1, 2, 3, None),
        ("q0", 2, 0, 0, 3), ("q0", 2, 1, 2, None),
        ("q1", 0, 0, 0, 0), ("q1", 0, 1, 2, None),
    ]  # fmt: skip
    assert prefixes.metrics == {"rm/steps": 10, "rm/prefixes": 5, "rm/prefixes_saved": pytest.approx(1 / 6)}
    # Of the first outputs of a question only, where so many are asked for.
    cut = cut_into_prefixes(world(tokenizer), outputs_per_question=1)
    assert [row[:2] for row in steps_of(cut)] == [("q0", 0)] * 3 + [("q1", 0)] * 2
    # Ids decide what is equal, not the text that they spell.
    _, tokenizer = markov_policy({":": {"ab\n": 1.0}, "a": {"b": 1.0}, "b": {"\n": 1.0}})
    whole, spelled = ids_of(tokenizer, "ab\n", "a", EOS), ids_of(tokenizer, "a", "b", "\n", "a", EOS)
    cut = cut_into_prefixes(outputs_of(tokenizer, {("q", 0): whole, ("q", 1): spelled}))
    assert [row[3:] for row in steps_of(cut)] == [(0, 0), (2, None), (2, 1), (4, None)]


@pytest.mark.parametrize("stopped", [True, False])
def test_prefixes_of_bpe_tokens_end_with_their_lines_last_token(stopped: bool) -> None:
    text = "First, 12 + 30 = 42.\n\nThen half of it is 21;\nso 二十一.\n#### 21"
    tokenizer = build_tokenizer(
        [text, "half of it; so it is. " * 9, ".\n\n;\n.\n" * 9], BPETokenizerConfig(vocab_size=320)
    )
    ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] * stopped
    assert len(ids) < len(text), "no token has several characters"
    rows = cut_into_prefixes(outputs_of(tokenizer, {("q", 0): ids})).rows()
    lines = [line for line in text.split("\n") if line]
    assert [row["end"] for row in rows if row["prefix"] is None] == [len(ids) - 1]
    assert len(rows) == len(lines)
    for line, row in zip(lines[:-1], rows, strict=False):
        kept, before = (tokenizer.decode(ids[: row["end"] + plus]) for plus in (1, 0))
        assert f"{line}\n" in kept
        assert f"{line}\n" not in before


def test_a_step_that_ends_with_a_cut_output_is_not_continued() -> None:
    _, tokenizer = markov_policy({":": {"a": 1.0}, "a": {"\nb": 1.0}, "\nb\nc": {EOS: 1.0}})
    cut = cut_into_prefixes(
        outputs_of(
            tokenizer,
            {("q", 0): ids_of(tokenizer, "a", "\nb"), ("q", 1): ids_of(tokenizer, "a", "\nb\nc")},
        )
    )
    # Both lines of the first output, all three of the second are completed by its last token.
    assert [row[1:] for row in steps_of(cut)] == [
        (0, 0, 1, None), (0, 1, 1, None), (1, 0, 1, None), (1, 1, 1, None), (1, 2, 1, None),
    ]  # fmt: skip


def test_a_continuation_is_an_output_that_begins_with_its_prefix() -> None:
    policy, tokenizer = markov_policy(CHANCES)
    outputs = world(tokenizer)
    prefixes = cut_into_prefixes(outputs)
    rows = continue_outputs(policy, outputs, prefixes, CONFIG, samples=3, seed=1).rows()
    begins = {
        ("q0", 0): ["good\n"], ("q0", 1): ["good\n", "good\n"], ("q0", 2): ["good\n", "bad\n"], ("q0", 3): ["bad\n"],
        ("q1", 0): ["good\n"],
    }  # fmt: skip
    assert [(row["question_id"], row["sample"]) for row in rows] == [
        (question, number * 3 + n) for question, number in begins for n in range(3)
    ]
    for row in rows:
        kept = ids_of(tokenizer, *begins[row["question_id"], row["sample"] // 3])
        assert row["output_ids"][: len(kept)] == kept
        assert len(row["output_ids"]) > len(kept)
        assert row["prompt_ids"] == [2]
        assert row["logprobs"] is None
        assert row["text"] == tokenizer.decode(row["output_ids"], skip_special_tokens=True)
        assert len(row["text_ends"]) == len(row["output_ids"])
        assert row["finish_reason"] == ("stop" if row["output_ids"][-1] == tokenizer.eos_token_id else "length")
    assert len({row["seed"] for row in rows}) == len(rows)


@pytest.mark.claim("4.2 step labels")
def test_continuations_come_with_the_chances_of_the_policy() -> None:
    policy, tokenizer = markov_policy(CHANCES)
    outputs = world(tokenizer)
    cut = cut_into_prefixes(outputs)
    rows = continue_outputs(
        policy, outputs, cut, CONFIG.override({"max_output_tokens": 40}), samples=400, seed=0
    ).rows()
    right = {}
    for row in rows:
        right.setdefault((row["question_id"], row["sample"] // 400), []).append("#### 1" in row["text"])
    # From `good` the answer is 1 with chance 0.6 + 0.2 * 0.6 + ... = 0.75, from `bad` never; 4 deviations of 400 draws: 0.087.
    for prefix, chance in {("q0", 0): 0.75, ("q0", 1): 0.75, ("q1", 0): 0.75}.items():
        assert np.mean(right[prefix]) == pytest.approx(chance, abs=0.087)
    assert not any(right["q0", 2] + right["q0", 3])


def test_continuations_are_samples_from_prompt_and_prefix() -> None:
    policy, tokenizer = markov_policy(CHANCES)
    outputs = outputs_of(tokenizer, {("q", 0): ids_of(tokenizer, "good\n", "good\n", "#### 1", EOS)})
    rows = continue_outputs(policy, outputs, cut_into_prefixes(outputs), CONFIG, samples=4, seed=3).rows()
    generator = HFGenerator(load_model(policy, dtype=torch.float32), batch_rows=8)
    for number, length in enumerate((1, 2)):
        prefix = Prefix("q", number, [2], ids_of(tokenizer, *["good\n"] * length))
        prompt = Prompt("q", [2, *prefix.ids], prefix.seeds(3, 4))
        sampling = Sampling(1.0, CONFIG.max_output_tokens - length, (tokenizer.eos_token_id,))
        (expected,) = generator.generate([prompt], sampling)
        found = [row["output_ids"][length:] for row in rows[number * 4 : number * 4 + 4]]
        assert found == [output.ids.tolist() for output in expected]


def test_equal_inputs_give_one_digest_in_two_stores(store: Store, tmp_path: Any) -> None:
    def make(seed: int) -> str:
        policy, tokenizer = markov_policy(CHANCES)
        outputs = world(tokenizer)
        return continue_outputs(policy, outputs, cut_into_prefixes(outputs), CONFIG, samples=4, seed=seed).digest

    first = make(0)
    with use_store(Store(tmp_path / "another")):
        assert make(0) == first
        assert make(1) != first


def test_a_prefix_keeps_its_continuations_whatever_else_is_continued() -> None:
    policy, tokenizer = markov_policy(CHANCES)

    def texts(outputs: Rollouts, samples: int) -> dict[tuple[int, ...], list[str]]:
        """Continuations by their prefix."""
        cut = cut_into_prefixes(outputs)
        made = continue_outputs(policy, outputs, cut, CONFIG, samples=samples, seed=0).rows()
        by_number = {row["sample"] // samples: [] for row in made if row["question_id"] == "q0"}
        for row in made:
            if row["question_id"] == "q0":
                by_number[row["sample"] // samples].append(row["text"])
        ids = {(row["question_id"], row["sample"]): row["output_ids"] for row in outputs.rows()}
        return {
            tuple(ids["q0", row["sample"]][: row["end"] + 1]): by_number[row["prefix"]]
            for row in cut.rows()
            if row["question_id"] == "q0" and row["prefix"] is not None
        }

    together = texts(world(tokenizer), 8)
    assert len(together) == 4
    for single in world(tokenizer).rows()[:3]:
        found = texts(Rollouts.write([single]), 4)
        assert found == {prefix: together[prefix][:4] for prefix in found}


def test_an_output_and_its_continuations_end_at_the_same_length() -> None:
    policy, tokenizer = markov_policy({":": {"x\n": 1.0}, "x\n": {"x\n": 1.0}})
    outputs = outputs_of(tokenizer, {("q", 0): ids_of(tokenizer, *["x\n"] * 8)})
    made = continue_outputs(policy, outputs, cut_into_prefixes(outputs), CONFIG, samples=2, seed=0)
    assert {(len(row["output_ids"]), row["finish_reason"]) for row in made.rows()} == {(8, "length")}
    assert made.metrics["rm/continuations"] == 7 * 2
    assert made.metrics["rm/continued_tokens"] == 2 * (7 + 6 + 5 + 4 + 3 + 2 + 1)
    assert made.metrics["rm/continued_length_mean"] == 4
    assert made.metrics["rm/continued_truncated_rate"] == 1
    # Outputs of one step leave nothing to continue.
    outputs = outputs_of(tokenizer, {("q", 0): ids_of(tokenizer, "x\n", EOS)[1:]})
    made = continue_outputs(policy, outputs, cut_into_prefixes(outputs), CONFIG, samples=2, seed=0)
    assert (made.rows(), made.metrics["rm/continuations"]) == ([], 0)


class Endless:
    """A generator that never stops, and notes what it was asked."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.rooms: list[int] = []

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[list[Output]]:
        room = sampling.max_output_tokens
        assert all(len(prompt.ids) + room <= self.window for prompt in prompts)
        self.rooms.append(room)
        if progress is not None:
            progress(sum(len(prompt.seeds) for prompt in prompts), 0)
        ids, logprobs = np.arange(room, dtype=np.int32), np.zeros(room, dtype=np.float32)
        return [[Output(ids, logprobs, "length") for _ in prompt.seeds] for prompt in prompts]


def test_no_call_goes_beyond_the_window_or_samples_much_in_vain() -> None:
    prefixes = [Prefix("q", length, [5] * 4, [6] * length) for length in (19, 1, 7, 3, 12, 18)]
    generator = Endless(window=24)
    seen: list[int] = []
    with listen(lambda topic, values: seen.append(values["done"]) if topic == "continue_outputs" else None):
        made = complete(generator, prefixes, Sampling(1.0, 20, (0,)), samples=2, seed=0, window=24)
    assert [[len(output.ids) for output in group] for group in made] == [[20 - len(p.ids)] * 2 for p in prefixes]
    assert generator.rooms == [19, 17, 13, 8, 2, 1]
    wide = Endless(window=100)
    assert complete(wide, prefixes, Sampling(1.0, 20, (0,)), samples=2, seed=0, window=100)[0][0].ids.tolist() == [0]
    assert wide.rooms == [19, 13, 2]  # 1 and 3, 7 and 12, 18 and 19: a quarter of 20 apart at most
    assert seen[-1] == 12


def test_what_cannot_be_continued_is_refused_by_row() -> None:
    policy, tokenizer = markov_policy(CHANCES)
    outputs = world(tokenizer)
    cut = cut_into_prefixes(outputs)
    with pytest.raises(ValueError, match=r"\('q0', 0\).* 0 and 0"):
        cut_into_prefixes(Rollouts.write([rollout_row("q0", 0, [])]))
    with pytest.raises(ValueError, match=r"temperature 0 .* 2"):
        continue_outputs(policy, outputs, cut, CONFIG.override({"G": 1, "temperature": 0.0}), samples=2, seed=0)
    with pytest.raises(ValueError, match=r"\('q0', 0\): step 1 .* token 2, .*max_output_tokens = 2"):
        continue_outputs(policy, outputs, cut, CONFIG.override({"max_output_tokens": 2}), samples=2, seed=0)
    with pytest.raises(ValueError, match=r"\('q1', 0\)"):
        continue_outputs(policy, Rollouts.write(outputs.rows()[:3]), cut, CONFIG, samples=2, seed=0)
    other, _ = markov_policy({":": {"x": 0.5, "bad\n": 0.5}, "good\n": {"#### 1": 1.0, "#### 0": 1.0}})
    with pytest.raises(ValueError, match=r"\('q0', 0\) .*tokenizer"):
        continue_outputs(other, outputs, cut, CONFIG, samples=2, seed=0)
    narrow, _ = markov_policy(CHANCES, window=8)
    with pytest.raises(PromptTooLongError, match="'q0'"):
        continue_outputs(narrow, outputs, cut, CONFIG, samples=2, seed=0)


def test_outputs_of_several_turns_are_not_cut(store: Store) -> None:
    turns = [{"start": 0, "end": 2}, {"start": 3, "end": 5}]
    rows = [output_row("q", 0, "a\nb\n", turns=None), output_row("q", 1, "a\nb\n", turns=turns)]
    with pytest.raises(ValueError, match=r"output \('q', 1\).*found 2"):
        cut_into_prefixes(Rollouts.write(rows))
