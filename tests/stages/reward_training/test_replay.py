"""How much of the history is replayed in both readings of the paper, and which rows."""

from __future__ import annotations

from collections import Counter

import pytest

from pipeline.store import Store
from stages.reward_training import ReplayConfig, mix_with_history
from stages.tables import RewardLabels
from tests.stages.rows import label_row


def table(origin: str, questions: int, *, G: int = 4, vocabulary: str = "v") -> RewardLabels:
    rows = [
        label_row(f"{origin}-q{question}", sample, [6, 1], float(sample % 2), origin=origin, vocabulary=vocabulary)
        for question in range(questions)
        for sample in range(G)
    ]
    return RewardLabels.write(rows)


def origins(labels: RewardLabels) -> Counter[str]:
    return Counter(row["origin"] for row in labels.rows())


@pytest.mark.claim("4.1.4 replay")
def test_a_tenth_of_the_training_set_is_history(store: Store) -> None:
    # 90 fresh rows: 10 old ones make a tenth of 100.
    fresh, old = table("new", 45, G=2), table("old", 100)
    mixed = mix_with_history(fresh, [old], ReplayConfig(), seed=0)
    assert origins(mixed) == {"new": 90, "old": 10}
    assert mixed.metrics["rm/replayed_share"] == pytest.approx(0.1)


@pytest.mark.claim("4.1.4 replay")
def test_a_tenth_of_the_old_pool_is_replayed(store: Store) -> None:
    fresh, old = table("new", 45, G=2), [table("first", 50), table("second", 25)]
    mixed = mix_with_history(fresh, old, ReplayConfig(share_of="old_pool"), seed=0)
    found = origins(mixed)
    assert found["new"] == 90
    assert found["first"] + found["second"] == 30
    metrics = mixed.metrics
    assert (metrics["rm/fresh"], metrics["rm/history"], metrics["rm/replayed"]) == (90, 300, 30)
    assert (metrics["rm/replayed_from_0"], metrics["rm/replayed_from_1"]) == (found["first"], found["second"])


@pytest.mark.parametrize(
    ("history", "config"),
    [(0, ReplayConfig()), (0, ReplayConfig(share_of="old_pool")), (9, ReplayConfig(share=0))],
)
def test_without_history_or_with_a_share_of_0_the_fresh_labels_are_all(
    store: Store, history: int, config: ReplayConfig
) -> None:
    old = [table("old", history)] if history else []
    fresh = table("new", 5)
    assert mix_with_history(fresh, old, config, seed=0).digest == fresh.digest


def test_no_more_is_replayed_than_there_is(store: Store) -> None:
    mixed = mix_with_history(table("new", 100), [table("old", 2)], ReplayConfig(share=0.5), seed=0)
    assert origins(mixed) == {"new": 400, "old": 8}
    assert mixed.metrics["rm/replayed_share"] == pytest.approx(8 / 408)


def test_questions_come_with_all_their_outputs_but_for_the_last(store: Store) -> None:
    mixed = mix_with_history(table("new", 99, G=1), [table("old", 60)], ReplayConfig(), seed=3)
    replayed = Counter(row["question_id"] for row in mixed.rows() if row["origin"] == "old")
    assert sorted(replayed.values()) == [3, 4, 4]  # 11 rows


def test_the_sample_is_drawn_by_the_seed_and_from_all_tables(store: Store) -> None:
    fresh, old = table("new", 90), [table("first", 60), table("second", 60)]
    mixed = [mix_with_history(fresh, old, ReplayConfig(), seed=seed) for seed in range(5)]
    assert len({each.digest for each in mixed}) == 5
    assert all(origins(each)["first"] > 0 and origins(each)["second"] > 0 for each in mixed)
    again = mix_with_history(fresh, old, ReplayConfig(share=0.1 + 1e-9), seed=2)  # another call, the same count
    assert again.digest == mixed[2].digest


def test_a_row_is_replayed_once(store: Store) -> None:
    mixed = mix_with_history(table("new", 90), [table("old", 30)], ReplayConfig(share=0.2), seed=0)
    keys = [(row["origin"], row["question_id"], row["sample"]) for row in mixed.rows()]
    assert len(set(keys)) == len(keys) == 450


def test_labels_of_another_vocabulary_are_not_replayed(store: Store) -> None:
    with pytest.raises(ValueError, match="2 vocabularies"):
        mix_with_history(table("new", 9), [table("old", 9, vocabulary="w")], ReplayConfig(), seed=0)
