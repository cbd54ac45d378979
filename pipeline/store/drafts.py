"""Drafts: folders in which an object or record is written before one rename makes it visible.

A draft belongs to the process that holds its lock. Whoever finds the lock free may remove the draft: its owner is dead, on this
host or another, whatever process has its number now.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from pipeline.store.files import named_errors
from pipeline.store.locks import locked, try_lock

__all__ = ["draft_folder", "sweep"]


@contextlib.contextmanager
def draft_folder(root: Path) -> Iterator[Path]:
    """An empty folder on the store's own file system, gone after the block unless it was renamed away."""
    draft = root / "drafts" / uuid.uuid4().hex
    with contextlib.ExitStack() as held:
        with named_errors(root):
            held.enter_context(locked(root / "locks" / draft.name))
            draft.mkdir(parents=True)
        held.callback(shutil.rmtree, draft, ignore_errors=True)
        yield draft


def sweep(root: Path) -> None:
    """Remove drafts and lock files that dead processes left behind."""
    for name in {path.name for folder in ("drafts", "locks") for path in (root / folder).iterdir()}:
        with try_lock(root / "locks" / name) as abandoned:
            if abandoned:
                shutil.rmtree(root / "drafts" / name, ignore_errors=True)
