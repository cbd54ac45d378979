"""Check free disk space before a stage starts, not when the disk is full.

The estimate for a stage is what it wrote the last times: in this process, or in the run that is being continued, whose results
it looked up. A stage without an estimate starts. Free is what the file system says (`statvfs`), which does not know quotas.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pipeline.store.files import MissingArtifactError, StoreError

_LAST: Final = 3
"""Executions of a stage whose largest is the estimate: outputs and their tables differ in length from step to step."""


class DiskFullError(StoreError):
    """Too little space is free for what a stage is about to write; it has not started."""


def free_bytes(folder: Path) -> int:
    """Return how many bytes this user may still write on the file system of `folder`."""
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


def folder_bytes(folder: Path | str) -> int:
    """Return the bytes of the files in a folder, hidden and nested ones too; hard-linked files count as 0."""
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
    """The bytes that stages wrote, and so will write again."""

    folder: Path
    """A folder on the file system of the store."""
    margin: int
    """Bytes that stay free beyond the estimate."""
    advice: Callable[[], str] = str
    """How to free space; called only when the disk is full."""
    free: Callable[[Path], int] = free_bytes
    """Bytes free on the file system of a folder."""
    written: int = 0
    """Bytes that stages wrote in all."""
    _sizes: dict[str, deque[int]] = field(default_factory=dict)
    _found: dict[str, str] = field(default_factory=dict)
    """Stage -> digest of its last result that was in the store."""

    def found(self, stage: str, digest: str) -> None:
        """Note that the result of a stage was in the store."""
        self._found[stage] = digest

    def estimate(self, stage: str, manifest: Callable[[str], Mapping[str, Any]]) -> int:
        """Return the bytes that a stage will write, by `manifest` of its last result; 0 where nothing is known of it."""
        if stage not in self._sizes and stage in self._found:
            with contextlib.suppress(MissingArtifactError):  # not even a description of trained state is here
                files = manifest(self._found[stage])["files"]
                self._sizes[stage] = deque([sum(file["size"] for file in files)], _LAST)
        return max(self._sizes.get(stage, ()), default=0)

    def before(self, stage: str, manifest: Callable[[str], Mapping[str, Any]]) -> None:
        """Raise DiskFullError, with what is needed and what can be done, where a stage would fill the disk."""
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


def _text(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
