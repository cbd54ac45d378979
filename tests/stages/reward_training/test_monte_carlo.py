"""Step labels by completion: by hand, by the chances of a known policy, and against the built-in world's exact checker."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from stages.arithmetic import (
    ArithmeticConfig,
    Author,
    Chain,
    parse_question,
    render_question,
    unique_chains,
    write_solution,
)
from stages.join import JoinError
from stages.reward import RewardConfig, score
from stages.reward_training import MonteCarloConfig, estimate_step_labels, label_outputs
from stages.rollout import HFBackendConfig, RolloutConfig, continue_outputs, cut_into_prefixes
from stages.rollout.continuation import Prefix, complete
from stages.rollout.generator import Output, Progress, Prompt, Sampling
from stages.tables import Questions, RewardLabels, Rewards, Rollouts, StepPrefixes
from stages.text import CharacterTokenizerConfig, build_tokenizer, decode_outputs
from stages.text.tokenizers import EOS
from tests.stages.rollout.markov import ids_of, markov_policy
from tests.stages.rows import label_row, output_row, question_table, reward_row

pytestmark = pytest.mark.usefixtures("store")

ACCURACY: dict[str, Any] = {"kind": "accuracy", "conventions": ["hashes"], "verifier": "exact"}

# ------------------------------------------------------------------------------------- by hand

ENDS = {0: [1, 3, 6], 1: [1, 3], 2: [4]}
"""Step ends of three outputs of one question; the first two begin with the same step."""
NUMBERS = {0: [0, 1, None], 1: [0, None], 2: [None]}
RIGHT = {0: 1.0, 1: 0.0, 2: 0.0}


def labels(exact: dict[int, list[float]] | None = None) -> RewardLabels:
    return RewardLabels.write(
        [
            label_row("q", sample, list(range(3, ends[-1] + 4)), RIGHT[sample])
            | ({"step_ends": ends, "step_labels": exact[sample]} if exact else {})
            for sample, ends in ENDS.items()
        ]
    )


def prefixes(samples: Sequence[int] = (0, 1, 2)) -> StepPrefixes:
    return StepPrefixes.write(
        [
            {"question_id": "q", "sample": sample, "step": step, "end": end, "prefix": number}
            for sample in samples
            for step, (end, number) in enumerate(zip(ENDS[sample], NUMBERS[sample], strict=True))
        ]
    )


def verdicts(*statuses: str, **changes: Any) -> Rewards:
    """Of continuations 0, 1, ...; a dash is an output taken out for its length."""
    rows = [
        reward_row("q", sample, None if status in ("error", "-") else float(status == "ok"))
        | {"status": "truncated" if status == "-" else status, **changes}
        for sample, status in enumerate(statuses)
    ]
    return Rewards.write(rows)


def estimated(rewards: Rewards, config: MonteCarloConfig, **given: Any) -> list[list[float] | None]:
    made = estimate_step_labels(given.get("labels", labels()), given.get("prefixes", prefixes()), rewards, config)
    assert [row["step_ends"] for row in made.rows()] == [
        ends if row["step_labels"] else None for ends, row in zip(ENDS.values(), made.rows(), strict=True)
    ]
    return [row["step_labels"] for row in made.rows()]


MIXED = ("ok", "wrong", "wrong", "unparseable", "wrong", "wrong", "truncated", "wrong")
"""Four continuations of each of two prefixes: one is right, then none."""


def test_a_step_is_labelled_by_its_continuations_and_the_last_one_by_its_output() -> None:
    rewards = verdicts(*MIXED)
    assert estimated(rewards, MonteCarloConfig(samples=4)) == [[1.0, 0.0, 1.0], [1.0, 0.0], [0.0]]
    share = MonteCarloConfig(samples=4, estimate="share")
    assert estimated(rewards, share) == [[0.25, 0.0, 1.0], [0.25, 0.0], [0.0]]


def test_everything_but_the_step_labels_stays_as_it_was() -> None:
    made = estimate_step_labels(labels(), prefixes(), verdicts(*MIXED), MonteCarloConfig(samples=4))
    for before, after in zip(labels().rows(), made.rows(), strict=True):
        assert {**after, "step_ends": None, "step_labels": None} == before


def test_continuations_without_a_verdict_do_not_count() -> None:
    share = MonteCarloConfig(samples=4, estimate="share")
    rewards = verdicts("ok", "wrong", "error", "-", "timeout", "wrong", "wrong", "ok")
    assert estimated(rewards, share) == [[0.5, 1 / 3, 1.0], [0.5, 0.0], [0.0]]


def test_an_output_with_a_step_without_verdicts_has_no_step_labels() -> None:
    rewards = verdicts("ok", "wrong", "error", "error")
    config = MonteCarloConfig(samples=2)
    made = estimate_step_labels(labels(), prefixes(), rewards, config)
    assert estimated(rewards, config) == [None, [1.0, 0.0], [0.0]]
    assert made.metrics["rm/unlabelled_outputs"] == pytest.approx(1 / 3)
    assert made.metrics["rm/right_steps_share"] == pytest.approx(1 / 3)


def test_outputs_that_were_not_cut_lose_the_step_labels_of_the_rules() -> None:
    exact = labels({0: [1.0, 1.0, 1.0], 1: [1.0, 0.0], 2: [1.0]})
    found = estimated(verdicts(*MIXED), MonteCarloConfig(samples=4), labels=exact, prefixes=prefixes((0,)))
    assert found == [[1.0, 0.0, 1.0], None, None]


def test_agreement_counts_steps_on_the_same_side_of_one_half() -> None:
    exact = labels({0: [1.0, 1.0, 1.0], 1: [1.0, 0.0], 2: [1.0]})
    config = MonteCarloConfig(samples=2, estimate="share")
    metrics = estimate_step_labels(exact, prefixes(), verdicts("ok", "wrong", "wrong", "wrong"), config).metrics
    # 0.5 0 1 against 1 1 1, 0.5 0 against 1 0, 0 against 1: of the three that were continued two agree.
    assert metrics["rm/step_agreement"] == pytest.approx(4 / 6)
    assert metrics["rm/continued_step_agreement"] == pytest.approx(2 / 3)
    without = estimate_step_labels(labels(), prefixes(), verdicts("ok", "wrong", "wrong", "wrong"), config).metrics
    assert without.keys() == {"rm/right_steps_share", "rm/unlabelled_outputs"}


def test_rewards_that_do_not_fit_are_refused_by_row() -> None:
    config = MonteCarloConfig(samples=4)
    with pytest.raises(ValueError, match=r"\('q', 1\): expected 4 continuations, found 3"):
        estimate_step_labels(labels(), prefixes(), verdicts(*MIXED[:7]), config)
    with pytest.raises(JoinError) as refused:
        estimate_step_labels(labels(), prefixes(), verdicts(*MIXED[:4]), config)
    assert (refused.value.table, refused.value.missing) == ("continuations", ("q", 1))
    with pytest.raises(ValueError, match=r"\('q', 0\) .*cccccccccccc"):
        estimate_step_labels(labels(), prefixes(), verdicts(*MIXED, scorer="c" * 64), config)
    longer = RewardLabels.write([labels().rows()[0] | {"output_ids": list(range(3, 20))}])
    with pytest.raises(ValueError, match=r"\('q', 0\) has 17 tokens, its steps end at \[1, 3, 6\]"):
        estimate_step_labels(longer, prefixes((0,)), verdicts(*MIXED), config)


# ------------------------------------------------------------------------------------- a policy of known chances


@pytest.mark.claim("4.2 step labels")
def test_shares_are_the_chances_of_a_known_policy_to_be_right_from_there() -> None:
    policy, tokenizer = markov_policy(
        {
            ":": {"sure\n": 0.2, "half\n": 0.6, "lost\n": 0.2},
            "sure\n": {"#### 1": 1.0},
            "half\n": {"#### 1": 0.5, "#### 0": 0.5},
            "lost\n": {"#### 0": 1.0},
        }
    )
    lines = ("sure\n", "half\n", "lost\n")
    ids = [ids_of(tokenizer, line, "#### 1", EOS) for line in lines]
    outputs = rollouts([("q", sample, [2], each) for sample, each in enumerate(ids)], tokenizer)
    reward = RewardConfig.parse({"components": [ACCURACY]})
    made = label_outputs(outputs, score(outputs, question_table(), reward), policy)
    cut = cut_into_prefixes(outputs)
    sampling = RolloutConfig(max_output_tokens=4, backend=HFBackendConfig(dtype="float32", threads=1))
    continued = score(continue_outputs(policy, outputs, cut, sampling, samples=100, seed=0), question_table(), reward)
    shares = estimate_step_labels(made, cut, continued, MonteCarloConfig(samples=100, estimate="share")).rows()
    assert [row["step_labels"][0] for row in shares] == [1.0, pytest.approx(0.5, abs=0.2), 0.0]  # 4 deviations of 100
    hard = estimate_step_labels(made, cut, continued, MonteCarloConfig(samples=100)).rows()
    assert [row["step_labels"] for row in hard] == [[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]]


# ------------------------------------------------------------------------------------- the built-in world


class Careful:
    """A policy that goes on from any line and never errs again."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[list[Output]]:
        return [[self._finish(self.tokenizer.decode(prompt.ids))] * len(prompt.seeds) for prompt in prompts]

    def _finish(self, text: str) -> Output:
        question, *lines = [line for line in text.split("\n") if line]
        first, operations = parse_question(question)
        value = int(lines[-1].rpartition("=")[2]) if lines else first
        written = write_solution(Chain(value, operations[len(lines) :]), "careful", "en")
        ids = [*self.tokenizer.encode(written, add_special_tokens=False), self.tokenizer.eos_token_id]
        return Output(np.array(ids, dtype=np.int32), np.zeros(len(ids), dtype=np.float32), "stop")


def rollouts(rows: Sequence[tuple[str, int, Sequence[int], Sequence[int]]], tokenizer: Any) -> Rollouts:
    """Of (question, sample, prompt, output)."""
    decoded = decode_outputs(tokenizer, [ids for *_, ids in rows])
    return Rollouts.write(
        [
            output_row(
                question, sample, text, prompt_ids=list(prompt), output_ids=list(ids), logprobs=None, text_ends=ends
            )
            for (question, sample, prompt, ids), text, ends in zip(rows, *decoded, strict=True)
        ]
    )


def written_by(chains: Sequence[Chain], authors: Sequence[Author]) -> tuple[Questions, Rollouts, Any]:
    """Every author's solution of every chain."""
    asked = [render_question(chain, "en") for chain in chains]
    texts = [[write_solution(chain, author, "en") for author in authors] for chain in chains]
    tokenizer = build_tokenizer([*asked, *(text for group in texts for text in group)], CharacterTokenizerConfig())
    encode = tokenizer.encode
    rows = [
        (question, sample, encode(f"{question}\n"), [*encode(text), tokenizer.eos_token_id])
        for question, group in zip(asked, texts, strict=True)
        for sample, text in enumerate(group)
    ]
    questions = [
        {"question_id": question, "question": question, "answer": str(chain.answer), "solution": None}
        for question, chain in zip(asked, chains, strict=True)
    ]
    return Questions.write(questions), rollouts(rows, tokenizer), tokenizer


def completed_by_care(questions: Questions, outputs: Rollouts, tokenizer: Any) -> tuple[RewardLabels, RewardLabels]:
    """Exact labels, and those that the careful policy's continuations estimate."""
    reward = RewardConfig.parse({"components": [ACCURACY, {"kind": "steps"}]})
    policy, _ = markov_policy({":": {EOS: 1.0}})  # names the origin of labels, and samples nothing here
    exact = label_outputs(outputs, score(outputs, questions, reward), policy)
    cut = cut_into_prefixes(outputs)
    rows = {(row["question_id"], row["sample"]): row for row in outputs.rows()}
    named = {}
    for row in cut.rows():
        if row["prefix"] is not None:
            own = rows[row["question_id"], row["sample"]]
            name = (row["question_id"], row["prefix"])
            named[name] = Prefix(*name, own["prompt_ids"], own["output_ids"][: row["end"] + 1])
    made = complete(Careful(tokenizer), [*named.values()], Sampling(1.0, 99, ()), samples=2, seed=0, window=None)
    continued = rollouts(
        [
            (prefix.question_id, prefix.number * 2 + n, prefix.prompt_ids, [*prefix.ids, *output.ids.tolist()])
            for prefix, group in zip(named.values(), made, strict=True)
            for n, output in enumerate(group)
        ],
        tokenizer,
    )
    estimates = estimate_step_labels(exact, cut, score(continued, questions, reward), MonteCarloConfig(samples=2))
    return exact, estimates


AUTHORS: tuple[Author, ...] = ("careful", "drops_carries_and_borrows", "drops_borrows")


def running_values(text: str) -> list[int]:
    return [int(value) for value in re.findall(r"=(\d+)", text)]


@pytest.mark.claim("4.2 step labels")
def test_where_errors_stay_completion_labels_as_the_exact_checker_does() -> None:
    def errors_stay(chain: Chain) -> bool:
        truth = running_values(write_solution(chain, "careful", "en"))
        for author in AUTHORS:
            same = [a == b for a, b in zip(running_values(write_solution(chain, author, "en")), truth, strict=True)]
            if same != sorted(same, reverse=True):
                return False
        return True

    chains = [c for c in unique_chains(ArithmeticConfig(count=60, shortest=3, longest=5), "train") if errors_stay(c)]
    assert len(chains) > 20
    exact, estimates = completed_by_care(*written_by(chains, AUTHORS))
    assert estimates.rows() == exact.rows()
    assert {label for row in exact.rows() for label in row["step_labels"]} == {0.0, 1.0}
    assert estimates.metrics["rm/step_agreement"] == estimates.metrics["rm/continued_step_agreement"] == 1


def test_errors_that_cancel_are_right_by_completion_and_wrong_by_the_checker() -> None:
    # 7+5=2 drops a carry, 2-3=9 drops a borrow, and 9 is true again.
    chain = Chain(7, (("+", 5), ("-", 3), ("-", 1)))
    exact, estimates = completed_by_care(*written_by([chain], ["drops_carries_and_borrows"]))
    assert exact.rows()[0]["step_labels"] == [0.0, 0.0, 1.0, 1.0]
    assert estimates.rows()[0]["step_labels"] == [0.0, 1.0, 1.0, 1.0]
