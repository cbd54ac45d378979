"""The objects of a local folder: sealed folders that are renamed into place whole and verified before they are read."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final

from pipeline.store.drafts import draft_folder
from pipeline.store.files import (
    DamagedArtifactError,
    MissingArtifactError,
    PrunedArtifactError,
    Signature,
    fsync,
    is_digest,
    named_errors,
    signature,
    write_sealed,
)
from pipeline.store.locks import locked
from pipeline.store.objects import PRUNED, freed_files, is_own_file, read_manifest, verify_folder

__all__ = ["Shelf"]

_LOCK: Final = re.compile(r"[a-z0-9][a-z0-9-]*")


class Shelf:
    """Sealed folders under `objects/` of a store's root, read-only once they are there."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._verified: dict[str, Signature] = {}

    def folder(self, digest: str) -> Path:
        """Where an object lies, or would.

        Raises:
            MissingArtifactError: what is given is no digest, and so no part of a path.
        """
        if not is_digest(digest):
            raise MissingArtifactError(f"{digest!r:.80} names no artifact: expected 64 hexadecimal digits")
        return self._root / "objects" / digest[:2] / digest

    def digests(self) -> Iterator[str]:
        """Digests of all objects, pruned ones included."""
        for folder in sorted((self._root / "objects").glob("*/*")):
            if is_digest(folder.name):
                yield folder.name

    @contextlib.contextmanager
    def guard(self, digest: str) -> Iterator[None]:
        """Hold an object among the processes that use this folder, to place, move or free it."""
        if not _LOCK.fullmatch(digest):
            raise MissingArtifactError(f"{digest!r:.80} names no artifact: expected 64 hexadecimal digits")
        with contextlib.ExitStack() as held:
            with named_errors(self._root):
                held.enter_context(locked(self._root / "locks" / digest))
            yield

    def place(self, draft: Path, digest: str) -> None:
        """Rename a sealed draft into place, unless a sound and whole object of that content is there."""
        with self.guard(digest):
            if not self.is_sound(digest) or self._freed(digest):
                aside = self.move_aside(digest)
                if aside is not None and (aside / PRUNED).exists():
                    shutil.rmtree(aside)  # nothing to look into
                self._rename(draft, self.folder(digest))
            if not (self.folder(digest) / PRUNED).exists():
                self._verified[digest] = signature(self.folder(digest))

    def _rename(self, draft: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(draft, target)
        except OSError as error:
            # Only where `flock` does not reach another host: a writer of the same content came first.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            self.verify(target.name)
        fsync(target.parent)

    def check(self, digest: str) -> None:
        """Verify an object, unless this process did and size, time and inode of every file are the same since.

        Raises:
            MissingArtifactError, DamagedArtifactError, PrunedArtifactError: with the file and what to do.
        """
        if digest not in self._verified or self._verified[digest] != signature(self.folder(digest)):
            self.verify(digest)

    def verify(self, digest: str) -> None:
        """Check every file of an object now, whatever was verified before; raises as `check` does."""
        self._verified.pop(digest, None)
        with named_errors(self._root):
            before = signature(self.folder(digest))
            try:
                verify_folder(self.folder(digest))
            except FileNotFoundError:
                raise MissingArtifactError(f"artifact {digest} was moved while it was read; run again") from None
        self._verified[digest] = before

    def is_sound(self, digest: str) -> bool:
        """Whether an object is there, verified now, and not wholly pruned."""
        try:
            self.verify(digest)
        except (MissingArtifactError, DamagedArtifactError, PrunedArtifactError):
            return False
        return True

    def free(self, digest: str, files: Collection[str] | None, *, allow: Callable[[str], None]) -> int:
        """Free files of an object (None: all), after a note of it; returns the bytes freed. The caller holds its guard.

        Args:
            allow: raises if the object may not be freed; asked unless all was freed before.
        """
        folder = self.folder(digest)
        payload = read_manifest(folder)["files"]
        before = freed_files(folder, payload)
        freed = before.union(file["name"] for file in payload if files is None or file["name"] in files)
        if freed > before or (not payload and files is None):
            allow(digest)
            with draft_folder(self._root) as draft:
                write_sealed(draft / PRUNED, {"digest": digest, "files": sorted(freed), "pruned": time.time()})
                os.replace(draft / PRUNED, folder / PRUNED)
        own = [name for name in freed if is_own_file(folder, name)]  # a link may lead to what is not the store's
        states = [(folder / name).stat() for name in own]
        for name in own:
            (folder / name).unlink(missing_ok=True)
        return sum(state.st_size for state in states if state.st_nlink == 1)  # else another artifact keeps it

    def move_aside(self, digest: str) -> Path | None:
        """Move an object out of `objects/`; where to, None if there is none. The caller holds its guard."""
        place = self._root / "quarantine" / f"{digest}.{uuid.uuid4().hex[:8]}"
        if not self.folder(digest).exists():
            return None
        place.parent.mkdir(exist_ok=True)
        os.rename(self.folder(digest), place)
        return place

    def _freed(self, digest: str) -> frozenset[str]:
        return freed_files(self.folder(digest), read_manifest(self.folder(digest))["files"])
