"""Outputs that end at stop strings and stop ids: those without stops, cut at the token that completes the first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.config import ConfigError
from stages.models import load_tokenizer
from stages.rollout import HFBackendConfig, RolloutConfig, continue_outputs, cut_into_prefixes, rollout
from stages.tables import Rollouts
from stages.text import PromptConfig, decode_outputs
from tests.stages.rollout.markov import ids_of, markov_policy
from tests.stages.rollout.policies import byte_level, questions, tiny_policy
from tests.stages.rows import rollout_row

pytestmark = pytest.mark.usefixtures("store")

CONFIG = RolloutConfig(G=8, max_output_tokens=12, backend=HFBackendConfig(dtype="float32", threads=1))
PROMPT = PromptConfig(suffix="\n")


def cut(tokenizer: Any, row: dict[str, Any], strings: list[str], ids: list[int]) -> tuple[list[int], str]:
    """Decode every prefix of an output that had no stops of ours."""
    sampled = row["output_ids"]
    for end in range(1, len(sampled) + 1):
        text = decode_outputs(tokenizer, [sampled[:end]]).texts[0]
        if sampled[end - 1] in ids or any(string in text for string in strings):
            return sampled[:end], "stop"
    return sampled, row["finish_reason"]


@pytest.mark.parametrize("level", ["characters", "bytes"])
def test_an_output_is_that_without_stops_up_to_the_first_of_them(level: str) -> None:
    policy = tiny_policy(3, head=8, spread=0.12, tokenizer=byte_level() if level == "bytes" else None)
    tokenizer, asked, draw = load_tokenizer(policy), questions("1+2", "34-5=", "7"), np.random.default_rng(0)
    free = rollout(policy, asked, PROMPT, CONFIG, seed=1).rows()
    texts, ends = "".join(row["text"] for row in free).replace("\N{REPLACEMENT CHARACTER}", ""), set()
    for size in (1, 2, 3):
        at = draw.integers(0, len(texts) - size, 3)
        strings = sorted({texts[i : i + size] for i in at})
        ids = draw.integers(4, len(tokenizer), 2).tolist() if size < 3 else []
        rows = rollout(
            policy, asked, PROMPT, CONFIG.override({"stop_strings": strings, "stop_ids": ids}), seed=1
        ).rows()
        for row, before in zip(rows, free, strict=True):
            expected, reason = cut(tokenizer, before, strings, ids)
            assert (row["output_ids"], row["finish_reason"]) == (expected, reason)
            np.testing.assert_allclose(row["logprobs"], before["logprobs"][: len(expected)], atol=1e-4)
            assert row["text"] == decode_outputs(tokenizer, [expected]).texts[0]
            ends.add((len(expected) < len(before["output_ids"]), reason))
    assert {(True, "stop"), (False, "length")} <= ends


@pytest.mark.parametrize(("string", "tokens"), [("```", 2), ("p", 2), ("y\n``", 3), ("\n", 2), ("``", 1)])
def test_a_string_within_a_token_or_across_tokens_ends_a_whole_token(string: str, tokens: int) -> None:
    policy, tokenizer = markov_policy({"\n": {"``": 1.0}, "``": {"`py\n": 1.0}, "`py\n": {"``": 1.0}})
    (row,) = rollout(policy, questions(""), PROMPT, CONFIG.override({"G": 1, "stop_strings": [string]}), seed=0).rows()
    assert row["output_ids"] == ids_of(tokenizer, "``", "`py\n", "``")[:tokens]
    assert (row["finish_reason"], len(row["logprobs"])) == ("stop", tokens)


def test_a_continuation_ends_with_a_string_that_its_prefix_began() -> None:
    policy, tokenizer = markov_policy({"good\n": {"b": 1.0}, "b": {"good\n": 1.0}})
    ids = ids_of(tokenizer, "good\n", "b", "good\n", "b")
    text, ends = (part[0] for part in decode_outputs(tokenizer, [ids]))
    outputs = Rollouts.write([rollout_row("q", 0, ids, [2], finish_reason="length", text=text, text_ends=ends)])
    prefixes = cut_into_prefixes(outputs)
    config = CONFIG.override({"G": 2, "max_output_tokens": 12, "stop_strings": ["\nb"]})
    rows = continue_outputs(policy, outputs, prefixes, config, samples=1, seed=0).rows()
    assert [(row["output_ids"], row["finish_reason"]) for row in rows] == [(ids[:2], "stop"), (ids, "stop")]


def test_runs_without_stops_keep_their_keys_and_stops_are_part_of_it() -> None:
    assert not {"stop_strings", "stop_ids"} & set(CONFIG.key())
    strings, ids = CONFIG.override({"stop_strings": ["a"]}), CONFIG.override({"stop_ids": [5]})
    assert (strings.key()["stop_strings"], ids.key()["stop_ids"]) == (["a"], [5])
    assert len({repr(config.key()) for config in (CONFIG, strings, ids)}) == 3


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"stop_strings": [""]}, "stop_strings"),
        ({"stop_strings": ["a\N{REPLACEMENT CHARACTER}"]}, "stop_strings"),
        ({"stop_strings": ["a", "b", "a"]}, "stop_strings"),
        ({"stop_strings": ["``", "```"]}, "stop_strings: '```' has '``'"),
        ({"stop_ids": [3, 3]}, "stop_ids"),
        ({"stop_ids": [-1]}, "stop_ids"),
        ({"stop_strings": ["a"], "stop": False}, "stop: false"),
        ({"stop_ids": [3], "stop": False}, "stop: false"),
    ],
)
def test_stops_that_would_mean_nothing_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        CONFIG.override(settings)


@pytest.mark.parametrize("settings", [{"stop_strings": ["x"]}, {"stop_ids": [17]}])
def test_stops_that_the_tokenizer_does_not_have_are_refused_before_sampling(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.{next(iter(settings))}: "):
        rollout(tiny_policy(0, head=8), questions("1+2"), PROMPT, CONFIG.override(settings), seed=0)
