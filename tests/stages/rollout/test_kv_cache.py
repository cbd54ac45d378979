"""Which samples share a row."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stages.rollout.kv_cache import regroup


def _apply(rows: list[str], sample_row: list[int], token: list[int]) -> tuple[list[str], list[int]]:
    """Prefixes held by the new rows, carried out as the cache would: copy, then append each row's token."""
    groups = regroup(np.array(sample_row), np.array(token))
    held = rows + [""] * len(sample_row)
    copied = [held[source] for source in groups.source]
    for target, prefix in zip(groups.target, copied, strict=True):
        held[target] = prefix
    return [held[i] + str(t) for i, t in enumerate(groups.row_token)], groups.sample_row.tolist()


def test_samples_that_agree_keep_one_row_and_need_no_copy() -> None:
    groups = regroup(np.array([0, 0, 0]), np.array([4, 4, 4]))
    assert groups.sample_row.tolist() == [0, 0, 0]
    assert groups.row_token.tolist() == [4]
    assert groups.source.tolist() == groups.target.tolist() == []


def test_a_row_whose_samples_differ_forks_into_a_free_row() -> None:
    rows, sample_row = _apply(["a", "b"], [0, 0, 1], [7, 5, 6])
    assert [rows[row] for row in sample_row] == ["a7", "a5", "b6"]
    assert len(rows) == 3


def test_a_hole_left_by_ended_samples_is_filled_by_the_last_row() -> None:
    groups = regroup(np.array([0, 2, 3]), np.array([1, 1, 1]))
    assert groups.target.tolist() == [1]
    assert groups.source.tolist() == [3]


@given(st.data())
def test_every_sample_always_finds_its_own_prefix(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    questions = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count).map(sorted))
    names = sorted(set(questions))
    rows = [f"q{name}:" for name in names]
    sample_row = [names.index(question) for question in questions]
    own = [rows[row] for row in sample_row]
    for _ in range(5):
        token = data.draw(st.lists(st.integers(0, 2), min_size=len(own), max_size=len(own)))
        kept = [i for i in range(len(own)) if token[i] != 2]  # token 2 ends a sample
        if not kept:
            return
        own = [own[i] + str(token[i]) for i in kept]
        rows, sample_row = _apply(rows, [sample_row[i] for i in kept], [token[i] for i in kept])
        assert [rows[row] for row in sample_row] == own
        assert len(rows) == len(set(own)), "a row holds a prefix of no sample, or two rows the same prefix"
