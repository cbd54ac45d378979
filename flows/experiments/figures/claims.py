"""What may be said under a figure: each claim is a check on estimates that returns the sentence which holds.

Two estimates are separated where the 95 % interval of their difference excludes 0: over seeds (Welch) from three on; with
fewer where their intervals over questions do not overlap, which is stricter. What is not separated here is not thereby equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import variance
from typing import Final, Literal

from flows.experiments.figures.numbers import Bounds, Estimate
from stages.kernels.estimators import Interval

MARGIN: Final = 0.02
"""A change whose interval ends below it is none that matters. Ours."""

Verdict = Literal["supported", "reversed", "not separated", "no bounds"]
Change = Literal["raised", "not raised", "lowered", "not settled"]


def difference(value: Estimate, other: Estimate) -> Interval | None:
    """Return the first less the second, with a 95 % interval; None where one of them has no bounds.

    Over seeds, both with n >= 3: d -+ t sqrt(s1^2 / n1 + s2^2 / n2), t with Welch's degrees of freedom, rounded down. Else from
    the lower bound of one less the upper of the other to the reverse.
    """
    if "none" in (value.over, other.over):
        return None
    estimate = value.mean - other.mean
    if {value.over, other.over} != {"seeds"}:
        return Interval(estimate, value.low - other.high, value.high - other.low)
    parts = [(variance(one.values) / len(one.values), len(one.values) - 1) for one in (value, other)]
    total = sum(part for part, _ in parts)
    if total == 0.0:
        return Interval(estimate, estimate, estimate)
    from scipy.special import stdtrit  # quantiles of Student's t

    freedom = int(total**2 / sum(part**2 / free for part, free in parts))
    reach = float(stdtrit(freedom, 0.975)) * math.sqrt(total)
    return Interval(estimate, estimate - reach, estimate + reach)


def compare(upper: Estimate, lower: Estimate) -> Verdict:
    """Return whether the first is above the second: the interval of the difference lies above 0."""
    found = difference(upper, lower)
    if found is None:
        return "no bounds"
    if found.low > 0:
        return "supported"
    return "reversed" if found.high < 0 else "not separated"


def is_above(name: str, value: Estimate, other: str, than: Estimate) -> str:
    """Claim that one arm is above another, or say what was found in its place."""
    found = difference(value, than)
    numbers = f"({_signed(found)})" if found else f"({value.mean - than.mean:+.3f})"
    match compare(value, than):
        case "supported":
            return f"{name} is above {other} {numbers}"
        case "reversed":
            return f"{name} is below {other} {numbers}"
        case "not separated":
            return f"{name} and {other} are not separated {numbers}"
        case "no bounds":
            return f"{name} against {other} has no interval and nothing is concluded {numbers}"


def compared_with(values: Mapping[str, Estimate], other: str, than: Estimate) -> str:
    """Say which of several arms are above one thing, which below, which not separated from it."""
    phrases: dict[Verdict, str] = {
        "supported": f"above {other}",
        "reversed": f"below {other}",
        "not separated": f"not separated from {other}",
        "no bounds": f"without an interval to compare with {other}",
    }
    found = {name: compare(value, than) for name, value in values.items()}
    parts = []
    for verdict, phrase in phrases.items():
        if names := [name for name in found if found[name] == verdict]:
            parts.append(f"{listed(names)} {'is' if len(names) == 1 else 'are'} {phrase}")
    return "; ".join(parts)


def in_order(values: Mapping[str, Estimate]) -> Iterator[str]:
    """Compare each arm with the one before it."""
    for other, name in pairwise(values):
        yield is_above(name, values[name], other, values[other])


# ------------------------------------------------------------------------------------------------ before against after


def change(intervals: Sequence[Interval]) -> Change:
    """Return what became of a quantity, from the interval of its change with each seed; all seeds must agree.

    raised: every interval lies above 0. lowered: every one below. not raised: every one ends below `MARGIN`.
    """
    if not intervals:
        return "not settled"
    if all(one.low > 0 for one in intervals):
        return "raised"
    if all(one.high < 0 for one in intervals):
        return "lowered"
    return "not raised" if all(one.high < MARGIN for one in intervals) else "not settled"


def raises_majority_not_pass(
    name: str, k: int, majority: Sequence[Interval], passed: Sequence[Interval], passed_before: Estimate
) -> str:
    """Claim with the paper's Fig. 7 that RL raises Maj@K and not Pass@K, at one K; or say what was found in its place.

    Args:
        majority, passed: the changes from before to after with each seed.
        passed_before: Pass@K before. Within `MARGIN` of 1 it cannot be raised, and that it is not says nothing.
    """
    if not majority or not passed:
        return f"{name}: the samples are not in the store, so the changes have no intervals and nothing is concluded."
    no_room = max(passed_before.values) > 1 - MARGIN
    match change(majority), change(passed):
        case one, "not raised" | "not settled" if no_room:
            text = f"{name}: {_said(f'Maj@{k}', one)}; Pass@{k} was {passed_before.mean:.3f} before, with no room above"
        case "raised", "not raised":
            text = f"{name} raises Maj@{k}, not Pass@{k}"
        case "raised", "lowered":
            text = f"{name} raises Maj@{k} and lowers Pass@{k}"
        case "raised", "raised":
            text = f"{name} raises Maj@{k}, and Pass@{k} as well"
        case "raised", _:
            text = f"{name} raises Maj@{k}; {_said(f'Pass@{k}', 'not settled')}"
        case one, other:
            text = f"{name}: {_said(f'Maj@{k}', one)}, {_said(f'Pass@{k}', other)}"
    of_maj, of_pass = (", ".join(map(_signed, intervals)) for intervals in (majority, passed))
    return f"{text} (change of Maj@{k} {of_maj}, of Pass@{k} {of_pass})."


def _said(what: str, became: Change) -> str:
    return f"whether {what} is raised is not settled" if became == "not settled" else f"{what} is {became}"


# ------------------------------------------------------------------------------------------------ words


def bounds_are(estimates: Sequence[Estimate]) -> str:
    """Say what the bounds in a figure are."""
    kinds: dict[Bounds, str] = {
        "seeds": "lowest to highest seed",
        "questions": "95 % intervals over questions (bootstrap)",
        "none": "none: too few seeds, and no interval was recorded",
    }
    return _kinds(kinds, estimates)


def intervals_are(estimates: Sequence[Estimate]) -> str:
    """Say what the intervals of differences between such estimates are; empty where there are none."""
    return _kinds({"seeds": "95 % over seeds (Welch)", "questions": "the bounds of both taken together"}, estimates)


def _kinds(kinds: Mapping[Bounds, str], estimates: Sequence[Estimate]) -> str:
    found = {one.over for one in estimates}
    return "; where seeds are fewer, ".join(text for kind, text in kinds.items() if kind in found)


def brackets(estimates: Sequence[Estimate]) -> str:
    """Say how to read the numbers of `is_above`; empty where they have no intervals."""
    intervals = intervals_are(estimates)
    return f"In brackets: difference [interval: {intervals}]." if intervals else ""


def words(name: str) -> str:
    """Write `in_domain` as words."""
    return name.replace("_", " ")


def listed(names: Sequence[str]) -> str:
    """Write `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _signed(interval: Interval) -> str:
    return f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
