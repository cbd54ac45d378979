"""Where artifacts live: two small content-addressed stores under one root, as in Bazel.

* `objects/`: digest -> sealed folder (payload files and `manifest.json`), read-only once published;
* `actions/`: key of a stage call -> record with the digest of its result, its metrics and its provenance.

Commit order: draft folder on the same file system -> files fsynced -> manifest -> folder fsynced -> rename -> parent
fsynced -> action record last. A crash at any instant leaves no half artifact: what was not renamed is a draft. Equal content
has one name, so two writers of one content end in one folder. Files are read-only, folders not: `rm -r` must work.

Readers go through `path(digest)`, which hands out a verified local folder; a remote store would download there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

from pipeline.drafts import draft_folder, sweep
from pipeline.locking import locked
from pipeline.objects import PRUNED, read_manifest, seal_folder, verify_folder
from pipeline.sealing import (
    DamagedArtifactError,
    MissingArtifactError,
    PrunedArtifactError,
    Signature,
    StoreError,
    canonical_json,
    fsync,
    named_errors,
    read_sealed,
    sha256_of,
    signature,
    write_sealed,
)

__all__ = [
    "DamagedArtifactError",
    "MissingArtifactError",
    "PrunedArtifactError",
    "Store",
    "StoreError",
    "canonical_json",
    "current_store",
    "sha256_of",
    "use_store",
]

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class Store:
    """A content-addressed store in a local folder.

    Opening one never fails: a store that cannot be written can still be read, and the first write says what is wrong.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).resolve()
        self._verified: dict[str, Signature] = {}
        with contextlib.suppress(OSError):
            for name in ("objects", "actions", "drafts", "locks"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            sweep(self.root)

    def publish(self, fill: Callable[[Path], None], *, about: Mapping[str, Any], schema: str | None = None) -> str:
        """Seal the files that `fill` writes into an empty folder, and return their digest.

        The digest covers names, sizes and hashes of the payload and `schema`; `about` (type, rows, provenance) is kept in
        the manifest only, so that equal content has one name.

        Raises:
            StoreError: the disk is full, read-only or failing; no artifact is visible then.
        """
        with draft_folder(self.root) as draft:
            try:
                fill(draft)
            except OSError as error:
                # What `fill` reads elsewhere is its own affair; what it writes here is the store's.
                inside = error.filename is None or str(error.filename).startswith(str(draft))
                if not (error.errno and inside):
                    raise
                with named_errors(self.root):
                    raise
            with named_errors(self.root):
                digest = seal_folder(draft, about, schema)
                self._place(draft, digest)
        return digest

    def _place(self, draft: Path, digest: str) -> None:
        with self.lock(digest):
            if not self._is_sound(digest):
                self._move_aside(digest)
                self._rename(draft, self._object(digest))
            self._verified[digest] = signature(self._object(digest))

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

    def _is_sound(self, digest: str) -> bool:
        try:
            self.verify(digest)
        except (MissingArtifactError, DamagedArtifactError, PrunedArtifactError):
            return False
        return True

    def path(self, digest: str) -> Path:
        """The verified folder of an object, for reading only.

        Hashes are computed once per process, and again when size, time or inode of a file changed since.

        Raises:
            MissingArtifactError, DamagedArtifactError, PrunedArtifactError: with the file and what to do.
        """
        folder = self._object(digest)
        with named_errors(self.root):
            if digest not in self._verified or self._verified[digest] != signature(folder):
                self.verify(digest)
        return folder

    def manifest(self, digest: str) -> dict[str, Any]:
        """What the store knows of an object: files, schema, rows, type and provenance of its first producer."""
        with named_errors(self.root):
            return read_manifest(self._object(digest))

    def verify(self, digest: str) -> None:
        """Check every file of an object now, whatever was verified before; raises as `path` does."""
        self._verified.pop(digest, None)
        with named_errors(self.root):
            before = signature(self._object(digest))
            try:
                verify_folder(self._object(digest))
            except FileNotFoundError:
                raise MissingArtifactError(f"artifact {digest} was moved while it was read; run again") from None
        self._verified[digest] = before

    def quarantine(self, digest: str) -> Path | None:
        """Move a damaged object out of `objects/`, so that its stage computes it again; where to, None if it is sound."""
        with named_errors(self.root), self.lock(digest):
            # Another process may have mended it while this one waited.
            return None if self._is_sound(digest) else self._move_aside(digest)

    def _move_aside(self, digest: str) -> Path | None:
        place = self.root / "quarantine" / f"{digest}.{uuid.uuid4().hex[:8]}"
        if not self._object(digest).exists():
            return None
        place.parent.mkdir(exist_ok=True)
        os.rename(self._object(digest), place)
        return place

    def prune(self, digest: str) -> int:
        """Free the payload of an object, keep its manifest; returns the bytes freed."""
        with named_errors(self.root), self.lock(digest):
            payload = [self._object(digest) / file["name"] for file in self.manifest(digest)["files"]]
            states = [path.stat() for path in payload if path.exists()]
            freed: int = sum(state.st_size for state in states if state.st_nlink == 1)  # else another artifact keeps it
            if not (self._object(digest) / PRUNED).exists():
                with draft_folder(self.root) as draft:
                    write_sealed(draft / PRUNED, {"digest": digest, "pruned": time.time()})
                    os.replace(draft / PRUNED, self._object(digest) / PRUNED)
            for path in payload:
                path.unlink(missing_ok=True)
            return freed

    def digests(self) -> Iterator[str]:
        """Digests of all objects, pruned ones included."""
        for folder in sorted((self.root / "objects").glob("*/*")):
            if _DIGEST.fullmatch(folder.name):
                yield folder.name

    def resolve(self, prefix: str) -> str:
        """The one digest that starts with `prefix`."""
        found = [digest for digest in self.digests() if digest.startswith(prefix)]
        if len(found) != 1:
            raise MissingArtifactError(f"{prefix!r} names {len(found)} artifacts in {self.root}; expected exactly one")
        return found[0]

    def find(self, key: str) -> dict[str, Any] | None:
        """The record of a stage call whose result is present and sound (or pruned); None means: compute it."""
        try:
            record = self.action(key)
        except MissingArtifactError:
            return None
        except DamagedArtifactError as error:
            _warn(error)
            with named_errors(self.root):
                self._action(key).unlink(missing_ok=True)
            return None
        try:
            self.path(record["result"])
        except PrunedArtifactError:
            return record
        except (MissingArtifactError, DamagedArtifactError) as error:
            _warn(error)
            self.quarantine(record["result"])
            return None
        return record

    def record(self, key: str, record: Mapping[str, Any]) -> None:
        """Write the record of a stage call: the last step of a commit, after which the call is a hit."""
        path = self._action(key)
        with named_errors(self.root), draft_folder(self.root) as draft:
            write_sealed(draft / path.name, {**record, "key": key})
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(draft / path.name, path)
            fsync(path.parent)

    def action(self, key: str) -> dict[str, Any]:
        """The record of a stage call by its key.

        Raises:
            MissingArtifactError: there is none, or it was forgotten.
            DamagedArtifactError: its file was altered, or is that of another call.
        """
        path = self._action(key)
        with named_errors(self.root):
            try:
                record = read_sealed(path)
            except FileNotFoundError:
                raise MissingArtifactError(f"no record of the call {key[:12]} in {self.root}; run it again") from None
        if record["key"] != key:
            raise DamagedArtifactError(f"{path} is the record of another call; the next run recomputes it")
        return record

    def forget(self, digest: str) -> int:
        """Remove the records of all calls that led to an object, so that they compute again; returns how many."""
        keys = [record["key"] for record in self.actions() if record["result"] == digest]
        with named_errors(self.root):
            for key in keys:
                self._action(key).unlink(missing_ok=True)
        return len(keys)

    def actions(self) -> Iterator[dict[str, Any]]:
        """All readable action records, oldest first."""
        records = []
        for path in (self.root / "actions").glob("*/*.json"):
            with contextlib.suppress(DamagedArtifactError, MissingArtifactError):
                records.append(self.action(path.stem))
        yield from sorted(records, key=lambda record: float(record.get("created", 0.0)))

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold a key while computing it: two launchers never compute one key at once; a dead holder's lock is free."""
        with contextlib.ExitStack() as held:
            with named_errors(self.root):
                held.enter_context(locked(self.root / "locks" / key))
            yield

    def _object(self, digest: str) -> Path:
        return self.root / "objects" / digest[:2] / digest

    def _action(self, key: str) -> Path:
        return self.root / "actions" / key[:2] / f"{key}.json"


def _warn(error: StoreError) -> None:
    warnings.warn(f"{str(error).split(';')[0]}; computing it again", stacklevel=4)


_current: ContextVar[Store | None] = ContextVar("cohort_store", default=None)


def current_store() -> Store:
    """The store that stages use here.

    Raises:
        StoreError: none was chosen.
    """
    store = _current.get()
    if store is None:
        raise StoreError("no store is open; wrap the call in `with use_store(Store(folder)):`")
    return store


@contextlib.contextmanager
def use_store(store: Store) -> Iterator[Store]:
    """Make `store` the one that stages use inside the block."""
    token = _current.set(store)
    try:
        yield store
    finally:
        _current.reset(token)
