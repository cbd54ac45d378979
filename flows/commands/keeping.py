"""`cohort verify`, `forget`: check and repair the store, and drop records of calls."""

from __future__ import annotations

import contextlib
import shlex
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from flows.commands.options import Root, console
from flows.config.resolve import choose
from flows.runs.paths import Places
from flows.runs.record import IMPORTED, RunRecord, read_artifacts, read_records, unreadable_records
from flows.runs.session import run_flow
from flows.storage.gc import Freed, Records, needed_again
from flows.wording import quoted
from pipeline.store import DamagedArtifactError, MissingArtifactError, PrunedArtifactError, Store, StoreError


@dataclass
class _Findings:
    """What a check of the whole store found."""

    sound: int = 0
    unwritten: int = 0
    """Trained state of which the description is sound, and the rest is replayed when it is read."""
    pruned: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    """Digest -> what is wrong with the object."""
    missing: set[str] = field(default_factory=set)
    """Digests that a record names and no object has."""
    records: dict[Path, str] = field(default_factory=dict)
    """Damaged records of calls, and what is wrong with them."""
    runs: dict[Path, str] = field(default_factory=dict)
    """Records of runs that cannot be read, and why."""

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.damaged or self.missing or self.records or self.runs)


def verify(*, repair: bool = False, root: Root = None) -> int:
    """Hash every artifact again and report what is damaged or missing; exit code 1 if anything is and was not repaired.

    Parameters
    ----------
    repair
        Quarantine what is damaged, replay trained state that is gone, then run the configurations again that used the rest:
        only what is missing is computed.
    """
    places, out = Places.under(root), console()
    found = _check(places.open_store())
    found.runs = unreadable_records(places)
    _report(found, out)
    if found.clean:
        return 0
    if found.runs and not (found.damaged or found.missing or found.records):
        return 1
    if not repair:
        out.print(
            f"[bold]cohort verify --repair{escape(places.option())}[/] repairs this; the next run that needs it does too"
        )
        return 1
    _quarantine(places.open_store(), found, out)
    _replay(places.open_store(), found, out)
    for record in _affected(places, found):
        if (record.folder / IMPORTED).exists():
            command = f"{_again(record)}{places.option()}"
            out.print(
                f"\n{quoted(record.folder.name)} was imported, and its configuration is not yours: {quoted(command)}"
            )
            continue
        out.print(f"\nrunning {record.folder.name} again")
        choice = choose(str(record.folder / "config.yaml"))
        run_flow(choice, places, engine="inline", console=out, command=_again(record))
    after = _check(places.open_store())
    out.print()
    _report(after, out)
    if after.missing:
        out.print("what is still missing was used by no recorded run; the next run that needs it computes it")
    return 0 if not (after.damaged or after.records or found.runs) else 1


def forget(digest: str, *, root: Root = None) -> None:
    """Remove the records of the calls that led to an artifact, and to pruned ones that it was made from.

    Parameters
    ----------
    digest
        The artifact, by digest or its beginning.
    """
    store = Places.under(root).open_store()
    full = store.resolve(digest)
    wanted = needed_again(Records(store.actions()), full, lambda given: _freed(store, given))
    count = store.forget(*wanted)
    back = f", with {len(wanted) - 1:,} pruned artifacts that it was made from" if len(wanted) > 1 else ""
    calls = f"{count} call{'' if count == 1 else 's'} forgotten"
    console().print(f"{full[:12]}: {calls}{back}; the next run computes again")


def _freed(store: Store, digest: str) -> Freed | None:
    """Return what `prune` took of an artifact."""
    try:
        names, freed = {file["name"] for file in store.manifest(digest)["files"]}, store.freed(digest)
    except StoreError:  # missing or damaged: the next run finds that by itself
        return None
    return Freed(digest, None if freed == names else tuple(sorted(freed))) if freed else None


def _check(store: Store) -> _Findings:
    found = _Findings()
    for digest in store.digests():
        try:
            store.verify(digest)
            unwritten = store.folder(digest).exists() and not store.is_written(digest)  # no remote store has one
            found.unwritten += unwritten
            found.sound += not unwritten
        except PrunedArtifactError:
            found.pruned += 1
        except (DamagedArtifactError, MissingArtifactError) as error:
            found.damaged[digest] = str(error)
    present = set(store.digests())
    for path in sorted((store.root / "actions").glob("*/*.json")):
        try:
            result = store.action(path.stem)["result"]
        except (DamagedArtifactError, MissingArtifactError) as error:
            found.records[path] = str(error).removeprefix(f"{path} ").split(";")[0]
        else:
            found.missing |= {result} - present
    return found


def _report(found: _Findings, out: Console) -> None:
    for message in found.damaged.values():
        out.print(f"[red]damaged[/] {quoted(message)}", soft_wrap=True)
    for path, reason in found.records.items():
        out.print(f"[red]damaged[/] record {quoted(path)} ({quoted(reason)})", soft_wrap=True)
    for path, reason in found.runs.items():
        advice = "restore it from a copy, or remove its folder"
        out.print(f"[red]unreadable[/] record {quoted(path)} ({quoted(reason)}); {advice}", soft_wrap=True)
    for digest in sorted(found.missing):
        out.print(f"[yellow]missing[/] {digest}")
    unread = f", {len(found.runs):,} unreadable runs" if found.runs else ""
    unwritten = f"{found.unwritten:,} not written (replayed when they are read), " if found.unwritten else ""
    counts = f"{found.sound:,} artifacts sound, {unwritten}{found.pruned:,} pruned, {len(found.damaged):,} damaged"
    text = f"{counts}, {len(found.missing):,} missing; {len(found.records):,} damaged records{unread}"
    out.print(text, soft_wrap=True)


def _quarantine(store: Store, found: _Findings, out: Console) -> None:
    for digest in found.damaged:
        out.print(f"quarantined {store.quarantine(digest)}", soft_wrap=True)
    with warnings.catch_warnings(action="ignore"):
        for path in found.records:
            if store.find(path.stem) is None:  # which removes a damaged record; what is no record's name stays
                path.unlink(missing_ok=True)


def _replay(store: Store, found: _Findings, out: Console) -> None:
    """Make trained state again that is gone; what cannot be replayed is left to the runs."""
    for digest in sorted({*found.damaged, *found.missing}):
        with contextlib.suppress(PrunedArtifactError):
            if store.make_whole(digest):
                out.print(f"replayed {digest}", soft_wrap=True)
                found.missing.discard(digest)
                found.damaged.pop(digest, None)


def _again(record: RunRecord) -> str:
    return f"cohort run {shlex.quote(str(record.folder / 'config.yaml'))}"


def _affected(places: Places, found: _Findings) -> list[RunRecord]:
    """Return the runs that used what is gone; all runs where a record is damaged, which does not say whose it was."""
    gone = {*found.damaged, *found.missing}
    every = bool(found.records)
    return [run for run in read_records(places) if every or gone & read_artifacts(run.folder).keys()]
