"""What every arm answered and what its final policy was made from, side by side, of the arms with one seed.

Which questions are shown is a rule, not a choice: it is printed above each table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from flows.completions import groups_made, last_evaluation
from flows.experiments.results import ExperimentResult, RunResult
from flows.ledger import Ledger
from flows.looking.groups import Group, Output
from flows.places import Places
from pipeline.lineage import Ancestor, ancestry, mermaid
from pipeline.store import PrunedArtifactError, Store, StoreError

__all__ = ["Cell", "Comparison", "Descent", "Mark", "Question", "chosen_seed", "descent", "side_by_side"]

_FIRST: Final = 2
"""Held-out questions that are shown whatever was answered."""
_DIFFERENT: Final = 4
"""Held-out questions on which arms were judged differently."""
_GROUPS: Final = 2
"""Groups of the last step."""
_OUTPUTS: Final = 6
"""Different outputs of a group that are shown."""

Key = tuple[str, str]
"""Id and text of a question: arms with other data may have other questions under one id."""


@dataclass(frozen=True)
class Cell:
    """What one arm has for one question."""

    outputs: list[tuple[int, Output]]
    """Different outputs with their counts."""
    more: int
    """Outputs that are not shown."""
    note: str
    """Why there are none."""


@dataclass(frozen=True)
class Question:
    """A question and what every arm has for it, in the order of the arms."""

    question_id: str
    question: str
    answer: str
    cells: list[Cell]


@dataclass(frozen=True)
class Comparison:
    """Questions of one place in training, side by side."""

    title: str
    rule: str
    """What is shown, and why these questions."""
    questions: list[Question]
    notes: dict[str, str]
    """Arm -> why it has nothing to show."""


@dataclass(frozen=True)
class _Side:
    """The groups of one arm, or why there are none."""

    groups: dict[Key, Group]
    note: str = ""


def chosen_seed(result: ExperimentResult) -> int:
    """The first seed with which most arms finished."""
    return max(result.experiment.seeds, key=lambda seed: sum(run.status == "finished" for run in _of(result, seed)))


def side_by_side(result: ExperimentResult, places: Places) -> list[Comparison]:
    """Answers of every arm with one seed (`chosen_seed`) to held-out questions, and groups of the last step."""
    runs = {run.arm: run for run in _of(result, chosen_seed(result))}
    ledgers = {arm: run.ledger(places) for arm, run in runs.items() if run.status == "finished"}
    store = places.open_store()
    return [_held_out(store, runs, ledgers), _learned_from(store, runs, ledgers)]


def _held_out(store: Store, runs: Mapping[str, RunResult], ledgers: Mapping[str, Ledger | None]) -> Comparison:
    sides = {}
    where = ""
    for arm, run in runs.items():
        ledger = ledgers.get(arm)
        evaluation = last_evaluation(ledger) if ledger else None
        sides[arm] = _side(store, run, ledger, evaluation.artifacts if evaluation else {})
        if evaluation:
            where = f"{evaluation.set}, {'greedy' if evaluation.mode == 'greedy' else 'first sample'}"
    shared = _shared(sides)
    different = [key for key in shared if len({_first(side, key).status for side in sides.values() if side.groups}) > 1]
    chosen = list(dict.fromkeys([*shared[:_FIRST], *different[:_DIFFERENT]]))
    rule = (
        f"The first {_FIRST} questions of the set, then the first {_DIFFERENT} on which the verdicts of arms differ "
        f"({len(different)} of {len(shared)} questions)."
    )
    return _comparison(f"Held-out questions after training ({where or 'none'})", rule, chosen, sides, 1)


def _learned_from(store: Store, runs: Mapping[str, RunResult], ledgers: Mapping[str, Ledger | None]) -> Comparison:
    step = min((max(ledger.steps, default=0) for ledger in ledgers.values() if ledger), default=0)
    sides = {}
    for arm, run in runs.items():
        ledger = ledgers.get(arm)
        sides[arm] = _side(store, run, ledger, ledger.steps.get(step, {}) if ledger else {})
    shared = _shared(sides)
    mixed = [key for key in shared if any(_is_mixed(side.groups[key]) for side in sides.values() if side.groups)]
    chosen = list(dict.fromkeys([*mixed, *shared]))[:_GROUPS]
    rule = (
        f"The first {_GROUPS} questions of the step's batch on which outputs of an arm were rewarded differently, or else the "
        "first. An advantage is that of the output's first token; equal outputs stand once, with their count."
    )
    return _comparison(f"What step {step} learned from", rule, chosen, sides, _OUTPUTS)


def _comparison(title: str, rule: str, chosen: Sequence[Key], sides: Mapping[str, _Side], count: int) -> Comparison:
    questions = []
    for key in chosen:
        group = next(side.groups[key] for side in sides.values() if side.groups)
        cells = [_cell(side, key, count) for side in sides.values()]
        questions.append(Question(group.question_id, group.question, group.answer, cells))
    notes = {arm: side.note for arm, side in sides.items() if side.note}
    if not chosen and not notes:
        notes = {"all arms": "no question that every arm was asked"}
    return Comparison(title, rule, questions, notes)


def _cell(side: _Side, key: Key, count: int) -> Cell:
    if not side.groups:
        return Cell([], 0, side.note)
    group = side.groups[key]
    merged = group.merged() if count > 1 else [(1, group.outputs[0])]
    shown = merged[:count]
    return Cell(shown, 0 if count == 1 else len(group.outputs) - sum(number for number, _ in shown), "")


def _side(store: Store, run: RunResult, ledger: Ledger | None, artifacts: Mapping[str, str]) -> _Side:
    if run.status != "finished":
        return _Side({}, f"{run.status}{f': {run.error}' if run.error else ''}")
    if ledger is None:
        return _Side({}, "no ledger: made by an earlier version")
    try:
        groups = groups_made(store, ledger, artifacts)
    except PrunedArtifactError:
        return _Side({}, "pruned: the outputs were freed; `cohort prune` keeps how they were made, not what they are")
    except StoreError as error:
        return _Side({}, f"not readable: {error}")
    if not groups:
        return _Side({}, "nothing of this kind in this run")
    return _Side({(group.question_id, group.question): group for group in groups})


def _shared(sides: Mapping[str, _Side]) -> list[Key]:
    """Questions that all arms with any were asked, in the order of the first."""
    filled = [side.groups for side in sides.values() if side.groups]
    return [key for key in filled[0] if all(key in groups for groups in filled)] if filled else []


def _first(side: _Side, key: Key) -> Output:
    return side.groups[key].outputs[0]


def _is_mixed(group: Group) -> bool:
    return len({output.reward for output in group.outputs}) > 1


def _of(result: ExperimentResult, seed: int) -> list[RunResult]:
    return [run for run in result.runs if run.seed == seed]


# ------------------------------------------------------------------------------------------------ lineage

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
