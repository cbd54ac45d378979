"""The local folder of a cache: which remote store it serves, what it has yet to upload, and its size."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from pipeline.store.files import StoreError, draft_folder, fsync, named_errors
from pipeline.store.locks import try_lock

BINDING: Final = "upstream.json"
GRACE: Final = 600.0
"""Seconds after its last use by any process in which an object stays: a reader of its path opens it by then. Ours."""


class Binding(NamedTuple):
    """The remote store that a folder is the cache of, so that two stores are never mixed."""

    id: str
    """The remote store's own name, which it keeps wherever it is moved."""
    url: str


def bound_to(root: Path) -> Binding | None:
    """Return the remote store that a folder is the cache of, if any; raise StoreError where the note of it was altered."""
    try:
        note = json.loads((root / BINDING).read_text(encoding="utf-8"))
        return Binding(str(note["id"]), str(note["url"]))
    except (FileNotFoundError, NotADirectoryError):  # the first write says what is wrong with the folder
        return None
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{root / BINDING} is damaged; remove it, and what lies here is uploaded again") from None


def bind(root: Path, binding: Binding) -> None:
    """Note which remote store a folder is the cache of."""
    with draft_folder(root) as draft:
        (draft / BINDING).write_text(json.dumps(binding._asdict()), encoding="utf-8")
        os.replace(draft / BINDING, root / BINDING)


class Pending:
    """Notes under `pending/`: an empty file for each object or record that is not known to be in the remote store."""

    def __init__(self, root: Path) -> None:
        self._root, self._folder = root, root / "pending"

    def add(self, kind: str, name: str) -> None:
        """Note, durably, that an `object` or `action` must be uploaded; call it before it is made."""
        with named_errors(self._root):
            self._folder.mkdir(exist_ok=True)
            # A unique name: the upload of an earlier state must not remove the note of a later one.
            (self._folder / f"{name}.{kind}.{uuid.uuid4().hex[:8]}").touch()
            fsync(self._folder)

    def has_object(self, digest: str) -> bool:
        """Return whether an object is here and not known to be in the remote store."""
        return any(self._folder.glob(f"{digest}.object.*"))

    def names(self) -> set[str]:
        """Return digests and keys that are to be uploaded."""
        return {path.name.split(".")[0] for path in self._folder.glob("*.*")}

    def notes(self) -> list[tuple[Path, str, str]]:
        """Return note, kind and name of all that is to be uploaded, by whichever process: objects first, then records."""
        found = sorted(self._folder.glob("*.*"), key=lambda path: ".object." not in path.name)
        return [(path, path.name.split(".")[1], path.name.split(".")[0]) for path in found]


def evict(root: Path, limit: float, *, keep: Callable[[str], bool], grace: float = GRACE) -> int:
    """Remove objects, least recently used first, until the rest takes `limit` bytes; return the bytes freed.

    Call `keep`, which says whether an object must stay, again under its lock, so that the answer cannot change meanwhile.
    """
    found = [(folder.stat().st_mtime, _size(folder), folder) for folder in (root / "objects").glob("*/*")]
    excess, freed, mapped = sum(size for _, size, _ in found) - limit, 0, mapped_digests(root)
    for used, size, folder in sorted(found):
        if freed >= excess or time.time() - used < grace:
            break
        if folder.name not in mapped and not keep(folder.name) and _removed(root, folder, keep):
            freed += size
    return freed


def _removed(root: Path, folder: Path, keep: Callable[[str], bool]) -> bool:
    with try_lock(root / "locks" / folder.name) as mine, draft_folder(root) as draft:
        if not mine or keep(folder.name):
            return False
        try:
            os.rename(folder, draft / uuid.uuid4().hex)
        except FileNotFoundError:
            return False
        shutil.rmtree(draft, ignore_errors=True)
        return True


def mapped_digests(root: Path) -> frozenset[str]:
    """Return the objects of which this process has files in memory; none where the system does not say."""
    start = f"{root / 'objects'}{os.sep}"
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        paths = [line.split(start, 1)[1] for line in maps if start in line]
        return frozenset(path.split(os.sep)[1] for path in paths if path.count(os.sep) >= 2)
    return frozenset()


def _size(folder: Path) -> int:
    """Return the bytes that an object takes; less where files are removed meanwhile."""
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for path in folder.rglob("*"):
            total += path.lstat().st_size
    return total
