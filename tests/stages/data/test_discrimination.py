"""Shortcuts, which see the surface only, are fitted on one part and scored on another; gauges of any score."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from pipeline.store import Store
from stages.data import Feature, measure_discrimination, shortcut_scores
from stages.join import JoinError
from stages.kernels.estimators import auc, auc_interval, pair_accuracy
from stages.tables import RewardGauges, Rewards, Rollouts, Solutions
from tests.stages.rows import output_row, reward_row

Part = tuple[Solutions, Rollouts, Rewards]


def row(question: int, sample: int, status: str, **changes: Any) -> dict[str, Any]:
    """A solution of 3 tokens and one line by ann, with an answer, unless said otherwise."""
    known = {"question_id": f"q{question}", "sample": sample, "status": status, "author": "ann", "tokens": 3}
    return {**known, "solution": "A: 1", "extracted": "1", **changes}


def part(rows: list[dict[str, Any]]) -> Part:
    solutions, outputs, rules = [], [], []
    for each in rows:
        key, status = (each["question_id"], each["sample"]), each["status"]
        known = {name: each[name] for name in ("question_id", "sample", "solution", "author")}
        solutions.append({**known, "question": "?", "answer": "1", "label": None})
        outputs.append(output_row(*key, tokens=each["tokens"], prompt_ids=[1, 2], logprobs=None))
        reward = None if status == "timeout" else float(status == "ok")
        rules.append(reward_row(*key, reward, status=status, extracted=each["extracted"], components=[]))
    return Solutions.write(solutions), Rollouts.write(outputs), Rewards.write(rules)


def noisy(count: int, seed: int) -> Part:
    """Solutions of 1-9 tokens, right with a chance that falls with their length."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        tokens = rng.randint(1, 9)
        right = rng.random() < 1 / (1 + math.exp(tokens - 5))
        rows.append(row(number // 2, number % 2, "ok" if right else "wrong", tokens=tokens))
    return part(rows)


def scores(found: Rewards) -> list[float]:
    return [each["reward"] for each in found.rows()]


def test_the_penalised_loss_is_flat_at_the_fit(store: Store) -> None:
    """It is convex, so that it has its minimum there."""
    learned = noisy(300, seed=1)
    found = shortcut_scores(learned, learned, ("tokens",))
    length = np.array([len(each["output_ids"]) for each in learned[1].rows()], dtype=float)
    sign = np.array([1.0 if each["status"] == "ok" else -1.0 for each in learned[2].rows()])
    x, z = (length - length.mean()) / length.std(), np.array(scores(found))
    weight = found.metrics["shortcut/tokens"]
    assert weight < 0  # longer is worse, as it was drawn
    assert np.ptp(z - weight * x) == pytest.approx(0, abs=1e-9), "the bias is one for all"
    pull = sign / (1 + np.exp(sign * z))  # of -log sigma(sign z)
    assert (weight - pull @ x, pull.sum()) == pytest.approx((0, 0), abs=1e-6)


def test_the_direction_is_learned_on_one_part_and_can_be_wrong_on_the_other(store: Store) -> None:
    short_is_right = part([row(n, 0, "ok" if n < 5 else "wrong", tokens=2 if n < 5 else 8) for n in range(10)])
    long_is_right = part([row(n, 0, "ok" if n < 5 else "wrong", tokens=8 if n < 5 else 2) for n in range(10)])
    found = scores(shortcut_scores(short_is_right, long_is_right, ("tokens",)))
    assert auc(found, [True] * 5 + [False] * 5) == 0.0


def test_verdicts_of_the_scored_part_change_no_score(store: Store) -> None:
    learned, asked = noisy(200, seed=1), noisy(40, seed=2)
    turned = part(
        [
            row(n // 2, n % 2, "wrong" if verdict["status"] == "ok" else "ok", tokens=len(output["output_ids"]))
            for n, (verdict, output) in enumerate(zip(asked[2].rows(), asked[1].rows(), strict=True))
        ]
    )
    one, other = (shortcut_scores(learned, each, ("tokens", "question_tokens")) for each in (asked, turned))
    assert scores(one) == scores(other)
    assert [each["status"] for each in one.rows()] != [each["status"] for each in other.rows()]


@pytest.mark.parametrize(
    ("feature", "right", "wrong"),
    [
        ("lines", {"solution": "a\n\nb\n"}, {"solution": "a\n\n\n"}),
        ("equations", {"solution": "1+1=2=2"}, {"solution": "1+1=2"}),
        ("answered", {"extracted": "7"}, {"extracted": None}),
        ("whole_answer", {"extracted": "-1,200"}, {"extracted": "1.5"}),
        ("answer_digits", {"extracted": "1,200"}, {"extracted": "99.9"}),
        ("question_tokens", {}, {}),
    ],
)
def test_each_feature_reads_what_it_says(
    store: Store, feature: Feature, right: dict[str, Any], wrong: dict[str, Any]
) -> None:
    both = part([row(n, 0, "ok" if n % 2 else "wrong", **(right if n % 2 else wrong)) for n in range(8)])
    found = scores(shortcut_scores(both, both, (feature,)))
    differ = bool(right)
    assert (found[1] > found[0]) == differ
    assert found[::2] == [found[0]] * 4


def test_authors_have_a_weight_each_and_one_never_seen_has_none(store: Store) -> None:
    learned = part([row(n, 0, "ok" if n < 6 else "wrong", author="bob" if n in (5, 7) else "ann") for n in range(8)])
    asked = part([row(0, n, "ok", author=name) for n, name in enumerate(("ann", "bob", "eve", None))])
    found = shortcut_scores(learned, asked, ("author",))
    assert set(found.metrics) == {"shortcut/author/ann", "shortcut/author/bob"}
    ann, bob, eve, unnamed = scores(found)
    assert ann > bob  # 5 of 6 right against 1 of 2
    assert eve == unnamed
    assert bob < eve < ann


def test_separable_rows_have_a_finite_weight(store: Store) -> None:
    apart = part([row(n, 0, "ok" if n < 4 else "wrong", tokens=1 if n < 4 else 9) for n in range(8)])
    found = scores(shortcut_scores(apart, apart, ("tokens",)))
    assert all(math.isfinite(score) for score in found)
    assert min(found[:4]) > max(found[4:])


def test_rows_without_a_verdict_are_not_learned_from(store: Store) -> None:
    rows = [row(n, 0, "ok" if n < 4 else "wrong", tokens=2 + n % 3) for n in range(8)]
    silent = [row(9, n, "timeout", tokens=50) for n in range(5)]
    one, other = (shortcut_scores(part(each), part(rows), ("tokens",)) for each in (rows, rows + silent))
    assert scores(one) == scores(other)


def test_one_verdict_for_all_rows_is_refused(store: Store) -> None:
    same = part([row(n, 0, "ok") for n in range(3)])
    with pytest.raises(ValueError, match="found 3 right of 3"):
        shortcut_scores(same, same, ("tokens",))


def test_an_output_without_its_solution_is_refused_by_its_row(store: Store) -> None:
    solutions, outputs, rules = noisy(4, seed=1)
    fewer = Solutions.write(solutions.read().slice(1))
    with pytest.raises(JoinError) as refused:
        shortcut_scores((fewer, outputs, rules), (fewer, outputs, rules), ("tokens",))
    assert (refused.value.table, refused.value.missing) == ("solutions", ("q0", 0))


def gauges(found: RewardGauges) -> dict[str, tuple[float | None, float | None, float | None]]:
    return {each["gauge"]: (each["value"], each["low"], each["high"]) for each in found.rows()}


def scored(rules: Rewards, values: list[float]) -> Rewards:
    return Rewards.write([{**each, "reward": value} for each, value in zip(rules.rows(), values, strict=True)])


def two_authors() -> Part:
    """Two questions by ann, who is mostly right, and bob, who is mostly not."""
    plan = [(0, "ann", 1), (0, "ann", 1), (0, "bob", 0), (1, "ann", 0), (1, "bob", 0), (1, "bob", 1)]
    samples = [0, 1, 2, 0, 1, 2]
    return part(
        [
            row(q, sample, "ok" if right else "wrong", author=who)
            for (q, who, right), sample in zip(plan, samples, strict=True)
        ]
    )


def test_a_score_that_knows_the_author_only_is_at_chance_within_authors(store: Store) -> None:
    solutions, _, rules = two_authors()
    by_author = scored(rules, [1.0 if each["author"] == "ann" else 0.0 for each in solutions.rows()])
    found = gauges(measure_discrimination(by_author, rules, solutions, {}, resamples=100, seed=0))
    assert found["auc"][0] == pytest.approx(6 / 9)  # ann 2 right, 1 wrong; bob 1 and 2: (2 x 2 + 2 x 0.5 + 2 x 0.5) / 9
    assert found["auc_within_authors"][0] == 0.5
    assert found["auc_of/ann"][0] == found["auc_of/bob"][0] == 0.5


def test_within_authors_is_the_mean_of_each_author_s_own_auc(store: Store) -> None:
    solutions, _, rules = two_authors()
    found = gauges(
        measure_discrimination(
            scored(rules, [5.0, 1.0, 0.0, 2.0, 4.0, 3.0]), rules, solutions, {}, resamples=100, seed=0
        )
    )
    assert found["auc_of/ann"][0] == 0.5  # 5 above 2, 1 below it
    assert found["auc_of/bob"][0] == 0.5  # 3 above 0, below 4
    assert found["auc"][0] == pytest.approx(6 / 9)  # 5 above 0, 2 and 4; 1 above 0; 3 above 0 and 2
    assert found["pair_accuracy"][0] == pytest.approx(3 / 4)  # 5 and 1 above 0 in one question; 3 above 2 and below 4


def test_intervals_are_those_of_a_bootstrap_over_questions(store: Store) -> None:
    solutions, outputs, rules = noisy(200, seed=3)
    values = [-float(len(each["output_ids"])) for each in outputs.rows()]
    found = gauges(measure_discrimination(scored(rules, values), rules, solutions, {}, resamples=200, seed=4))
    right = [each["status"] == "ok" for each in rules.rows()]
    asked = [each["question_id"] for each in rules.rows()]
    expected = auc_interval(values, right, asked, resamples=200, seed=4)  # draws questions from the same generator
    assert expected is not None
    assert found["auc"] == pytest.approx((expected.estimate, expected.low, expected.high))
    assert found["pair_accuracy"][0] == pytest.approx(pair_accuracy(values, right, asked))
    low, high = found["pair_accuracy"][1:]
    assert low is not None
    assert high is not None
    assert low < pair_accuracy(values, right, asked) < high  # type: ignore[operator]


def test_the_lead_over_a_baseline_is_paired(store: Store) -> None:
    solutions, outputs, rules = noisy(200, seed=3)
    short = scored(rules, [-float(len(each["output_ids"])) for each in outputs.rows()])
    moved = scored(rules, [7 + 3 * score for score in scores(short)])
    nothing = scored(rules, [0.0] * 200)
    baselines = {"same": moved, "nothing": nothing}
    found = gauges(measure_discrimination(short, rules, solutions, baselines, resamples=100, seed=0))
    assert found["auc_gain/same"] == (0.0, 0.0, 0.0)
    auc_itself = found["auc"]
    assert found["auc_gain/nothing"] == pytest.approx([bound - 0.5 for bound in auc_itself if bound is not None])


def test_rows_without_a_verdict_do_not_count_and_what_is_undefined_is_null(store: Store) -> None:
    rows = [row(0, 0, "ok"), row(0, 1, "timeout"), row(1, 0, "ok")]
    solutions, _, rules = part(rows)
    measured = measure_discrimination(scored(rules, [1.0, 2.0, 3.0]), rules, solutions, {}, resamples=100, seed=0)
    assert gauges(measured)["auc"] == (None, None, None)
    assert {each["rows"] for each in measured.rows()} == {2}
    assert measured.metrics == {}


def test_a_score_without_a_baseline_s_score_is_refused_by_its_row(store: Store) -> None:
    solutions, _, rules = two_authors()
    fewer = Rewards.write(rules.read().slice(1))
    with pytest.raises(JoinError) as refused:
        measure_discrimination(rules, rules, solutions, {"length": fewer}, resamples=100, seed=0)
    assert (refused.value.table, refused.value.missing) == ("scores of length", ("q0", 0))
