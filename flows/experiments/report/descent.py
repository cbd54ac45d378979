"""What the final policies were made from, step by step and arm by arm, with what they have in common marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from flows.experiments.report.answers import chosen_seed
from flows.experiments.results import ExperimentResult
from flows.ledger import Ledger
from flows.places import Places
from pipeline.lineage import Ancestor, ancestry, mermaid
from pipeline.store import StoreError

__all__ = ["Descent", "Mark", "descent"]

_LETTERS: Final = {
    "Questions": "Q",
    "Rollouts": "O",
    "Rewards": "R",
    "Advantages": "A",
    "Checkpoint": "P",
    "Demonstrations": "D",
    "RewardLabels": "L",
    "Logprobs": "K",
    "Values": "V",
}
"""Of the artifacts in the picture; any other is its first two letters."""
_ENDS: Final = 16
"""Steps shown at either end; those between are counted."""
_GRAPH: Final = 400
"""Artifacts of the largest graph that is written out."""


@dataclass(frozen=True)
class Mark:
    """One artifact in the picture."""

    letter: str
    about: str
    shared: Literal["all", "some", "own"]
    """With the final policies of all other arms, of some, or of none."""


@dataclass(frozen=True)
class Descent:
    """The picture: rows from the origins to the last step, a cell of marks for each arm."""

    arms: list[str]
    rows: list[tuple[str, list[list[Mark]]]]
    policies: list[tuple[str, str, int]]
    """Arm, digest of its final policy, and how many artifacts that was made from."""
    graphs: list[tuple[str, str]]
    """Arm and Mermaid text, or the command that prints it."""
    legend: dict[str, str]
    """Letter -> type of artifact."""
    notes: list[str]


def descent(result: ExperimentResult, places: Places) -> Descent:
    """The ancestry of the final policy of every arm that finished with one seed (`chosen_seed`)."""
    store, seed = places.open_store(), chosen_seed(result)
    found: dict[str, dict[str, Ancestor]] = {}
    ledgers: dict[str, Ledger] = {}
    notes = []
    for run in (run for run in result.runs if run.seed == seed):
        ledger = run.ledger(places)
        if run.status != "finished" or ledger is None:
            notes.append(f"{run.arm}: {run.status if run.status != 'finished' else 'no ledger'}; no lineage of it")
            continue
        try:
            found[run.arm] = ancestry(store, run.policy, key=_maker(ledger, run.policy))
            ledgers[run.arm] = ledger
        except StoreError as error:
            notes.append(f"{run.arm}: no lineage of it: {error}")
    counts = Counter(digest for ancestors in found.values() for digest in ancestors)
    kinds = {ancestor.kind for ancestors in found.values() for ancestor in ancestors.values()}
    return Descent(
        arms=list(found),
        rows=_rows(found, ledgers, counts),
        policies=[(arm, next(iter(ancestors)), len(ancestors) - 1) for arm, ancestors in found.items()],
        graphs=[(arm, _graph(ancestors)) for arm, ancestors in found.items()],
        legend={_letter(kind): kind for kind in [*_LETTERS, *sorted(kinds - _LETTERS.keys())] if kind in kinds},
        notes=notes,
    )


def _maker(ledger: Ledger, digest: str) -> str | None:
    """Key of the call that the run got its policy from last."""
    return next((key for key, call in reversed(ledger.calls.items()) if call.digest == digest), None)


def _rows(
    found: Mapping[str, dict[str, Ancestor]], ledgers: Mapping[str, Ledger], counts: Mapping[str, int]
) -> list[tuple[str, list[list[Mark]]]]:
    steps = {arm: _by_step(ledger, found[arm]) for arm, ledger in ledgers.items()}
    last = max((max(part, default=0) for part in steps.values()), default=0)
    rows: list[tuple[str, list[list[Mark]]]] = []
    for step in range(last + 1):
        if _ENDS < step <= last - _ENDS:
            if step == _ENDS + 1:
                rows.append((f"{last - 2 * _ENDS} steps more", [[] for _ in found]))
            continue
        cells = [_marks([found[arm][one] for one in steps[arm].get(step, [])], counts, len(found)) for arm in found]
        rows.append((f"step {step}" if step else "before", cells))
    return rows if found else []


def _by_step(ledger: Ledger, ancestors: dict[str, Ancestor]) -> dict[int, list[str]]:
    """Step -> ancestors that were made in it, in order; under 0 those that no step has, origins first."""
    steps: dict[int, list[str]] = {}
    placed: set[str] = set()
    for step, made in sorted(ledger.steps.items()):
        steps[step] = [digest for digest in made.values() if digest in ancestors and digest not in placed]
        placed |= set(steps[step])
    steps[0] = [digest for digest in reversed(ancestors) if digest not in placed]
    return steps


def _marks(ancestors: Iterable[Ancestor], counts: Mapping[str, int], arms: int) -> list[Mark]:
    marks = []
    for ancestor in ancestors:
        count = counts[ancestor.digest]
        shared: Literal["all", "some", "own"] = "own" if count == 1 else "all" if count == arms else "some"
        marks.append(Mark(_letter(ancestor.kind), ancestor.label, shared))
    return marks


def _letter(kind: str) -> str:
    return _LETTERS.get(kind, kind[:2])


def _graph(ancestors: Mapping[str, Ancestor]) -> str:
    if len(ancestors) > _GRAPH:
        return f"cohort lineage {next(iter(ancestors))[:12]} --mermaid"
    return mermaid(ancestors)
