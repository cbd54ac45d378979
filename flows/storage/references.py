"""Which artifacts runs and studies have used: what is freed, exported or counted goes by it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

from flows.ledger import read_ledger
from flows.places import Places
from flows.records import ARTIFACTS, read_artifacts, read_digests
from pipeline.store import Store

__all__ = ["OtherRuns", "references", "used_by"]


def used_by(folder: Path, store: Store) -> set[str]:
    """Digests of what a run used: as its record and ledger say, or what is left of the lease of one that was killed."""
    return _used_by(folder, store.pins.remains())


def references(places: Places, store: Store) -> dict[str, set[str]]:
    """Run or study -> digests of what it used, those that live included."""
    remains = store.pins.remains()
    found = {folder.name: _used_by(folder, remains) for folder in sorted(places.runs.glob("*/"))}
    for file in sorted(places.runs.glob(f"*.{ARTIFACTS}")):
        found[file.name.removesuffix(f".{ARTIFACTS}")] = read_digests(file)
    for lease in store.pins.live():
        found.setdefault(lease.run, set()).update(lease.digests)
    return {name: used for name, used in found.items() if used}


def _used_by(folder: Path, remains: Mapping[str, set[str]]) -> set[str]:
    ledger = read_ledger(folder)
    called = {call.digest for call in ledger.calls.values()} if ledger else set()
    return {*read_artifacts(folder), *called, *remains.get(folder.name, ())}


class OtherRuns:
    """What other runs than one have recorded as used, read again only where a record changed."""

    def __init__(self, places: Places, own: str) -> None:
        self._runs, self._own = places.runs, own
        self._known: dict[Path, tuple[int, frozenset[str]]] = {}
        self._all: frozenset[str] = frozenset()

    def digests(self) -> Set[str]:
        """All of them."""
        changed = False
        for file in [*self._runs.glob(f"*/{ARTIFACTS}"), *self._runs.glob(f"*.{ARTIFACTS}")]:
            if file.parent.name == self._own:
                continue
            written = file.stat().st_mtime_ns
            if self._known.get(file, (0, frozenset()))[0] != written:
                self._known[file] = (written, frozenset(read_digests(file)))
                changed = True
        if changed:
            self._all = frozenset[str]().union(*(digests for _, digests in self._known.values()))
        return self._all
