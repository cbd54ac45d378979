"""Keeping the cache of a remote store within a size: objects used least recently go, and are fetched again at need."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pipeline.store.drafts import draft_folder
from pipeline.store.locks import try_lock

__all__ = ["GRACE", "evict", "mapped_digests"]

GRACE: Final = 600.0
"""Seconds after its last use by any process in which an object stays: who was given a path opens it by then. Ours."""


def evict(root: Path, limit: float, *, keep: Callable[[str], bool], grace: float = GRACE) -> int:
    """Remove objects, those used least recently first, until the rest takes `limit` bytes; returns the bytes freed.

    Args:
        keep: whether an object must stay; asked again under its lock, so that it cannot change meanwhile.
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
    """The objects of which this process has files in memory; unknown, and so none, where the system does not tell."""
    start = f"{root / 'objects'}{os.sep}"
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        paths = [line.split(start, 1)[1] for line in maps if start in line]
        return frozenset(path.split(os.sep)[1] for path in paths if path.count(os.sep) >= 2)
    return frozenset()


def _size(folder: Path) -> int:
    """Bytes that an object takes; less where files go while they are looked at."""
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for path in folder.rglob("*"):
            total += path.lstat().st_size
    return total
