"""Outputs of several turns: ids are appended and never encoded again, each turn is what the policy samples behind the rest."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from stages.join import JoinError, written_by_policy
from stages.models import Checkpoint, load_model, load_tokenizer
from stages.rollout import HFBackendConfig, RolloutConfig, continue_dialogues, rollout
from stages.rollout.dialogue import encode_observation
from stages.tables import Rollouts, ToolCalls
from stages.text import PromptConfig
from stages.text.tokenizers import EOS
from tests.stages.rollout.markov import ids_of, markov_policy
from tests.stages.rollout.policies import byte_level, questions, tiny_policy

pytestmark = pytest.mark.usefixtures("store")

CONFIG = RolloutConfig(G=1, max_output_tokens=20, backend=HFBackendConfig(dtype="float32", threads=1))
PROMPT = PromptConfig(suffix="\n")
# Its own encoder would write each text letter by letter: no output reads back as the ids that were sampled.
NO_ROUND_TRIP = {
    "\n": {"ab": 1.0}, "ab": {"c]": 1.0}, "c]": {"a": 1.0}, "b": {"x": 1.0}, "x": {EOS: 1.0}, "a": {"a": 1.0},
}  # fmt: skip


def answer(question: str, sample: int, turn: int, observation: str, *, done: bool = False) -> dict[str, Any]:
    said = {"tool": "t", "input": "", "output": "", "observation": observation, "status": "ok", "done": done}
    return {"question_id": question, "sample": sample, "turn": turn, **said}


def answers_to(outputs: Rollouts, observation: str, **changes: Any) -> ToolCalls:
    """Answer each output that waits, in its last turn."""
    waiting = [row for row in outputs.rows() if row["finish_reason"] == "call"]
    turns = [len(row["turns"] or [0]) - 1 for row in waiting]
    return ToolCalls.write(
        [
            answer(row["question_id"], row["sample"], turn, observation, **changes)
            for row, turn in zip(waiting, turns, strict=True)
        ]
    )


def own_logprobs(policy: Checkpoint, prompt: list[int], ids: list[int], temperature: float) -> np.ndarray:
    """Return the log-probability of each id by one forward over all of them."""
    model = load_model(policy, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    logp = torch.log_softmax(logits / temperature, dim=-1)
    return logp.gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()


@pytest.mark.claim("tools")
def test_ids_are_those_sampled_and_those_of_the_answer_appended() -> None:
    policy, tokenizer = markov_policy(NO_ROUND_TRIP)
    first = rollout(policy, questions(""), PROMPT, CONFIG, seed=0, call_ends=["]"])
    (row,) = first.rows()
    sampled = ids_of(tokenizer, "ab", "c]")
    assert (row["output_ids"], row["finish_reason"], row["turns"]) == (sampled, "call", None)
    assert tokenizer.encode(row["text"], add_special_tokens=False) != sampled
    assert first.metrics["rollout/waiting"] == 1
    second = continue_dialogues(policy, first, answers_to(first, "ab"), CONFIG, call_ends=["]"], max_calls=1)
    (row,) = second.rows()
    observed, more = ids_of(tokenizer, "a", "b"), ids_of(tokenizer, "x", EOS)
    assert row["output_ids"] == sampled + observed + more
    assert row["turns"] == [{"start": 0, "end": 2}, {"start": 4, "end": 6}]
    assert [value is None for value in row["logprobs"]] == [False, False, True, True, False, False]
    assert (row["finish_reason"], row["text"]) == ("stop", "abc]abx")
    assert written_by_policy(second.read()).tolist() == [True, True, False, False, True, True]
    expected = {"rollout/waiting": 0, "rollout/turns_mean": 2, "rollout/observed_tokens": 2, "rollout/length_mean": 4}
    assert expected.items() <= second.metrics.items()
    assert second.metrics["rollout/seconds"] > first.metrics["rollout/seconds"]


def test_a_turn_is_what_the_policy_samples_behind_all_before_it() -> None:
    policy = tiny_policy(3, head=8, spread=0.12)
    config = CONFIG.override({"G": 6, "max_output_tokens": 40, "temperature": 0.7})
    asked = questions("1+2", "34-5=", "7")
    outputs = rollout(policy, asked, PROMPT, config, seed=1, call_ends=["3", "5="])
    calls, rows = answers_to(outputs, ".9\n"), outputs.rows()
    assert 3 <= sum(row["finish_reason"] == "call" for row in rows) < len(rows)
    made = continue_dialogues(policy, outputs, calls, config, call_ends=["3", "5="], max_calls=4)
    for before, after in zip(rows, made.rows(), strict=True):
        if before["finish_reason"] != "call":
            assert after == before
            continue
        start = len(before["output_ids"]) + 3
        assert after["output_ids"][: start - 3] == before["output_ids"]
        assert after["output_ids"][start - 3 : start] == encode_observation(load_tokenizer(policy), ".9\n")
        theirs = own_logprobs(policy, after["prompt_ids"], after["output_ids"], temperature=0.7)
        written = [*range(start - 3), *range(start, len(after["output_ids"]))]
        np.testing.assert_allclose([after["logprobs"][at] for at in written], theirs[written], atol=1e-4)
    alone = Rollouts.write([row for row in rows if row["question_id"] == "q1"])
    apart = continue_dialogues(policy, alone, calls, config, call_ends=["3", "5="], max_calls=4)
    together = [row for row in made.rows() if row["question_id"] == "q1"]
    assert [row["output_ids"] for row in apart.rows()] == [row["output_ids"] for row in together]


def test_samples_of_a_question_go_on_by_seeds_of_their_own_in_every_turn() -> None:
    policy, _ = markov_policy({"\n": {"]": 1.0}, "]": {"a": 0.5, "b": 0.5}, "a": {"]": 1.0}, "b": {"]": 1.0}})
    config = CONFIG.override({"G": 64, "max_output_tokens": 9})
    outputs = rollout(policy, questions(""), PROMPT, config, seed=0, call_ends=["]"])
    for turn in range(3):
        calls = ToolCalls.write([answer("q0", sample, turn, "]") for sample in range(64)])
        outputs = continue_dialogues(policy, outputs, calls, config, call_ends=["]"], max_calls=5)
    texts = [row["text"] for row in outputs.rows()]
    for place in (2, 5, 8):  # ]]a]]b]]a, ...
        share = sum(text[place] == "a" for text in texts) / 64
        assert abs(share - 0.5) < 5 * math.sqrt(0.25 / 64)
    assert len({text[2] + text[5] + text[8] for text in texts}) == 8


@pytest.mark.parametrize(
    ("observation", "done", "max_calls", "length", "reason"),
    [
        ("a", False, 1, 4, "length"),  # ] a b ]: a call beyond the limit
        ("a", False, 2, 4, "call"),
        ("a", True, 2, 1, "stop"),  # the environment ends it
        ("a" * 8, False, 2, 1, "length"),  # no room behind the answer
        ("a" * 7, False, 2, 9, "length"),  # room for one token
    ],
)
def test_an_output_ends_where_nothing_can_follow(
    observation: str, done: bool, max_calls: int, length: int, reason: str
) -> None:
    policy, _ = markov_policy({"\n": {"]": 1.0}, "]": {"a": 1.0}, "a": {"b": 1.0}, "b": {"]": 1.0}})
    config = CONFIG.override({"max_output_tokens": 9})
    outputs = rollout(policy, questions(""), PROMPT, config, seed=0, call_ends=["]"])
    calls = answers_to(outputs, observation, done=done)
    made = continue_dialogues(policy, outputs, calls, config, call_ends=["]"], max_calls=max_calls)
    (row,) = made.rows()
    assert (len(row["output_ids"]), row["finish_reason"]) == (length, reason)


def test_an_answer_may_be_a_message_of_the_chat_template() -> None:
    policy, tokenizer = markov_policy({"\n": {"]": 1.0}, "]": {"a": 1.0}, "a": {"b": 1.0}, "b": {EOS: 1.0}})
    template = f"{{% for m in messages %}}{{{{ m.content }}}}{EOS}{{% endfor %}}{{{{ '\\n' }}}}"
    prompt = PromptConfig.parse({"chat": "tokenizer", "chat_template": template})
    outputs = rollout(policy, questions(""), prompt, CONFIG, seed=0, call_ends=["]"])
    calls = answers_to(outputs, "ab")
    made = continue_dialogues(policy, outputs, calls, CONFIG, call_ends=["]"], max_calls=1, messages=prompt)
    (row,) = made.rows()
    assert row["output_ids"] == ids_of(tokenizer, "]", EOS, "a", "b", EOS, "\n", "]")
    assert row["turns"] == [{"start": 0, "end": 1}, {"start": 6, "end": 7}]


def test_without_an_output_that_waits_the_outputs_are_those_given() -> None:
    policy, _ = markov_policy({"\n": {"a": 1.0}, "a": {"]": 1.0}})
    outputs = rollout(policy, questions(""), PROMPT, CONFIG, seed=0)
    made = continue_dialogues(policy, outputs, ToolCalls.write([]), CONFIG, call_ends=["x"], max_calls=1)
    assert (made.digest, made.metrics) == (outputs.digest, outputs.metrics)


def test_an_output_that_waits_without_an_answer_is_refused_by_its_key() -> None:
    policy, _ = markov_policy({"\n": {"]": 1.0}})
    outputs = rollout(policy, questions(""), PROMPT, CONFIG, seed=0, call_ends=["]"])
    calls = ToolCalls.write([answer("q0", 0, 1, "another turn")])
    with pytest.raises(JoinError) as refused:
        continue_dialogues(policy, outputs, calls, CONFIG, call_ends=["]"], max_calls=1)
    assert refused.value.missing == ("q0", 0, 0)


def test_an_answer_gives_no_special_token_and_loses_what_cannot_be_written() -> None:
    tokenizer = byte_level()
    ids = encode_observation(tokenizer, f"1{tokenizer.eos_token}2")
    assert tokenizer.decode(ids) == f"1{tokenizer.eos_token}2"
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)
    characters = load_tokenizer(tiny_policy(0, head=8))
    assert characters.decode(encode_observation(characters, "12é3")) == "123"
    assert encode_observation(characters, "é") == encode_observation(characters, "") == []
