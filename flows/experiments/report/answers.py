"""The same questions answered by every arm, side by side: after training, and what the last step learned from.

Which questions are shown is a rule, not a choice: it stands above each table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from flows.completions import groups_made, last_evaluation
from flows.experiments.results import ExperimentResult, RunResult
from flows.ledger import Ledger
from flows.looking.groups import Group, Output
from flows.places import Places
from pipeline.store import PrunedArtifactError, Store, StoreError

__all__ = ["Cell", "Comparison", "Question", "chosen_seed", "side_by_side"]

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
