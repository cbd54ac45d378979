"""What every arm answered and what its final policy was made from, side by side, of the arms with one seed.

Which questions are shown is a rule, not a choice: it is printed above each table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Literal, NamedTuple

from flows.experiments.results import ExperimentResult, RunResult
from flows.inspection.groups import Group, Output, groups_made, last_evaluation
from flows.runs.ledger import Ledger
from flows.runs.paths import Places
from pipeline.lineage import Ancestor, ancestry, mermaid
from pipeline.store import PrunedArtifactError, Store, StoreError

_FIRST: Final = 2
"""Held-out questions that are shown whatever was answered."""
_DIFFERENT: Final = 4
"""Held-out questions on which arms got different verdicts."""
_GROUPS: Final = 2
"""Groups of the last step."""
_OUTPUTS: Final = 6
"""Different outputs of a group that are shown."""

Key = tuple[str, str]
"""Id and text of a question: arms with other data may have other questions under one id."""
Ledgers = Mapping[str, Ledger | None]
"""Arm -> ledger of its run; None: it did not finish, or has none."""


class Cell(NamedTuple):
    """What one arm has for one question."""

    outputs: list[tuple[int, Output]]
    """Different outputs with their counts."""
    more: int
    """Outputs that are not shown."""
    note: str
    """Why there are none."""


class Question(NamedTuple):
    """A question and what every arm has for it, in the order of the arms."""

    question_id: str
    question: str
    answer: str
    cells: list[Cell]


class Comparison(NamedTuple):
    """Questions of one place in training, side by side."""

    title: str
    rule: str
    """What is shown, and why these questions."""
    questions: list[Question]
    notes: dict[str, str]
    """Arm -> why it has nothing to show."""


class _Side(NamedTuple):
    """The groups of one arm, or why there are none."""

    groups: dict[Key, Group]
    note: str = ""


def chosen_seed(result: ExperimentResult) -> int:
    """Return the first seed with which most arms finished."""
    finished = Counter(run.seed for run in result.runs if run.status == "finished")
    return max(result.experiment.seeds, key=lambda seed: finished[seed])


def _chosen(result: ExperimentResult, places: Places) -> tuple[list[RunResult], Ledgers]:
    """Return the runs with the chosen seed, and the ledgers of those that finished."""
    seed = chosen_seed(result)
    runs = [run for run in result.runs if run.seed == seed]
    return runs, {run.arm: run.ledger(places) if run.status == "finished" else None for run in runs}


# ------------------------------------------------------------------------------------------------ answers


def side_by_side(result: ExperimentResult, places: Places) -> list[Comparison]:
    """Compare answers of every arm to held-out questions, and groups of the last step."""
    (runs, ledgers), store = _chosen(result, places), places.open_store()
    return [_held_out(store, runs, ledgers), _learned_from(store, runs, ledgers)]


def _held_out(store: Store, runs: Sequence[RunResult], ledgers: Ledgers) -> Comparison:
    evaluations = {arm: last_evaluation(ledger) if ledger else None for arm, ledger in ledgers.items()}
    artifacts = {arm: evaluation.artifacts for arm, evaluation in evaluations.items() if evaluation}
    sides = {run.arm: _side(store, run, ledgers[run.arm], artifacts.get(run.arm, {})) for run in runs}
    where = "none"
    for last in filter(None, evaluations.values()):
        where = f"{last.set}, {'greedy' if last.mode == 'greedy' else 'first sample'}"
    shared, filled = _shared(sides)
    different = [key for key in shared if len({groups[key].outputs[0].status for groups in filled}) > 1]
    chosen = list(dict.fromkeys([*shared[:_FIRST], *different[:_DIFFERENT]]))
    rule = (
        f"The first {_FIRST} questions of the set, then the first {_DIFFERENT} on which the verdicts of arms differ "
        f"({len(different)} of {len(shared)} questions)."
    )
    return _comparison(f"Held-out questions after training ({where})", rule, chosen, sides, 1)


def _learned_from(store: Store, runs: Sequence[RunResult], ledgers: Ledgers) -> Comparison:
    step = min((max(ledger.steps, default=0) for ledger in ledgers.values() if ledger), default=0)
    steps = {arm: ledger.steps.get(step, {}) for arm, ledger in ledgers.items() if ledger}
    sides = {run.arm: _side(store, run, ledgers[run.arm], steps.get(run.arm, {})) for run in runs}
    shared, filled = _shared(sides)
    mixed = [key for key in shared if any(len({o.reward for o in groups[key].outputs}) > 1 for groups in filled)]
    chosen = list(dict.fromkeys([*mixed, *shared]))[:_GROUPS]
    rule = (
        f"The first {_GROUPS} questions of the step's batch on which outputs of an arm were rewarded differently, or else the "
        "first. An advantage is that of the output's first token; equal outputs stand once, with their count."
    )
    return _comparison(f"What step {step} learned from", rule, chosen, sides, _OUTPUTS)


def _side(store: Store, run: RunResult, ledger: Ledger | None, artifacts: Mapping[str, str]) -> _Side:
    if run.status != "finished":
        return _Side({}, f"{run.status}{f': {run.error}' if run.error else ''}")
    if ledger is None:
        return _Side({}, "no log: its folder has no readable events.jsonl")
    try:
        groups = groups_made(store, ledger, artifacts)
    except PrunedArtifactError:
        return _Side({}, "pruned: the outputs were freed; `cohort prune` keeps how they were made, not what they are")
    except StoreError as error:
        return _Side({}, f"not readable: {error}")
    if not groups:
        return _Side({}, "nothing of this kind in this run")
    return _Side({(group.question_id, group.question): group for group in groups})


def _shared(sides: Mapping[str, _Side]) -> tuple[list[Key], list[dict[Key, Group]]]:
    """Return the questions that all arms with any were asked, in the order of the first, and the groups of these arms."""
    filled = [side.groups for side in sides.values() if side.groups]
    return [key for key in filled[0] if all(key in groups for groups in filled)] if filled else [], filled


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
    if count == 1:
        return Cell([(1, group.outputs[0])], 0, "")
    shown = group.merged()[:count]
    return Cell(shown, len(group.outputs) - sum(number for number, _ in shown), "")


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
    "ToolCalls": "T",
}
"""Of the artifacts in the picture; any other is its first two letters."""
_ENDS: Final = 16
"""Steps shown at either end; those between are counted."""
_GRAPH: Final = 400
"""Artifacts of the largest graph that is written out."""


class Mark(NamedTuple):
    """One artifact in the picture."""

    letter: str
    about: str
    shared: Literal["all", "some", "own"]
    """With the final policies of all other arms, of some, or of none."""


class Descent(NamedTuple):
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
    """Trace what the final policy of every arm that finished was made from, and mark what they have in common."""
    (runs, ledgers), store = _chosen(result, places), places.open_store()
    found: dict[str, dict[str, Ancestor]] = {}
    steps: dict[str, dict[int, list[str]]] = {}
    notes = []
    for run in runs:
        if (ledger := ledgers[run.arm]) is None:
            notes.append(f"{run.arm}: {run.status if run.status != 'finished' else 'no ledger'}; no lineage of it")
            continue
        # The call that the run got its policy from last.
        maker = next((key for key, call in reversed(ledger.calls.items()) if call.digest == run.policy), None)
        try:
            found[run.arm] = ancestry(store, run.policy, key=maker, calls=ledger.calls.keys())
            steps[run.arm] = _by_step(ledger, found[run.arm])
        except StoreError as error:
            notes.append(f"{run.arm}: no lineage of it: {error}")
    kinds = {ancestor.kind for ancestors in found.values() for ancestor in ancestors.values()}
    return Descent(
        arms=list(found),
        rows=list(_rows(found, steps)),
        policies=[(arm, next(iter(ancestors)), len(ancestors) - 1) for arm, ancestors in found.items()],
        graphs=[(arm, _graph(ancestors)) for arm, ancestors in found.items()],
        legend={_letter(kind): kind for kind in [*_LETTERS, *sorted(kinds - _LETTERS.keys())] if kind in kinds},
        notes=notes,
    )


def _by_step(ledger: Ledger, ancestors: Mapping[str, Ancestor]) -> dict[int, list[str]]:
    """Return step -> ancestors that were made in it, in order; under 0 those that no step has, origins first."""
    steps: dict[int, list[str]] = {}
    placed: set[str] = set()
    for step, made in sorted(ledger.steps.items()):
        steps[step] = [digest for digest in made.values() if digest in ancestors and digest not in placed]
        placed |= set(steps[step])
    steps[0] = [digest for digest in reversed(list(ancestors)) if digest not in placed]
    return steps


def _rows(
    found: Mapping[str, Mapping[str, Ancestor]], steps: Mapping[str, Mapping[int, list[str]]]
) -> Iterator[tuple[str, list[list[Mark]]]]:
    counts = Counter(digest for ancestors in found.values() for digest in ancestors)
    last = max((max(part, default=0) for part in steps.values()), default=0)
    for step in range(last + 1 if found else 0):
        if _ENDS < step <= last - _ENDS:
            if step == _ENDS + 1:
                yield f"{last - 2 * _ENDS} steps more", [[] for _ in found]
            continue
        cells = []
        for arm, ancestors in found.items():
            made = [ancestors[digest] for digest in steps[arm].get(step, [])]
            cells.append([Mark(_letter(one.kind), one.label, _sharing(counts[one.digest], len(found))) for one in made])
        yield f"step {step}" if step else "before", cells


def _sharing(count: int, arms: int) -> Literal["all", "some", "own"]:
    return "own" if count == 1 else "all" if count == arms else "some"


def _letter(kind: str) -> str:
    return _LETTERS.get(kind, kind[:2])


def _graph(ancestors: Mapping[str, Ancestor]) -> str:
    if len(ancestors) > _GRAPH:
        return f"cohort lineage {next(iter(ancestors))[:12]} --mermaid"
    return mermaid(ancestors)
