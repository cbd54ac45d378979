"""GAE: numbers by hand, its two limits by their own formulas, and what masks and padding must not change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stages.kernels.gae import gae


def random_batch(seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Four outputs of 7, 4, 1 and 6 tokens."""
    rng = np.random.default_rng(seed)
    mask = np.arange(7) < np.array([7, 4, 1, 6])[:, None]
    return rng.normal(size=mask.shape) * mask, rng.normal(size=mask.shape) * mask, mask


@pytest.mark.claim("4.1.1 GAE")
def test_three_tokens_with_a_reward_at_the_end_by_hand() -> None:
    # gamma 0.5, lam 0.5; V = 1, 2, 4; r = 0, 0, 8.
    # delta = 0 + 0.5*2 - 1 = 0; 0 + 0.5*4 - 2 = 0; 8 - 4 = 4.  A_2 = 4; A_1 = 0 + 0.25*4 = 1; A_0 = 0 + 0.25*1 = 0.25.
    found = gae([[0, 0, 8]], [[1, 2, 4]], [[1, 1, 1]], gamma=0.5, lam=0.5)
    assert found.advantage_BT.tolist() == [[0.25, 1.0, 4.0]]
    assert found.return_BT.tolist() == [[1.25, 3.0, 8.0]]


def test_with_lambda_1_it_is_the_reward_to_go_minus_the_value() -> None:
    reward, value, mask = random_batch()
    found = gae(reward, value, mask, gamma=1.0, lam=1.0)
    to_go = reward[:, ::-1].cumsum(1)[:, ::-1] * mask
    np.testing.assert_allclose(found.advantage_BT, to_go - value, atol=1e-12)
    np.testing.assert_allclose(found.return_BT, to_go, atol=1e-12)


def test_with_lambda_0_it_is_the_one_step_error() -> None:
    reward, value, mask = random_batch()
    found = gae(reward, value, mask, gamma=0.9, lam=0.0)
    # Values are 0 beyond the end of each output, so that shifting them by one is V_{t+1}.
    following = np.pad(value[:, 1:], ((0, 0), (0, 1)))
    np.testing.assert_allclose(found.advantage_BT, (reward + 0.9 * following - value) * mask, atol=1e-12)


@pytest.mark.claim("4.1.1 GAE")
def test_it_is_the_discounted_sum_of_the_errors_that_follow() -> None:
    reward, value, mask = random_batch()
    found = gae(reward, value, mask, gamma=0.9, lam=0.8)
    delta = gae(reward, value, mask, gamma=0.9, lam=0.0).advantage_BT
    for row, length in enumerate(mask.sum(1)):
        for t in range(length):
            by_definition = sum((0.9 * 0.8) ** (later - t) * delta[row, later] for later in range(t, length))
            assert found.advantage_BT[row, t] == pytest.approx(by_definition, abs=1e-12)


@pytest.mark.claim("GAE that stops at a masked position")
def test_padding_changes_nothing_whatever_is_in_it() -> None:
    reward, value, mask = random_batch()
    found = gae(reward, value, mask, gamma=0.9, lam=0.8)
    wide = [np.pad(array, ((0, 0), (0, 3))) for array in (reward, value, mask)]
    wide[0][~wide[2]], wide[1][~wide[2]] = np.nan, np.inf
    padded = gae(*wide, gamma=0.9, lam=0.8)
    assert np.array_equal(padded.advantage_BT[:, :7], found.advantage_BT)
    assert np.array_equal(padded.return_BT[:, :7], found.return_BT)
    assert not padded.advantage_BT[~wide[2]].any()
    assert not padded.return_BT[~wide[2]].any()


@pytest.mark.claim("GAE that stops at a masked position")
def test_a_masked_stretch_in_the_middle_is_skipped_as_if_it_were_not_there() -> None:
    # By hand, gamma = lam = 0.5, the middle position masked: V_{t+1} of the first token is that of the third, 4.
    # delta_0 = 0 + 0.5*4 - 1 = 1; delta_2 = 8 - 4 = 4; A_0 = 1 + 0.25*4 = 2.
    found = gae([[0, 100, 8]], [[1, 50, 4]], [[1, 0, 1]], gamma=0.5, lam=0.5)
    assert found.advantage_BT.tolist() == [[2.0, 0.0, 4.0]]
    assert found.return_BT.tolist() == [[3.0, 0.0, 8.0]]
    assert gae([[5.0, 5.0]], [[1.0, 1.0]], [[0, 0]], gamma=1.0, lam=1.0).advantage_BT.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("values", "gamma", "lam", "named"),
    [([[0.0]], 1.1, 0.5, "1.1"), ([[0.0]], 0.5, -0.1, "-0.1"), ([[0.0, 0.0]], 1.0, 1.0, r"\(1, 1\), \(1, 2\)")],
)
def test_a_discount_or_a_shape_that_does_not_fit_is_refused(values: Any, gamma: float, lam: float, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        gae([[0.0]], values, [[1]], gamma=gamma, lam=lam)
