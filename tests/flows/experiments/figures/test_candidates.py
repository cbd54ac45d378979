from __future__ import annotations

import pytest

from flows.experiments.figures.candidates import change_interval
from stages.kernels.estimators import bootstrap_interval


@pytest.mark.parametrize("change", [0.0, 0.25, -1.0, 1.0])
def test_an_equal_change_has_the_width_that_unseen_questions_allow(change: float) -> None:
    """Of 8 questions none differs: at most z^2 / (8 + z^2) of all do, z = 1.959964, by 1 + d down or 1 - d up."""
    unseen = 3.841459 / 11.841459
    found = change_interval([change] * 8)
    assert found.estimate == change
    assert found.low == pytest.approx(change - unseen * (1 + change), abs=1e-6)
    assert found.high == pytest.approx(change + unseen * (1 - change), abs=1e-6)
    assert -1.0 <= found.low <= change <= found.high <= 1.0


def test_changes_that_differ_have_the_interval_of_the_bootstrap() -> None:
    changes = [0.0, 0.5, -0.25, 0.0, 1.0]
    assert change_interval(changes) == bootstrap_interval(changes, resamples=1000, seed=0)


@pytest.mark.parametrize(("questions", "settled"), [(188, False), (189, True)])
def test_that_nothing_changed_is_known_from_189_questions_on(questions: int, settled: bool) -> None:
    """z^2 / (Q + z^2) < 0.02 from Q = 188.2 on."""
    assert (change_interval([0.0] * questions).high < 0.02) is settled
