"""Pass@K and Maj@K of single questions, from the votes of all samples of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.store import Store, StoreError, use_store
from stages.kernels.voting import maj_at_k, pass_at_k
from stages.tables import Votes

__all__ = ["Tally", "differences", "tallies"]


@dataclass(frozen=True)
class Tally:
    """The samples of a question, as `count_votes` counted them."""

    samples: int
    correct: int
    wrong: tuple[int, ...] | None
    """How many samples gave each distinct wrong answer; None where that is not known."""

    def at(self, kind: str, k: int) -> float | None:
        """`maj` or `pass` at K, as `stages.evaluation` estimates it; None where Maj@K is undefined."""
        if kind == "pass":
            return pass_at_k(self.samples, self.correct, k)
        return None if self.wrong is None else maj_at_k(self.samples, self.correct, self.wrong, k)


def tallies(store: Store, digest: str | None) -> dict[str, Tally] | None:
    """By question, from a table of votes; None where its payload is not in the store."""
    if digest is None:
        return None
    try:
        with use_store(store):
            rows = Votes(digest).rows()
    except StoreError:
        return None
    return {
        row["question_id"]: Tally(row["samples"], row["correct"], None if row["wrong"] is None else tuple(row["wrong"]))
        for row in rows
    }


def differences(before: Mapping[str, Tally], after: Mapping[str, Tally], kind: str, k: int) -> list[float] | None:
    """After less before of every question; None where one of them is undefined.

    Raises:
        ValueError: the two are not of the same questions.
    """
    if before.keys() != after.keys():
        example = min(before.keys() ^ after.keys())
        raise ValueError(f"before and after are not of the same questions, for example {example!r} is in one of them")
    pairs = [(before[name].at(kind, k), after[name].at(kind, k)) for name in before]
    found = [new - old for old, new in pairs if old is not None and new is not None]
    return found if len(found) == len(pairs) else None
