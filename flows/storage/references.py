"""Find which artifacts runs and studies have used, to free, export or count them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

from flows.runs.paths import Places
from flows.runs.record import ARTIFACTS, read_artifacts, read_digests
from pipeline.event_log import LOG, LogReader
from pipeline.events import StageDone
from pipeline.store import Store


def used_by(folder: Path, store: Store) -> set[str]:
    """Return the digests of what a run used: from its log, or from the pins of one that was killed."""
    return _used_by(folder, store.pins.remains())


def references(places: Places, store: Store) -> dict[str, set[str]]:
    """Return run or study -> digests of what it used, live ones included."""
    remains = store.pins.remains()
    found = {folder.name: _used_by(folder, remains) for folder in sorted(places.runs.glob("*/"))}
    for file in sorted(places.runs.glob(f"*.{ARTIFACTS}")):
        found[file.name.removesuffix(f".{ARTIFACTS}")] = read_digests(file)
    for pins in store.pins.live():
        found.setdefault(pins.run, set()).update(pins.digests)
    return {name: used for name, used in found.items() if used}


def _used_by(folder: Path, remains: Mapping[str, set[str]]) -> set[str]:
    return {*read_artifacts(folder), *remains.get(folder.name, ())}


class OtherRuns:
    """The digests that other runs than one have used, and studies; of their logs only what was appended since is read.

    Runs that live are left out: their pins say what they need, and what they give back.
    """

    def __init__(self, places: Places, own: str, store: Store) -> None:
        self._runs, self._own, self._store = places.runs, own, store
        self._logs: dict[Path, LogReader] = {}
        self._studies: dict[Path, int] = {}
        self._all: set[str] = set()

    def digests(self) -> Set[str]:
        """Return all of them."""
        apart = {self._own, *(pins.run for pins in self._store.pins.live())}
        for file in self._runs.glob(f"*/{LOG}"):
            if file.parent.name not in apart:
                events = self._logs.setdefault(file, LogReader(file)).new(kinds=(StageDone,))
                self._all.update(event.result for event in events if isinstance(event, StageDone))
        for file in self._runs.glob(f"*.{ARTIFACTS}"):
            written = file.stat().st_mtime_ns
            if self._studies.get(file) != written:
                self._studies[file] = written
                self._all |= read_digests(file)
        return self._all
