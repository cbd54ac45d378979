"""Measure a store, every file once, however many artifacts share it by hard link; and find what runs and studies have used."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from flows.runs.paths import Places
from flows.runs.record import ARTIFACTS, read_artifacts, read_digests
from flows.storage.gc import Freed
from pipeline.event_log import LOG, LogReader
from pipeline.events import StageDone
from pipeline.store import Store, StoreError
from pipeline.store.files import folder_bytes
from pipeline.store.folder import MANIFEST
from stages.models import OPTIMIZER


class _File(NamedTuple):
    name: str
    size: int
    place: tuple[int, int] | tuple[str, str]
    """Device and inode: what hard links have in common. Of a file that is in a remote store only: digest and name."""
    links: int


@dataclass(frozen=True)
class Entry:
    """An artifact and the files of its payload that are there."""

    digest: str
    kind: str
    """Its type, with `: not written` where only its description is there; or `damaged`."""
    written: float
    """Seconds since the epoch."""
    files: tuple[_File, ...]

    @property
    def size(self) -> int:
        """Return the bytes of its payload, shared files included."""
        return sum(file.size for file in self.files)


class Inventory:
    """The artifacts of a store at one moment."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.entries = {digest: _entry(store, digest) for digest in store.digests()}

    def bytes_of(self, digests: Iterable[str]) -> int:
        """Return the bytes that these artifacts take together."""
        return sum({file.place: file.size for digest in digests for file in self._files(digest)}.values())

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Return type -> how many artifacts, and their bytes; a checkpoint's optimizer state is a type of its own."""
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        seen: set[object] = set()
        for entry in self.entries.values():
            kinds = {file: _kind(entry, file) for file in entry.files}
            counts.update({entry.kind, *kinds.values()})
            for file, kind in kinds.items():
                sizes[kind] += 0 if file.place in seen else file.size
                seen.add(file.place)
        return {kind: (counts[kind], sizes[kind]) for kind in sorted(counts, key=lambda kind: (-sizes[kind], kind))}

    def bytes_freed(self, freed: Collection[Freed]) -> int:
        """Return the bytes that freeing these gives back: a file that another artifact still has gives none."""
        gone: dict[object, list[_File]] = {}
        for file in (file for part in freed for file in self._files_of(part)):
            gone.setdefault(file.place, []).append(file)
        return sum(links[0].size for links in gone.values() if len(links) >= links[0].links)

    def size_of(self, part: Freed) -> int:
        """Return the bytes of its files, shared ones included."""
        return sum(file.size for file in self._files_of(part))

    def holds(self, part: Freed) -> bool:
        """Return whether there is anything to free."""
        return bool(self._files_of(part))

    def folder_bytes(self, name: str) -> int:
        """Return the bytes of one of the store's own folders: `actions`, `quarantine`."""
        return folder_bytes(self._store.root / name)

    def _files_of(self, part: Freed) -> list[_File]:
        return [file for file in self._files(part.digest) if part.files is None or file.name in part.files]

    def _files(self, digest: str) -> tuple[_File, ...]:
        entry = self.entries.get(digest)
        return entry.files if entry else ()


def _kind(entry: Entry, file: _File) -> str:
    return f"{entry.kind}: optimizer state" if file.name == OPTIMIZER else entry.kind


def _entry(store: Store, digest: str) -> Entry:
    folder, written, files = store.folder(digest), 0.0, []
    with contextlib.suppress(OSError):
        written = (folder / MANIFEST).stat().st_mtime
    try:
        manifest = store.manifest(digest)
    except StoreError:
        return Entry(digest, "damaged", written, tuple(_found(folder)))
    if not folder.exists():  # in the remote store, and not in its cache
        freed = store.freed(digest)
        there = (file for file in manifest["files"] if file["name"] not in freed)
        files = [_File(file["name"], file["size"], (digest, file["name"]), 1) for file in there]
    for name in (file["name"] for file in manifest["files"]):
        with contextlib.suppress(FileNotFoundError):
            files.append(_measured(folder, name))
    kind = str(manifest.get("type", "artifact"))
    return Entry(digest, f"{kind}: not written" if manifest.get("unwritten") else kind, written, tuple(files))


def _found(folder: Path) -> list[_File]:
    return [_measured(folder, path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file()]


def _measured(folder: Path, name: str) -> _File:
    state = os.stat(folder / name, follow_symlinks=False)
    return _File(name, state.st_size, (state.st_dev, state.st_ino), state.st_nlink)


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
