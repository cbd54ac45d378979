"""Pass@K and Maj@K of single questions, from the verdicts on all samples of an evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.store import Store, StoreError, use_store
from stages.kernels.voting import maj_at_k, pass_at_k
from stages.tables import Rewards

__all__ = ["Tally", "differences", "tallies"]


@dataclass
class Tally:
    """The samples of a question."""

    samples: int = 0
    correct: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    """How many samples gave each distinct wrong answer."""

    def at(self, kind: str, k: int) -> float:
        """`maj` or `pass` at K, as `stages.evaluation` estimates it."""
        if kind == "pass":
            return pass_at_k(self.samples, self.correct, k)
        return maj_at_k(self.samples, self.correct, list(self.wrong.values()), k)


def tallies(store: Store, digest: str | None) -> dict[str, Tally] | None:
    """By question, from a table of rewards; None where its payload is not in the store."""
    if digest is None:
        return None
    try:
        with use_store(store):
            rows = Rewards(digest).read().select(["question_id", "status", "extracted"]).to_pylist()
    except StoreError:
        return None
    found: dict[str, Tally] = {}
    for row in rows:
        tally = found.setdefault(row["question_id"], Tally())
        tally.samples += 1
        tally.correct += row["status"] == "ok"
        if row["status"] == "wrong":
            tally.wrong[row["extracted"] or ""] += 1
    return found


def differences(before: Mapping[str, Tally], after: Mapping[str, Tally], kind: str, k: int) -> list[float]:
    """After less before of every question.

    Raises:
        ValueError: the two are not of the same questions.
    """
    if before.keys() != after.keys():
        example = min(before.keys() ^ after.keys())
        raise ValueError(f"before and after are not of the same questions, for example {example!r} is in one of them")
    return [after[name].at(kind, k) - before[name].at(kind, k) for name in before]
