"""The disk, watched: what a stage will write is held against what is free before it starts, not when the disk is full.

The estimate is what the same stage wrote the last times: in this process, or in the run that is being continued, whose results
it looked up. A stage that nothing is known of starts. Free is what the file system says (`statvfs`); quotas it does not know.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pipeline.store.files import StoreError

__all__ = ["DiskFullError", "DiskWatch", "current_watch", "folder_bytes", "free_bytes", "watching_disk"]

_LAST: Final = 3
"""Executions of a stage whose largest is the estimate: outputs and their tables differ in length from step to step."""


class DiskFullError(StoreError):
    """Too little is free for what a stage is about to write; it has not started."""


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write on the file system of `folder`."""
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


def folder_bytes(folder: Path | str) -> int:
    """Bytes of the files in a folder, hidden and nested ones too; a file that another folder has as well takes none."""
    total = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                total += folder_bytes(entry.path)
            else:
                state = entry.stat(follow_symlinks=False)
                total += state.st_size if state.st_nlink == 1 else 0
    return total


@dataclass
class DiskWatch:
    """What stages wrote, and so will write again."""

    folder: Path
    """A folder on the file system of the store."""
    margin: int
    """Bytes that shall stay free beyond the estimate."""
    advice: Callable[[], str] = str
    """What could be done about a full disk; asked only then."""
    free: Callable[[Path], int] = free_bytes
    """Bytes free on the file system of a folder."""
    written: int = 0
    """Bytes that stages wrote while this watched."""
    _sizes: dict[str, deque[int]] = field(default_factory=dict)
    _found: dict[str, str] = field(default_factory=dict)
    """Stage -> digest that it was looked up to have made."""

    def found(self, stage: str, digest: str) -> None:
        """Note that the result of a stage was in the store."""
        self._found[stage] = digest

    def estimate(self, stage: str, manifest: Callable[[str], Mapping[str, Any]]) -> int:
        """Bytes that a stage will write; 0 where nothing is known of it.

        Args:
            manifest: the manifest of a digest, pruned or not.
        """
        if stage not in self._sizes and stage in self._found:
            files = manifest(self._found[stage])["files"]
            self._sizes[stage] = deque([sum(file["size"] for file in files)], _LAST)
        return max(self._sizes.get(stage, ()), default=0)

    def before(self, stage: str, manifest: Callable[[str], Mapping[str, Any]]) -> None:
        """Refuse to start a stage that would fill the disk.

        Raises:
            DiskFullError: says what is needed, what is free and what can be done.
        """
        needed, free = self.estimate(stage, manifest), self.free(self.folder)
        if free >= needed + self.margin:
            return
        advice = self.advice()
        raise DiskFullError(
            f"{stage} did not start: it will write about {_text(needed)}, {_text(self.margin)} shall stay free "
            f"(keep.min_free_gb), and {_text(free)} are free on the disk of {self.folder}. Nothing is lost; free space, then "
            f"run the same command again{advice and f': {advice}'}"
        )

    def wrote(self, stage: str, folder: Path) -> None:
        """Note that a stage made the object in `folder`."""
        count = folder_bytes(folder)
        self.written += count
        self._sizes.setdefault(stage, deque(maxlen=_LAST)).append(count)


_watch: ContextVar[DiskWatch | None] = ContextVar("cohort_disk_watch", default=None)


def current_watch() -> DiskWatch | None:
    """What watches the disk here; None: nothing does."""
    return _watch.get()


@contextlib.contextmanager
def watching_disk(watch: DiskWatch) -> Iterator[DiskWatch]:
    """Let stages that run inside the block ask `watch` before they start."""
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)


def _text(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
