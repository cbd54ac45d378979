"""Demonstrations in the place of outputs: the same ids as supervised fine-tuning, batches without replacement."""

from __future__ import annotations

from collections import Counter

import pytest

from pipeline.store import Store
from stages.models import Checkpoint, load_tokenizer
from stages.sft import PolicyConfig, SFTConfig, create_policy, demonstrated_outputs
from stages.sft.stage import _weights
from stages.tables import DataError, Demonstrations, Rollouts
from stages.text import PromptConfig, encode_completions, encode_prompt
from stages.training.batching import Row, micro_batches

PROMPT = PromptConfig(suffix="\n")
SETTINGS = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def demonstrations(questions: int = 5, each: int = 2) -> Demonstrations:
    """`each` ways of saying every number."""
    rows = [(number, way) for number in range(questions) for way in range(each)]
    return Demonstrations.write(
        {
            "question_id": [f"q{number}" for number, _ in rows],
            "question": [f"Say {number}." for number, _ in rows],
            "completion": [f"way {way} é\n#### {number}" for number, way in rows],
            "author": [None] * len(rows),
        }
    )


def policy_for(corpus: Demonstrations, **changes: int) -> Checkpoint:
    return create_policy(PolicyConfig(settings=SETTINGS | changes), corpus, PROMPT)


def drawn(policy: Checkpoint, corpus: Demonstrations, *, step: int, size: int = 4, seed: int = 0) -> Rollouts:
    return demonstrated_outputs(policy, corpus, PROMPT, size=size, step=step, seed=seed)


def test_rows_hold_what_supervised_finetuning_trains_on(store: Store) -> None:
    corpus = demonstrations()
    policy = policy_for(corpus)
    tokenizer = load_tokenizer(policy)
    asked_of = {(row["question_id"], row["completion"]): row["question"] for row in corpus.rows()}
    for row in drawn(policy, corpus, step=0, seed=7).rows():
        question = asked_of[row["question_id"], row["text"]]
        assert row["prompt_ids"] == encode_prompt(tokenizer, question, PROMPT)
        assert row["output_ids"] == encode_completions(tokenizer, [row["text"]])[0]
        assert row["output_ids"][-1] == tokenizer.eos_token_id
        # One token a character, then the end of sequence, which adds none.
        length = len(row["text"])
        assert row["text_ends"] == [*range(1, length + 1), length]
        others = {name: row[name] for name in ("logprobs", "finish_reason", "temperature", "seed")}
        assert others == {"logprobs": None, "finish_reason": "stop", "temperature": 1.0, "seed": 7}


def test_every_epoch_draws_every_demonstration_once(store: Store) -> None:
    corpus = demonstrations()
    policy = policy_for(corpus)
    every = Counter((row["question_id"], row["completion"]) for row in corpus.rows())
    batches = [[(row["question_id"], row["text"]) for row in drawn(policy, corpus, step=s).rows()] for s in range(5)]
    assert all(len(set(batch)) == 4 for batch in batches)
    both = [row for batch in batches for row in batch]  # 5 batches of 4: two epochs of 10
    assert Counter(both[:10]) == Counter(both[10:]) == every
    assert both[:10] != both[10:]


def test_several_demonstrations_of_a_question_are_its_samples(store: Store) -> None:
    corpus = demonstrations(questions=3, each=3)
    keys = [(r["question_id"], r["sample"]) for r in drawn(policy_for(corpus), corpus, step=0, size=9).rows()]
    assert sorted(keys) == [(f"q{number}", sample) for number in range(3) for sample in range(3)]
    for number in range(3):
        assert [sample for name, sample in keys if name == f"q{number}"] == [0, 1, 2]


def test_another_seed_draws_others_and_the_same_step_draws_the_same(store: Store) -> None:
    corpus = demonstrations()
    policy = policy_for(corpus)
    texts = [[row["text"] for row in drawn(policy, corpus, step=1, seed=seed).rows()] for seed in (0, 0, 1)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_more_than_the_set_has_and_more_than_the_window_holds_are_refused(store: Store) -> None:
    corpus = demonstrations()
    with pytest.raises(DataError, match=r"expected size in 1..10 .* found 11"):
        drawn(policy_for(corpus), corpus, step=0, size=11)
    small = policy_for(corpus, max_position_embeddings=8)
    with pytest.raises(ValueError, match=r"'q\d': expected at most 8 tokens"):
        drawn(small, corpus, step=0)


def test_what_an_environment_wrote_in_a_demonstration_is_encoded_by_itself_and_not_imitated(store: Store) -> None:
    corpus = demonstrations()
    policy, tokenizer = policy_for(corpus), load_tokenizer(policy_for(corpus))
    rows = corpus.rows()
    text = rows[0]["completion"]
    given = Demonstrations.write([rows[0] | {"observed": [{"start": 2, "end": 5}, {"start": 7, "end": 9}]}, rows[1]])
    found = {row["question_id"] + row["text"]: row for row in drawn(policy, given, step=0, size=2).rows()}
    row = found["q0" + text]
    parts = [text[:2], text[2:5], text[5:7], text[7:9], text[9:]]
    ids = [ids[:-1] for ids in encode_completions(tokenizer, parts)]
    assert row["output_ids"] == [*(token for part in ids for token in part), tokenizer.eos_token_id]
    written = [number % 2 == 0 for number, part in enumerate(ids) for _ in part] + [True]
    assert [any(turn["start"] <= at < turn["end"] for turn in row["turns"]) for at in range(len(written))] == written
    assert found["q0" + rows[1]["completion"]]["turns"] is None
    for wrong in ([(2, 1)], [(3, 5), (4, 6)], [(0, len(text) + 1)]):
        spans = [{"start": start, "end": end} for start, end in wrong]
        with pytest.raises(ValueError, match="question 'q0'"):
            drawn(policy, Demonstrations.write([rows[0] | {"observed": spans}]), step=0, size=1)


def test_the_loss_of_supervised_finetuning_is_over_what_is_to_be_written(store: Store) -> None:
    given = [Row([1, 2], [3, 4, 5, 6], (True, False, False, True)), Row([1], [7, 8])]
    (batch,) = micro_batches(given, 100)
    order = list(batch.rows)
    for aggregation, shares in (("sequence_mean", [[1 / 4, 0, 0, 1 / 4], [1 / 4, 1 / 4, 0, 0]]), ("token_mean", None)):
        expected = shares or [[1 / 4, 0, 0, 1 / 4], [1 / 4, 1 / 4, 0, 0]]  # two tokens of each: four in all
        weights = _weights(batch, given, SFTConfig().override({"aggregation": aggregation}))
        assert weights.tolist() == [expected[index] for index in order]
