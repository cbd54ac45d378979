"""`cohort runs`, `show`, `explain`, `lineage`: what there is, and where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.markup import escape
from rich.table import Table

from flows.commands.options import Limit, Root, console
from flows.inspection.artifact_view import show_artifact
from flows.inspection.history import find_run, history_of, ways_back
from flows.runs.ledger import read_ledger
from flows.runs.paths import Places
from flows.runs.record import RunRecord, read_records, unreadable_records
from flows.wording import duration, moment, percent, quoted, visible
from pipeline import lineage as ancestry
from pipeline.config import ConfigError
from pipeline.store import MissingArtifactError, Store, use_store


def runs(*, root: Root = None) -> None:
    """List what ran, the latest last."""
    places, out = Places.under(root), console()
    records = list(read_records(places))
    for path, reason in unreadable_records(places).items():
        text = f"{quoted(path)} cannot be read ({quoted(reason)}); `cohort verify` says more"
        out.print(f"[yellow]{text}[/]", soft_wrap=True)
    if not records:
        out.print(f"nothing ran yet in {escape(str(places.root))}; `cohort recipes` says what can")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("run", "started", "status", "steps", "took"):
        table.add_column(heading, no_wrap=True)
    table.add_column("accuracy on held-out sets", overflow="fold")
    for record in records:
        _add_run(table, record)
    out.print(table)
    out.print(f"\nin {escape(str(places.runs))}", style="dim", soft_wrap=True)


def show(
    what: str,
    *,
    step: int | None = None,
    limit: Annotated[int | None, Limit] = None,
    question: str | None = None,
    full: bool = False,
    root: Root = None,
) -> None:
    """Show an artifact, a run, or a step of it. A policy between two checkpoints is described, and not replayed.

    Parameters
    ----------
    what
        Digest of an artifact, or its beginning; or a run of `cohort runs`.
    step
        Of a run: its groups at this step.
    limit
        How many: 3 groups, 10 rows or 50 steps.
    question
        Only the group of this question.
    full
        Show the configuration of the stage that made an artifact.
    """
    places = Places.under(root)
    record = find_run(places, what)
    with use_store(places.open_store()) as store:
        if record is not None:
            if full:
                raise ConfigError(
                    "--full: is of the stage that made an artifact; a run's settings are in its config.yaml"
                )
            if question is not None and step is None:
                raise ConfigError("--question: a run has groups at each step; give --step too")
            _show_run(places, store, record, step=step, limit=limit, question=question)
            return
        if step is not None:
            raise ConfigError(f"--step: only runs have steps, and no run is named {what}; `cohort runs` lists them")
        show_artifact(places, store, store.resolve(what), console(), limit=limit, question=question, full=full)


def _show_run(
    places: Places, store: Store, record: RunRecord, *, step: int | None, limit: int | None, question: str | None
) -> None:
    from flows.inspection.run_view import show_run, show_step

    history = history_of(places, store, record)
    if step is None:
        show_run(store, history, console(), limit=limit)
    else:
        show_step(store, history, step, console(), limit=limit, question=question)


def explain(what: str | None = None, *, root: Root = None) -> None:
    """Name the earlier call most like that of a stage, and which parts of its key differ.

    Parameters
    ----------
    what
        A stage's name (its latest call) or an artifact's digest; without it, the first call of every stage that the last run
        had to compute.
    """
    places, out = Places.under(root), console()
    store = places.open_store()
    calls = list(store.actions())
    chosen = _calls_of(places, store, calls, what)
    if not chosen:
        out.print("the last run computed nothing: every result was in the store")
    explanations = [ancestry.explain(store, call) for call in chosen]
    if what is not None:
        for explanation in explanations:
            out.print(str(explanation), markup=False, soft_wrap=True)
        return
    followers = []
    for explanation in explanations:
        own = [change for change in explanation.changes if change in explanation.causes]
        if own or explanation.nearest is None:
            own_text = "".join(f"\n  {change.part}: {change.before} -> {change.after}" for change in own)
            out.print(explanation.record["stage"] + (own_text or ": called for the first time"), markup=False)
        else:
            followers.append(explanation.record["stage"])
    if followers:
        out.print(f"{', '.join(followers)}: their inputs changed (`cohort explain STAGE` shows which)")


def lineage(
    digest: str,
    *,
    mermaid: bool = False,
    depth: Annotated[int | None, Parameter(validator=Number(gte=0))] = None,
    root: Root = None,
) -> None:
    """Show what an artifact was made from, down to the data.

    Parameters
    ----------
    digest
        Digest of the artifact, or its beginning; a run of `cohort runs` means its final policy.
    mermaid
        Print a Mermaid graph instead of a tree.
    depth
        Generations that the tree shows, 4 by default; 0 = all, down to the data.
    """
    if mermaid and depth is not None:
        raise ConfigError("--depth: is of the tree; a Mermaid graph has all generations. Leave one of the two out")
    places = Places.under(root)
    store = places.open_store()
    record = find_run(places, digest)
    ledger = read_ledger(record.folder) if record else None
    calls = ledger.calls.keys() if ledger else ()
    ancestors = ancestry.ancestry(store, _digest(places, store, digest), calls=calls)
    notes = ways_back(places, store, ancestors)
    depth = 4 if depth is None else depth
    print(
        visible(ancestry.mermaid(ancestors) if mermaid else ancestry.tree(ancestors, depth=depth or None, notes=notes))
    )


def _add_run(table: Table, record: RunRecord) -> None:
    last = record.attempts[-1]
    status = last.outcome()
    colour = {"finished": "green", "running": "cyan"}.get(status, "yellow")
    head = [
        quoted(record.folder.name),
        moment(last.start.time),
        f"[{colour}]{status}[/]",
        f"{record.steps}/{record.total_steps}",
    ]
    head.append(duration(sum(attempt.seconds for attempt in record.attempts)))
    table.add_row(*head, quoted("\n".join(_accuracies(record))) or "-")


def _accuracies(record: RunRecord) -> Iterator[str]:
    """Yield a line per set: before, after and best."""
    for name, final in record.accuracy.get("final", {}).items():
        step, best = record.accuracy.get("best", {}).get(name, (0, None))
        before = _accuracy(record.accuracy.get("before", {}).get(name, {}))
        yield f"{name} {before} -> {_accuracy(final)}, best {percent(best)} at step {step}"


def _accuracy(metrics: Mapping[str, float]) -> str:
    return percent(metrics.get("accuracy", metrics.get("greedy_accuracy")))


def _digest(places: Places, store: Store, what: str) -> str:
    """Return a digest from its beginning, or that of the final policy of a run."""
    record = find_run(places, what)
    return record.policy if record and record.policy else store.resolve(what)


def _calls_of(places: Places, store: Store, calls: list[dict[str, Any]], what: str | None) -> list[dict[str, Any]]:
    if what is None:
        last = list(read_records(places))[-1:]
        since = last[0].attempts[-1].start.time if last else 0.0
        first: dict[str, dict[str, Any]] = {}
        for call in calls:
            if call["created"] >= since:
                first.setdefault(call["stage"], call)
        return list(first.values())
    named = [call for call in calls if call["stage"] == what]
    if not named:
        digest = store.resolve(what)
        named = [call for call in calls if call["result"] == digest]
    if not named:
        raise MissingArtifactError(f"{what}: no recorded call made it")
    return named[-1:]
