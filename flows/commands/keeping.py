"""`cohort verify`, `prune`, `forget`: the care of the store."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from flows.choice import choose
from flows.commands.options import Root, console
from flows.places import Places
from flows.records import RunRecord, read_artifacts, read_records
from flows.session import run_flow
from flows.wording import moment, size
from pipeline.config import ConfigError
from pipeline.store import DamagedArtifactError, MissingArtifactError, PrunedArtifactError, Store, StoreError

__all__ = ["forget", "prune", "verify"]


@dataclass
class _Findings:
    """What a check of the whole store found."""

    sound: int = 0
    pruned: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    """Digest -> what is wrong with the object."""
    missing: set[str] = field(default_factory=set)
    """Digests that a record names and no object has."""
    records: list[Path] = field(default_factory=list)
    """Damaged records of calls."""

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.damaged or self.missing or self.records)


def verify(*, repair: bool = False, root: Root = None) -> int:
    """Hash every artifact again and report what is damaged or missing; exit code 1 if anything is and was not repaired.

    Parameters
    ----------
    repair
        Quarantine what is damaged, then run the configurations again that used it: only what is missing is computed.
    root
        Folder of the store.
    """
    places, out = Places.under(root), console()
    found = _check(places.open_store())
    _report(found, out)
    if found.clean:
        return 0
    if not repair:
        out.print(f"[bold]cohort verify --repair{places.option()}[/] mends this; the next run that needs it does too")
        return 1
    _quarantine(places.open_store(), found, out)
    for record in _affected(places, found):
        out.print(f"\nrunning {record.folder.name} again")
        choice = choose(str(record.folder / "config.yaml"))
        run_flow(choice, places, engine="inline", console=out, command=f"cohort run {record.folder / 'config.yaml'}")
    after = _check(places.open_store())
    out.print()
    _report(after, out)
    if after.missing:
        out.print("what is still missing was used by no recorded run; the next run that needs it computes it")
    return 0 if not after.damaged and not after.records else 1


def prune(
    *digests: str,
    keep_last: Annotated[int | None, Parameter(help="newest checkpoints that stay")] = None,
    dry_run: bool = False,
    root: Root = None,
) -> None:
    """Free the payload of artifacts. Manifests and records stay, so runs that used them stay cached.

    Without digests: checkpoints of the policy update, oldest first, but for the newest `--keep-last` and the final policies
    of all recorded runs. A stage that needs a pruned payload says how to compute it again (`cohort forget`).

    Parameters
    ----------
    digests
        Artifacts to prune, by digest or its beginning.
    dry_run
        Only say what would be freed.
    root
        Folder of the store.
    """
    places, out = Places.under(root), console()
    store = places.open_store()
    if not digests and keep_last is None:
        raise ConfigError(
            "prune: name artifacts, or say how many checkpoints stay: --keep-last 5 (first with --dry-run)"
        )
    chosen = (
        [store.resolve(digest) for digest in digests] if digests else _old_checkpoints(places, store, keep_last or 0)
    )
    freed = 0
    for digest in chosen:
        manifest = store.manifest(digest)
        there = [places.payload(digest) / file["name"] for file in manifest["files"]]
        held = sum(path.stat().st_size for path in there if path.exists())
        freed += held if dry_run else store.prune(digest)
        made = (manifest.get("provenance") or {}).get("created")
        date = f"  {moment(made)}" if made else ""
        out.print(f"{digest[:12]}  {manifest['type']:<12}{date}  {size(held)}")
    out.print(f"{len(chosen)} artifacts, {size(freed)} {'would be freed' if dry_run else 'freed'}")


def forget(digest: str, *, root: Root = None) -> None:
    """Remove the records of the calls that led to an artifact, so that the next run computes them again.

    Parameters
    ----------
    digest
        The artifact, by digest or its beginning.
    root
        Folder of the store.
    """
    store = Places.under(root).open_store()
    full = store.resolve(digest)
    count = store.forget(full)
    console().print(f"{full[:12]}: {count} call{'' if count == 1 else 's'} forgotten; the next run computes again")


def _check(store: Store) -> _Findings:
    found = _Findings()
    for digest in store.digests():
        try:
            store.verify(digest)
            found.sound += 1
        except PrunedArtifactError:
            found.pruned += 1
        except (DamagedArtifactError, MissingArtifactError) as error:
            found.damaged[digest] = str(error)
    present = set(store.digests())
    for path in sorted((store.root / "actions").glob("*/*.json")):
        try:
            result = store.action(path.stem)["result"]
        except DamagedArtifactError:
            found.records.append(path)
        else:
            found.missing |= {result} - present
    return found


def _report(found: _Findings, out: Console) -> None:
    for message in found.damaged.values():
        out.print(f"[red]damaged[/] {message}", soft_wrap=True)
    for path in found.records:
        out.print(f"[red]damaged[/] record {path}", soft_wrap=True)
    for digest in sorted(found.missing):
        out.print(f"[yellow]missing[/] {digest}")
    counts = f"{found.sound:,} artifacts sound, {found.pruned:,} pruned, {len(found.damaged):,} damaged"
    out.print(f"{counts}, {len(found.missing):,} missing; {len(found.records):,} damaged records")


def _quarantine(store: Store, found: _Findings, out: Console) -> None:
    for digest in found.damaged:
        out.print(f"quarantined {store.quarantine(digest)}", soft_wrap=True)
    with warnings.catch_warnings(action="ignore"):
        for path in found.records:
            store.find(path.stem)  # a look-up removes a damaged record


def _affected(places: Places, found: _Findings) -> list[RunRecord]:
    """Runs that used what is gone. A damaged record does not say whose it was: then all runs are asked, and reuse the rest."""
    gone = {*found.damaged, *found.missing}
    every = bool(found.records)
    return [run for run in read_records(places) if every or gone & read_artifacts(run.folder).keys()]


def _old_checkpoints(places: Places, store: Store, keep: int) -> list[str]:
    """Checkpoints of policy updates that hold a payload, oldest first, but for the newest `keep` and final policies."""
    finals = {run.policy for run in read_records(places)}
    # A dictionary, so that a checkpoint that several calls led to counts once, at its last.
    made: dict[str, None] = {}
    for call in store.actions():
        if call["stage"] == "update_policy":
            made.pop(call["result"], None)
            made[call["result"]] = None
    candidates = list(made)[: max(0, len(made) - keep)]
    return [digest for digest in candidates if digest not in finals and _holds_payload(store, digest)]


def _holds_payload(store: Store, digest: str) -> bool:
    try:
        store.path(digest)
    except StoreError:
        return False
    return True
