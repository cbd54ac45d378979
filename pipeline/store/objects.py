"""The objects under a store's root: renamed into place whole, verified before they are read."""

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

from pipeline.store.files import (
    DamagedArtifactError,
    MissingArtifactError,
    PrunedArtifactError,
    Signature,
    draft_folder,
    fsync,
    is_digest,
    named_errors,
    read_sealed,
    signature,
    write_sealed,
)
from pipeline.store.folder import MANIFEST, PRUNED, freed_files, is_own_file, read_manifest, verify_folder
from pipeline.store.locks import locked

_LOCK: Final = re.compile(r"[a-z0-9][a-z0-9-]*")


class Objects:
    """The objects under `objects/` of a store's root, read-only once they are there."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._verified: dict[str, Signature] = {}
        self._partial: set[str] = set()
        """Objects of which files are unwritten, when they were verified."""

    def folder(self, digest: str) -> Path:
        """Return where an object lies, or would; raise MissingArtifactError for a text that is no digest."""
        if not is_digest(digest):
            raise _no_digest(digest)
        return self._root / "objects" / digest[:2] / digest

    def digests(self) -> list[str]:
        """Return the digests of all objects, pruned ones included."""
        return [folder.name for folder in (self._root / "objects").glob("*/*") if is_digest(folder.name)]

    @contextlib.contextmanager
    def lock(self, digest: str) -> Iterator[None]:
        """Lock an object among the processes that use this folder, to place, move or free it."""
        if not _LOCK.fullmatch(digest):
            raise _no_digest(digest)
        with contextlib.ExitStack() as stack:
            with named_errors(self._root):
                stack.enter_context(locked(self._root / "locks" / digest))
            yield

    def place(self, draft: Path, digest: str, *, partial: bool = False) -> None:
        """Rename a sealed draft into place, unless a sound object is there that has all the files of the draft.

        One that has only some of them gets the others.

        Args:
            partial: the draft's manifest names files as unwritten.
        """
        with self.lock(digest):
            folder = self.folder(digest)
            lacking = self._lacking(folder, draft)
            if lacking is None:
                aside = self.quarantine(digest)
                if aside is not None and (aside / PRUNED).exists():
                    shutil.rmtree(aside)  # pruned, not damaged: nothing to look into
                self._rename(draft, folder)
                (self._partial.add if partial else self._partial.discard)(digest)
            elif lacking:
                _complete(folder, draft, lacking)
                self._partial.discard(digest)
            if not (folder / PRUNED).exists():
                self._verified[digest] = signature(folder)

    def _lacking(self, folder: Path, draft: Path) -> list[str] | None:
        """Return the files that an object lacks and a draft has; None: there is no sound one that differs by these only."""
        if not self.is_sound(folder.name) or freed_files(folder):
            return None
        here, there = read_manifest(folder), read_sealed(draft / MANIFEST)
        if not here.get("unwritten") or there.get("unwritten"):
            return []
        lacking = [file["name"] for file in there["files"] if file not in here["files"]]
        return lacking if len(lacking) + len(here["files"]) == len(there["files"]) else None

    def _rename(self, draft: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(draft, target)
        except OSError as error:
            # Only where file locks do not reach another host: a writer of the same content came first.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            self.verify(target.name)
        fsync(target.parent)

    def check(self, digest: str, *, partial: bool = False) -> None:
        """Verify an object, unless this process did and size, time and inode of every file are the same since.

        Raise MissingArtifactError, DamagedArtifactError or PrunedArtifactError, with the file and what to do; unless `partial`
        also where files were not written.
        """
        if digest not in self._verified or self._verified[digest] != signature(self.folder(digest)):
            self.verify(digest)
        if digest in self._partial and not partial:
            raise PrunedArtifactError(
                f"artifact {digest[:12]} was not written (checkpoint.every); `cohort export {digest[:12]} FOLDER` replays it"
            )

    def verify(self, digest: str) -> None:
        """Check every file of an object now, whatever was verified before; raise as `check` does."""
        self._verified.pop(digest, None)
        with named_errors(self._root):
            before = signature(self.folder(digest))
            try:
                unwritten = verify_folder(self.folder(digest))
            except FileNotFoundError:
                raise MissingArtifactError(f"artifact {digest} was moved while it was read; run again") from None
        self._verified[digest] = before
        (self._partial.add if unwritten else self._partial.discard)(digest)

    def is_sound(self, digest: str, *, whole: bool = False) -> bool:
        """Return whether an object is there, verified now, and not wholly pruned; if asked, also that all of it was written."""
        try:
            self.verify(digest)
        except (MissingArtifactError, DamagedArtifactError, PrunedArtifactError):
            return False
        return not (whole and digest in self._partial)

    def has_but(self, digest: str, freed: Collection[str]) -> bool:
        """Return whether an object is here in a sound state and lacks no other files than these."""
        try:
            with contextlib.suppress(PrunedArtifactError):
                self.verify(digest)
        except (MissingArtifactError, DamagedArtifactError):
            return False
        return digest not in self._partial and freed_files(self.folder(digest)).issubset(freed)

    def free(self, digest: str, files: Collection[str] | None, *, require: Callable[[str], None]) -> int:
        """Free files of an object (None: all), after a note of them; return the bytes freed. The caller holds its lock.

        Call `require`, which raises where the object may not be freed, unless all was freed before.
        """
        folder = self.folder(digest)
        payload = read_manifest(folder)["files"]
        before = freed_files(folder, payload)
        freed = before.union(file["name"] for file in payload if files is None or file["name"] in files)
        if freed > before or (not payload and files is None):
            require(digest)
            with draft_folder(self._root) as draft:
                write_sealed(draft / PRUNED, {"digest": digest, "files": sorted(freed), "pruned": time.time()})
                os.replace(draft / PRUNED, folder / PRUNED)
        own = [name for name in freed if is_own_file(folder, name)]  # a link may lead out of the store
        states = [(folder / name).stat() for name in own]
        for name in own:
            (folder / name).unlink(missing_ok=True)
        return sum(state.st_size for state in states if state.st_nlink == 1)  # else another artifact keeps the bytes

    def content(self, digest: str) -> str | None:
        """Return the content digest of an object, freed or not; None: it is not there, or files of it were not written."""
        with contextlib.suppress(MissingArtifactError, DamagedArtifactError):
            manifest = read_manifest(self.folder(digest))
            return None if manifest.get("unwritten") else str(manifest["digest"])
        return None

    def quarantine(self, digest: str) -> Path | None:
        """Move an object out of `objects/`; return where to, None if there is none. The caller holds its lock."""
        place = self._root / "quarantine" / f"{digest}.{uuid.uuid4().hex[:8]}"
        if not self.folder(digest).exists():
            return None
        place.parent.mkdir(exist_ok=True)
        os.rename(self.folder(digest), place)
        return place


def _no_digest(text: str) -> MissingArtifactError:
    return MissingArtifactError(f"{text!r:.80} names no artifact: expected 64 hexadecimal digits")


def _complete(folder: Path, draft: Path, lacking: list[str]) -> None:
    """Move files of a draft into an object, the manifest last: whoever reads the others meanwhile is not disturbed."""
    for name in [*lacking, MANIFEST]:
        (folder / name).parent.mkdir(exist_ok=True)
        os.replace(draft / name, folder / name)
        fsync((folder / name).parent)
