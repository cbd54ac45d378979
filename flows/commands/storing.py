"""`cohort store du`, `prune`, `export`, `import`: what lies on the disk, what of it may go, and how it moves."""

from __future__ import annotations

import contextlib
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.commands.options import Root, console
from flows.inspection.history import find_run
from flows.runs.paths import Places
from flows.runs.record import IMPORTED, check_folder, read_records, write_json
from flows.storage.gc import Freed, Records, superseded
from flows.storage.usage import Inventory, references, used_by
from flows.wording import moment, quoted, size
from pipeline.config import ConfigError
from pipeline.lineage import inputs
from pipeline.store import Store
from pipeline.store.pins import PinnedArtifactError, RunPins

_LISTED: Final = 40
"""Artifacts that `prune` names one by one."""
Newest = Annotated[int | None, Parameter(validator=Number(gte=0))]


def du(*, root: Root = None) -> None:
    """Say how large the store is. Files that artifacts share (hard links) count once.

    A run's own bytes are those that no other run has used: what freeing the run's artifacts could give back at most.
    """
    places, out = Places.under(root), console()
    store = places.open_store()
    inventory = Inventory(store)
    table = _table("type", "artifacts", "size")
    for kind, (count, taken) in inventory.by_kind().items():
        table.add_row(kind, f"{count:,}", size(taken))
    out.print(table)
    used = references(places, store)
    owners: dict[str, int] = {}
    for digest in (digest for digests in used.values() for digest in digests):
        owners[digest] = owners.get(digest, 0) + 1
    out.print()
    table = _table("run", "own", "shared with others")
    for name, digests in used.items():
        own = {digest for digest in digests if owners[digest] == 1}
        table.add_row(name, size(inventory.bytes_of(own)), size(inventory.bytes_of(digests - own)))
    table.add_row("used by no run", size(inventory.bytes_of(inventory.entries.keys() - owners.keys())), "")
    out.print(table)
    others = ", ".join(f"{name} {size(inventory.folder_bytes(name))}" for name in ("actions", "quarantine"))
    out.print(f"\n{size(inventory.bytes_of(inventory.entries))} in {len(inventory.entries):,} artifacts; {others}")
    out.print(f"in {escape(str(store.root))}", style="dim", soft_wrap=True)


def prune(
    *digests: str,
    checkpoints: Annotated[Newest, Parameter(name=["--checkpoints", "--keep-last"])] = None,
    optimizer: Newest = None,
    rollouts: Newest = None,
    unreferenced: bool = False,
    dry_run: bool = False,
    root: Root = None,
) -> None:
    """Free the payload of artifacts, but never of what a run that is alive may need. What is newest counts by training.

    Parameters
    ----------
    digests
        Artifacts to prune, by digest or its beginning.
    checkpoints
        Newest policies and critics that stay; besides them final policies of runs, those that were evaluated, and references.
    optimizer
        Newest checkpoints that keep their optimizer state; training goes on from the newest.
    rollouts
        Newest steps that keep their outputs, rewards and advantages. Outputs of an initial policy stay.
    unreferenced
        Artifacts that no recorded run used, and what was quarantined.
    dry_run
        Only say what would be freed.
    """
    places, out = Places.under(root), console()
    store = places.open_store()
    if not digests and not unreferenced and (checkpoints, optimizer, rollouts) == (None, None, None):
        raise ConfigError(
            "prune: name artifacts, or say what stays: --optimizer 1, --checkpoints 5, --rollouts 10, or --unreferenced "
            "(first with --dry-run)"
        )
    inventory = Inventory(store)
    chosen = dict.fromkeys(Freed(store.resolve(digest)) for digest in digests)
    if (checkpoints, optimizer, rollouts) != (None, None, None):
        records, final = Records(store.actions()), {run.policy for run in read_records(places)}
        old = superseded(records, checkpoints=checkpoints, optimizer=optimizer, rollouts=rollouts, final=final)
        chosen |= dict.fromkeys(old)
    if unreferenced:
        chosen |= dict.fromkeys(_unreferenced(places, store, inventory))
    if not dry_run:
        for part in list(chosen)[: len(digests)]:
            store.pins.require_unpinned(part.digest)  # what is asked for by name is not left out silently
    _free(store, inventory, [part for part in chosen if inventory.holds(part)], out, dry_run=dry_run)
    if unreferenced and not dry_run:
        shutil.rmtree(store.root / "quarantine", ignore_errors=True)


def export_archive(*what: str, root: Root = None) -> None:
    """Write runs, with all that they used, or artifacts into one tar file: `cohort store export RUN|DIGEST... FILE.tar`.

    A policy that was not written comes as its description, with the checkpoint and the tables that it is replayed from.

    Parameters
    ----------
    what
        Runs of `cohort runs`, or digests or their beginnings; then the file.
    """
    from pipeline.store.archive import write_archive

    places, out = Places.under(root), console()
    store = places.open_store()
    *names, file = what or [""]
    to = Path(file)
    if not names or to.suffix != ".tar":
        raise ConfigError(
            "export: expected RUN or DIGEST, one or several, and then a FILE.tar; `cohort runs` lists runs"
        )
    if to.exists():
        raise ConfigError(f"{to} exists already; choose another name or remove it")
    runs, digests = [], set[str]()
    for name in names:
        if (record := find_run(places, name)) is None:
            digests.add(store.resolve(name))
        else:
            runs.append(record.folder)
            digests |= used_by(record.folder, store)
    described, lost = _with_what_replays(store, digests)
    records = [record["key"] for record in store.actions() if record["result"] in digests]
    count = write_archive(to, store, sorted(digests), records, runs)
    text = f"{len(digests):,} artifacts, {len(records):,} records, {len(runs)} runs: {size(count)} in {to}"
    out.print(text, soft_wrap=True)
    if described:
        text = (
            f"{described:,} of them as descriptions: they were not written, and are replayed from the others when read"
        )
        out.print(text, soft_wrap=True)
    for reason in lost:
        out.print(f"[yellow]{escape(reason)}[/]", soft_wrap=True)
    out.print(f"where it goes: [bold]cohort store import {escape(shlex.quote(to.name))}[/]", soft_wrap=True)


def import_archive(file: Path, *, root: Root = None) -> None:
    """Take the content of a file of `cohort store export` into this store; every hash is compared first.

    Parameters
    ----------
    file
        The file.
    """
    from pipeline.store.archive import read_archive

    places, out = Places.under(root), console()
    taken = read_archive(file, places.open_store(), places.runs, check=check_folder)
    for name in taken.runs:
        write_json(places.runs / name / IMPORTED, {"archive": file.name})
    out.print(
        f"{taken.objects:,} artifacts ({taken.new_objects:,} new), {taken.records:,} records ({taken.new_records:,} new)"
    )
    if taken.stages:
        stages = ", ".join(f"{quoted(stage)} {count:,}" for stage, count in sorted(taken.stages.items()))
        out.print(
            f"{taken.new_records:,} records are of calls that who made {quoted(file.name)} carried out ({stages}): runs here "
            "take their results as computed. `cohort show DIGEST` names the archive, `cohort forget DIGEST` drops a record",
            soft_wrap=True,
        )
    for name in taken.runs:
        command = f"cohort run {shlex.quote(str(places.runs / name / 'config.yaml'))}{places.option()}"
        out.print(f"run {name}: [bold]{escape(command)}[/]", soft_wrap=True)


def _with_what_replays(store: Store, digests: set[str]) -> tuple[int, list[str]]:
    """Add what trained state among `digests` is replayed from where it was not written; how many, and what cannot be."""
    from pipeline.derivation.materialise import ReplayError, calls_to_replay

    unwritten = [digest for digest in sorted(digests) if store.manifest(digest).get("unwritten")]
    lost, covered = [], set[str]()
    for digest in unwritten:
        try:
            chain = [] if digest in covered else calls_to_replay(store, digest)
        except ReplayError as error:
            lost.append(str(error))
            continue
        covered.update(chain)
        digests.update(chain, *(dict(inputs(store.action(key)["arguments"])).values() for key in chain))
    return len(unwritten), lost


def _free(store: Store, inventory: Inventory, parts: list[Freed], out: Console, *, dry_run: bool) -> None:
    """Free what no live run holds, naming each, and say what is held."""
    live = store.pins.live()
    held = {pins.run: [part for part in parts if part.digest in pins.digests] for pins in live}
    kept = {part for several in held.values() for part in several}
    free = [part for part in parts if part not in kept]
    count = inventory.bytes_freed(free)
    for number, part in enumerate(free):
        if not dry_run:
            with contextlib.suppress(PinnedArtifactError):  # a run took it this instant
                store.prune(part.digest, part.files)
        if number < _LISTED:
            _name(inventory, part, out)
    if len(free) > _LISTED:
        out.print(f"... and {len(free) - _LISTED:,} more")
    for pins in live:
        _say_held(pins, inventory, held[pins.run], out)
    out.print(f"{len(free)} artifacts, {size(count)} {'would be freed' if dry_run else 'freed'}")


def _name(inventory: Inventory, part: Freed, out: Console) -> None:
    entry = inventory.entries[part.digest]
    what = f"{entry.kind} {'optimizer state' if part.files else ''}".strip()
    out.print(f"{part.digest[:12]}  {what:<26}  {moment(entry.written)}  {size(inventory.size_of(part))}")


def _say_held(pins: RunPins, inventory: Inventory, parts: Iterable[Freed], out: Console) -> None:
    digests = {part.digest for part in parts}
    if digests:
        text = f"{len(digests):,} artifacts ({size(inventory.bytes_of(digests))}) stay: the run {pins} may need them"
        out.print(f"[yellow]{escape(text)}[/]", soft_wrap=True)


def _unreferenced(places: Places, store: Store, inventory: Inventory) -> list[Freed]:
    """Return what no run used. Not what is younger than a run that is alive: it may be about to record its use."""
    used = {digest for digests in references(places, store).values() for digest in digests}
    young = min((pins.started for pins in store.pins.live()), default=float("inf"))
    return [
        Freed(digest) for digest, entry in inventory.entries.items() if digest not in used and entry.written < young
    ]


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table
