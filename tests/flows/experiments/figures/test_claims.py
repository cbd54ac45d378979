"""What captions may say: claims that hold, that are reversed, that the numbers do not settle."""

from __future__ import annotations

import pytest

from flows.experiments.figures.claims import (
    bounds_are,
    change,
    compare,
    compared_with,
    difference,
    in_order,
    is_above,
    listed,
    raises_majority_not_pass,
)
from flows.experiments.figures.numbers import Estimate, estimate
from stages.kernels.estimators import Interval

LOW, HIGH = estimate([0.50, 0.51, 0.52]), estimate([0.80, 0.81, 0.82])
UP, DOWN, NIL, WIDE = (
    Interval(0.2, 0.1, 0.3),
    Interval(-0.2, -0.3, -0.1),
    Interval(0.0, -0.01, 0.01),
    Interval(0, -1, 1),
)


def test_an_arm_is_above_another_only_where_the_interval_excludes_0() -> None:
    assert compare(HIGH, LOW) == "supported"
    assert compare(LOW, HIGH) == "reversed"
    assert compare(LOW, LOW) == "not separated"


def test_the_difference_of_two_arms_with_three_seeds_is_welchs() -> None:
    # Variances 1e-4 each: standard error sqrt(2e-4 / 3) = 0.0081650; 4 degrees of freedom: t = 2.7764451.
    found = difference(HIGH, LOW)
    assert found is not None
    assert found.estimate == pytest.approx(0.30)
    assert (found.low, found.high) == pytest.approx(
        (0.30 - 2.7764451 * (2e-4 / 3) ** 0.5, 0.30 + 2.7764451 * (2e-4 / 3) ** 0.5), abs=1e-9
    )


def test_unequal_variances_lower_the_degrees_of_freedom() -> None:
    # All variance is in one arm, 4e-4 / 3 of 3 seeds: 2 degrees of freedom, t = 0.95 sqrt(2 / (1 - 0.95^2)).
    found = difference(estimate([0.80, 0.82, 0.84]), estimate([0.5, 0.5, 0.5]))
    assert found is not None
    assert found.high - found.estimate == pytest.approx(0.95 * (2 / 0.0975) ** 0.5 * (4e-4 / 3) ** 0.5, rel=1e-12)


def test_seeds_that_do_not_overlap_are_not_enough_where_they_nearly_touch() -> None:
    # Measured: lowest of one 0.8091, highest of the other 0.8086.
    process, outcome = estimate([0.8574, 0.8325, 0.8091]), estimate([0.7856, 0.8076, 0.8086])
    assert process.low > outcome.high
    assert compare(process, outcome) == "not separated"


def test_with_one_seed_the_intervals_over_questions_decide() -> None:
    one, near, far = (estimate([value], [(value - 0.05, value + 0.05)]) for value in (0.5, 0.59, 0.61))
    assert compare(near, one) == "not separated"
    assert compare(far, one) == "supported"


def test_nothing_is_concluded_from_two_seeds_without_intervals() -> None:
    few = estimate([0.9, 0.9])
    assert compare(few, LOW) == "no bounds"
    assert is_above("a", few, "b", LOW) == "a against b has no interval and nothing is concluded (+0.390)"


def test_two_seeds_have_bounds_of_intervals_and_three_those_of_seeds() -> None:
    assert estimate([0.4, 0.6], [(0.3, 0.5), (0.5, 0.7)]) == Estimate((0.4, 0.6), 0.3, 0.7, "questions")
    assert estimate([0.4, 0.5, 0.6], [(0.0, 1.0)] * 3) == Estimate((0.4, 0.5, 0.6), 0.4, 0.6, "seeds")
    assert estimate([0.4, 0.6], [(0.3, 0.5)]).over == "none"


def test_a_claim_names_the_direction_and_the_interval() -> None:
    assert is_above("b", HIGH, "a", LOW) == "b is above a (+0.300 [+0.277, +0.323])"
    assert is_above("a", LOW, "b", HIGH) == "a is below b (-0.300 [-0.323, -0.277])"
    assert is_above("a", LOW, "b", LOW) == "a and b are not separated (+0.000 [-0.023, +0.023])"


def test_arms_are_grouped_by_what_became_of_them() -> None:
    values = {"a": HIGH, "b": LOW, "c": HIGH, "d": estimate([0.1, 0.11, 0.12])}
    said = compared_with(values, "the rest", LOW)
    assert said == "a and c are above the rest; d is below the rest; b is not separated from the rest"


def test_each_arm_is_compared_with_the_one_before_it() -> None:
    said = list(in_order({"a": LOW, "b": HIGH, "c": HIGH}))
    assert [sentence.split(" (")[0] for sentence in said] == ["b is above a", "c and b are not separated"]


@pytest.mark.parametrize(
    ("intervals", "found"),
    [
        ([UP, UP], "raised"),
        ([DOWN], "lowered"),
        ([NIL, DOWN], "not raised"),
        ([UP, NIL], "not settled"),
        ([WIDE], "not settled"),
        ([], "not settled"),
    ],
)
def test_a_change_is_one_only_if_all_seeds_agree(intervals: list[Interval], found: str) -> None:
    assert change(intervals) == found


ROOM = estimate([0.9])


@pytest.mark.parametrize(
    ("majority", "passed", "said"),
    [
        ([UP], [NIL], "grpo raises Maj@64, not Pass@64 ("),
        ([UP], [UP], "grpo raises Maj@64, and Pass@64 as well ("),
        ([UP], [DOWN], "grpo raises Maj@64 and lowers Pass@64 ("),
        ([UP], [WIDE], "grpo raises Maj@64; whether Pass@64 is raised is not settled ("),
        ([DOWN], [NIL], "grpo: Maj@64 is lowered, Pass@64 is not raised ("),
        ([NIL], [UP], "grpo: Maj@64 is not raised, Pass@64 is raised ("),
        ([WIDE], [WIDE], "grpo: whether Maj@64 is raised is not settled, whether Pass@64 is raised is not settled ("),
        ([], [NIL], "grpo: the samples are not in the store"),
    ],
)
def test_maj_raised_and_pass_not_is_claimed_only_where_both_intervals_are_so(
    majority: list[Interval], passed: list[Interval], said: str
) -> None:
    assert raises_majority_not_pass("grpo", 64, majority, passed, ROOM).startswith(said)


def test_pass_not_raised_is_no_finding_where_it_was_nearly_1_before() -> None:
    said = raises_majority_not_pass("grpo", 64, [UP], [NIL], estimate([0.99]))
    assert said.startswith("grpo: Maj@64 is raised; Pass@64 was 0.990 before, with no room above (")


def test_the_claim_shows_the_intervals_that_support_it() -> None:
    said = raises_majority_not_pass("grpo", 4, [UP], [NIL], ROOM)
    assert said.endswith("(change of Maj@4 +0.200 [+0.100, +0.300], of Pass@4 +0.000 [-0.010, +0.010]).")


def test_bounds_are_named_by_what_they_were_made_over() -> None:
    assert bounds_are([LOW, HIGH]) == "lowest to highest seed"
    assert bounds_are([LOW, ROOM]) == (
        "lowest to highest seed; where seeds are fewer, none: too few seeds, and no interval was recorded"
    )


def test_names_are_listed_as_in_a_sentence() -> None:
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
