"""What the step benchmark counts and samples from: floors by hand, word problems, what both sides are given."""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config

from benchmarks import step
from benchmarks.floor import Forward, Group, alone, floor_flops, generated, learned, step_work
from benchmarks.policies import LEAST, MOST, make_words, word_problem
from benchmarks.trl_worker import Sampled, answer_reward
from benchmarks.workload import Workload, make_policy, make_questions, shape_of
from pipeline.store import Store, use_store
from stages.arithmetic import ArithmeticConfig, unique_chains
from stages.data import QuestionFileConfig, read_questions, sample_batch

PEER = Path(__file__).parents[2] / ".venv-bench" / "bin" / "python"
GROUPS: list[Group] = [(3, [[1, 2], [1, 2], [1, 3], [4]])]
"""A prompt of three tokens, and outputs that begin alike and repeat."""


def tiny(folder: Path, **changes: object) -> Workload:
    shape = {"vocabulary": 128, "hidden": 2, "layers": 1, "heads": 1, "kv_heads": 1, "intermediate": 3}
    return Workload(str(folder), **{"questions": 2, "group": 2, "tokens": 4, "steps": 3, **shape, **changes})  # type: ignore[arg-type]


def test_a_prefix_and_an_output_count_once_and_a_last_token_never() -> None:
    # Prompt: 3 tokens that attend to 1 + 2 + 3 positions; behind it `1` alone, at the fourth place, leads on.
    assert generated(GROUPS) == Forward(tokens=4, positions=6 + 4, logits=2)
    # Learning: `1` before 2 and before 3, since two different outputs have it; nothing behind the prompt is fed for `4`.
    assert learned(GROUPS) == Forward(tokens=5, positions=6 + 4 + 4, logits=3)
    assert alone(GROUPS) == Forward(tokens=3 * 4 + 3, positions=3 * 10 + 6, logits=3 * 2 + 1)
    assert learned(GROUPS * 2) == Forward(10, 28, 6), "questions share nothing with each other"


def test_floors_are_products_of_the_model_by_hand(tmp_path: Path) -> None:
    workload = tiny(tmp_path, vocabulary=5)
    # q, k, v, o of 2 x 2 and three of 2 x 3: 34 weights; the head has 10.
    forward = 5 * 2 * 34 + 4 * 2 * 14 + 3 * 2 * 10
    sampled = 4 * 2 * 34 + 4 * 2 * 10 + 2 * 2 * 10
    assert (sampled, forward) == (392, 512)
    assert floor_flops(workload, GROUPS) == {"generation": 392, "reference": 512, "update": 1536}
    work = step_work(workload, GROUPS, [1.0, 1.0, 0.0, 0.0])
    assert (work["different"], work["outputs"], work["output_tokens"], work["reward"]) == (0.75, 4, 7 / 4, 0.5)
    assert work["unshared_flops"] == 3 * (15 * 2 * 34 + 4 * 2 * 36 + 7 * 2 * 10)


def test_fewer_key_heads_make_smaller_products(tmp_path: Path) -> None:
    whole, grouped = tiny(tmp_path, hidden=8, heads=4, kv_heads=4), tiny(tmp_path, hidden=8, heads=4, kv_heads=1)
    assert Forward(tokens=1).flops(whole) - Forward(tokens=1).flops(grouped) == 2 * 2 * 8 * (8 - 2)


@pytest.mark.parametrize("characters_per_token", [1, 4])
def test_word_problems_have_their_length_and_their_chain_in_order(characters_per_token: int) -> None:
    draw, chains = random.Random(0), unique_chains(ArithmeticConfig(count=200, longest=4), "train")

    def tokens(text: str) -> int:
        return len(text) // characters_per_token + 1

    problems = [word_problem(chain, draw, tokens) for chain in chains]
    assert all(LEAST <= tokens(text) <= MOST for text in problems)
    assert len(set(problems)) == len(problems)
    for chain, text in zip(chains, problems, strict=True):
        assert list(map(int, re.findall(r"\d+", text))) == [chain.first, *(operand for _, operand in chain.operations)]
        signs = ["+" if re.search("more", part) else "-" for part in re.findall(r"[^.]*\d[^.]*\.", text)[1:]]
        assert signs == [sign for sign, _ in chain.operations]


def test_a_problem_that_is_too_long_for_its_prompt_is_refused() -> None:
    (chain,) = unique_chains(ArithmeticConfig(count=1), "train")
    with pytest.raises(ValueError, match=str(MOST)):
        word_problem(chain, random.Random(0), lambda text: 10 * len(text))


def test_words_ask_a_given_policy_by_its_own_tokens(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    made = tiny(tmp_path / "made")
    make_policy(made)
    (tmp_path / "words").mkdir()
    workload = tiny(tmp_path / "words", kind="words")
    rows = make_words(workload, made.policy, quick=True)
    assert shape_of(workload.policy) == {name: getattr(made, name) for name in shape_of(made.policy)}
    tokenizer = AutoTokenizer.from_pretrained(workload.policy)
    lengths = [len(tokenizer(row["question"] + "\n")["input_ids"]) for row in rows]
    assert len(rows) == 6
    assert min(lengths) >= LEAST
    assert max(lengths) <= MOST


def test_the_peer_is_asked_what_the_pipeline_draws_in_its_order(tmp_path: Path) -> None:
    options = step._options(["--questions", "2", "--rounds", "2", "--group", "2", "--tokens", "4"])
    workload = step._prepare(options, str(tmp_path))
    asked = json.loads(workload.prompt_file.read_text())
    with use_store(Store(tmp_path / "store")):
        questions = read_questions(QuestionFileConfig(path=str(workload.question_file)))
        drawn = [row for at in range(3) for row in sample_batch(questions, size=2, step=at, seed=workload.seed).rows()]
    assert asked == [{"prompt": row["question"] + "\n", "answer": row["answer"]} for row in drawn]
    assert len({row["prompt"] for row in asked}) == 6


def test_a_question_in_a_chat_is_a_turn_for_the_peer(tmp_path: Path) -> None:
    row = {"question_id": "q", "question": "2+2?", "answer": "4"}
    assert tiny(tmp_path, chat=True).peer_row(row)["prompt"] == [{"role": "user", "content": "2+2?"}]


def test_the_peers_answer_rule_takes_the_last_answer(tmp_path: Path) -> None:
    reward = answer_reward(tiny(tmp_path, kind="sharp").answer_pattern)
    texts = ["7+5=12\n#### 12", "#### 12\n#### 3", "12", "#### 120", "#### -3"]
    assert reward(texts, ["12", "12", "12", "12", "-3"]) == [1.0, 0.0, 0.0, 0.0, 1.0]
    turn = answer_reward(tiny(tmp_path, kind="words", chat=True).answer_pattern)
    assert turn([[{"content": "It is 3, so 12."}], [{"content": "none"}]], ["12", "12"]) == [1.0, 0.0]


def test_the_peers_outputs_are_noted_by_question() -> None:
    sampled = Sampled(2)
    generate = sampled.noting_ids(lambda prompts, images, fields, count: ([[7], [7, 8], [9], [9]], None))
    assert generate([[1, 2], [1, 2], [3], [3]], None, {}, 2) == ([[7], [7, 8], [9], [9]], None)
    assert sampled.groups == [(2, [[7], [7, 8]]), (1, [[9], [9]])]


@pytest.mark.parametrize("config", [Qwen2Config, LlamaConfig])
def test_a_shape_the_floor_does_not_count_is_refused(tmp_path: Path, config: type) -> None:
    settings = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
    config(**settings, intermediate_size=12, vocab_size=50).save_pretrained(tmp_path)
    shape = {"vocabulary": 50, "hidden": 8, "layers": 3, "heads": 2, "kv_heads": 1, "intermediate": 12}
    assert shape_of(tmp_path) == shape
    for name, value in (("model_type", "gpt2"), ("head_dim", 16)):
        found = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(found | {name: value}))
        with pytest.raises(SystemExit):
            shape_of(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    "wrong",
    [
        ["--pretrained"],
        ["--workload", "sharp", "--pretrained"],
        ["--workload", "words", "--pretrained", "--policy", "folder"],
        ["--policy", "folder"],
        ["--workload", "words", "--shape", "qwen2.5-0.5b"],
    ],
)
def test_an_option_that_the_workload_does_not_read_is_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        step._options(wrong)


@pytest.mark.parametrize(("kind", "sizes"), [("random", (32, 16, 48)), ("sharp", (64, 16, 64)), ("words", (16, 8, 64))])
def test_each_workload_has_sizes_of_its_own(kind: str, sizes: tuple[int, int, int]) -> None:
    def found(*arguments: str) -> tuple[int, int, int]:
        options: argparse.Namespace = step._options(["--workload", kind, *arguments])
        return options.questions, options.group, options.tokens

    assert found() == sizes
    assert found("--group", "3") == (sizes[0], 3, sizes[2])


def test_random_questions_are_as_many_as_steps_need(tmp_path: Path) -> None:
    rows = make_questions(tiny(tmp_path))
    assert len({row["question"] for row in rows}) == 6
    assert all(eval(row["question"].split()[1].rstrip(".")) == int(row["answer"]) for row in rows)


@pytest.mark.slow
def test_both_sides_answer_the_same_questions_and_say_what_they_did(tmp_path: Path) -> None:
    """Every function that is watched is there, too: a worker that misses one ends."""
    (tmp_path / "made").mkdir()
    made = tiny(tmp_path / "made", hidden=32, intermediate=64, heads=2, kv_heads=2)
    make_policy(made)
    sides = ["cohort:inline:eager:4096", *(["trl:eager:8"] if PEER.exists() else [])]
    words = ["--workload", "words", "--policy", str(made.policy), "--questions", "2", "--group", "4", "--tokens", "6"]
    once = [
        "--rounds",
        "1",
        "--warmup",
        "1",
        "--threads",
        "1",
        "--precision",
        "fp32",
        "--out",
        str(tmp_path / "out.json"),
    ]
    step.main([*words, *once, "--peer-python", str(PEER), "--sides", *sides])
    report = json.loads((tmp_path / "out.json").read_text())
    assert list(report["results"]) == sides
    assert report["workload"]["hidden"] == 32
    found = list(report["results"].values())
    for result in found:
        assert {"generation", "reference", "update"} <= result["phases"].keys()
        assert LEAST <= result["prompt_tokens"] <= MOST
        assert 1 <= result["output_tokens"] <= 6
        assert result["times_the_floor"] == result["seconds"] / sum(result["floor_s"].values())
    assert len({result["prompt_tokens"] for result in found}) == 1, "both draw the same questions"
