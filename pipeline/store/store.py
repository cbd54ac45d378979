"""Where artifacts live: two small content-addressed stores under one root, as in Bazel.

* `objects/`: digest -> sealed folder (payload files and `manifest.json`), read-only once published;
* `actions/`: key of a stage call -> record with the digest of its result, its metrics and its provenance;
* `own/`: key -> digest, of those calls carried out here whose result brings code that runs.

Commit order: draft folder on the same file system -> files fsynced -> manifest -> folder fsynced -> rename -> parent
fsynced -> action record last. A crash at any instant leaves no half artifact: what was not renamed is a draft. Equal content
has one name, so two writers of one content end in one folder. Files are read-only, folders not: `rm -r` must work.

Readers go through `path(digest)`, which hands out a verified local folder; where the folder is the cache of a remote store
(`pipeline/remote/cache.py`), what it lacks is fetched and what it gains is uploaded.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.remote.alone import Alone
from pipeline.remote.cache import mirror_of
from pipeline.remote.store import Upstream
from pipeline.store.actions import Actions
from pipeline.store.current import current_store, use_store
from pipeline.store.drafts import draft_folder, sweep
from pipeline.store.files import (
    DamagedArtifactError,
    MissingArtifactError,
    PrunedArtifactError,
    StoreError,
    canonical_json,
    named_errors,
    sha256_of,
)
from pipeline.store.objects import freed_files, read_manifest, seal_folder
from pipeline.store.pins import Leases
from pipeline.store.shelf import Shelf

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


class Store:
    """A content-addressed store in a local folder; one that cannot be written can still be opened and read."""

    def __init__(
        self, root: Path | str, upstream: Upstream | str | None = None, *, cache_gib: float | None = None
    ) -> None:
        """Open a store in a local folder.

        Args:
            upstream: a remote store, or its URL, of which the folder is then the cache. A folder that is one already stays it.
            cache_gib: the cache's largest size; None: the environment's COHORT_STORE_CACHE_GIB, or no limit.

        Raises:
            ConfigError: the URL cannot be one of a store, or its file system's package is not installed.
        """
        self.root = Path(root).resolve()
        self._actions, self._shelf = Actions(self.root), Shelf(self.root)
        self.leases = Leases(self.root)
        """What live runs hold; that of the run which uses this store is open."""
        self.trusted: set[str] = set()
        """Digests of code that the running configuration pins; where they come from and what they are is for stages to know."""
        self._mirror = mirror_of(self.root, upstream, cache_gib, holding=lambda: self.leases.lacks(""))
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
                self.hold(digest)
                self._mirror.owe("object", digest)
                self._shelf.place(draft, digest)
        return digest

    def adopt(self, folder: Path) -> bool:
        """Take in an object of another store, which the caller has verified, in a folder on this file system.

        Returns:
            Whether it was taken: not where as much of it, or more, is here.
        """
        digest, freed = folder.name, freed_files(folder, read_manifest(folder)["files"])
        self.hold(digest)
        if self._has_but(digest, freed):
            return False
        self._mirror.owe("object", digest)
        with named_errors(self.root):
            self._shelf.place(folder, digest)
        if freed:
            self._shelf.is_sound(digest)  # not as whole as `place` takes its drafts to be
        return True

    def _has_but(self, digest: str, freed: Collection[str]) -> bool:
        """Whether an object is here in a sound state and lacks no other files than these."""
        try:
            with contextlib.suppress(PrunedArtifactError):
                self._shelf.verify(digest)
        except (MissingArtifactError, DamagedArtifactError):
            return False
        return self.freed(digest).issubset(freed)

    def path(self, digest: str) -> Path:
        """The verified folder of an object, for reading only.

        Hashes are computed once per process, and again when size, time or inode of a file changed since.

        Raises:
            MissingArtifactError, DamagedArtifactError, PrunedArtifactError: with the file and what to do.
        """
        self.hold(digest)
        with named_errors(self.root):
            try:
                self._shelf.check(digest)
            except (MissingArtifactError, DamagedArtifactError, PrunedArtifactError):
                if not self._fetch(digest):
                    raise
                self._shelf.check(digest)
        self._mirror.handed(digest, self._shelf.folder(digest))
        return self._shelf.folder(digest)

    def _fetch(self, digest: str) -> bool:
        """Bring an object into the cache; whether upstream has it."""
        if isinstance(self._mirror, Alone):
            return False
        with self._shelf.guard(f"fetch-{digest}"), draft_folder(self.root) as draft:
            if not self._shelf.is_sound(digest):  # another process may have fetched it meanwhile
                if not self._mirror.pull(digest, draft / digest):
                    return False
                self._shelf.place(draft / digest, digest)
        return True

    def hold(self, digest: str) -> None:
        """Let nobody else free an object while the lease of this store is open; before it is looked for, not after."""
        if self.leases.lacks(digest):
            with self._shelf.guard(digest):
                self.leases.take(digest)

    def folder(self, digest: str) -> Path:
        """Where an object lies, if it is there; unlike `path`, for looking at file sizes only."""
        return self._shelf.folder(digest)

    def manifest(self, digest: str) -> dict[str, Any]:
        """What the store knows of an object: files, schema, rows, type and provenance of its first producer."""
        with named_errors(self.root):
            return read_manifest(self._about(digest))

    def _about(self, digest: str) -> Path:
        """The folder that holds an object's manifest: it may be in the cache without the payload."""
        folder = self._shelf.folder(digest)
        return folder if folder.exists() else self._mirror.about(digest)

    def verify(self, digest: str) -> None:
        """Check every file of an object now, whatever was verified before; raises as `path` does.

        Of an object that is not in the cache, presence and sizes upstream.
        """
        if self._shelf.folder(digest).exists() or not self._mirror.holds(digest):
            self._shelf.verify(digest)

    def quarantine(self, digest: str) -> Path | None:
        """Move a damaged object out of `objects/`, so that its stage computes it again; where to, None if it is sound."""
        with named_errors(self.root), self._shelf.guard(digest):
            # Another process may have mended it while this one waited.
            return None if self._shelf.is_sound(digest) else self._shelf.move_aside(digest)

    def prune(self, digest: str, files: Collection[str] | None = None) -> int:
        """Free the payload of an object, keep its manifest; returns the bytes freed.

        Args:
            files: names of the files to free; None: all. The rest can be read as before.

        Raises:
            LeasedArtifactError: another run, which is alive, may need it.
        """
        with named_errors(self.root), self._shelf.guard(digest):
            self._mirror.outline(digest, self._shelf.folder(digest))
            count = self._shelf.free(digest, files, allow=self._refuse)
            return self._mirror.prune(self._shelf.folder(digest)) or count

    def _refuse(self, digest: str) -> None:
        self.leases.refuse(digest)
        self._mirror.refuse(digest)

    def freed(self, digest: str) -> frozenset[str]:
        """Names of the files that `prune` freed."""
        with named_errors(self.root):
            return freed_files(self._about(digest), self.manifest(digest)["files"])

    def digests(self) -> Iterator[str]:
        """Digests of all objects, pruned ones included."""
        return iter(sorted({*self._shelf.digests(), *self._mirror.digests()}))

    def resolve(self, prefix: str) -> str:
        """The one digest that starts with `prefix`."""
        found = [digest for digest in self.digests() if digest.startswith(prefix)]
        if len(found) != 1:
            raise MissingArtifactError(f"{prefix!r} names {len(found)} artifacts in {self.root}; expected exactly one")
        return found[0]

    def find(self, key: str, *, own: bool = False) -> dict[str, Any] | None:
        """The record of a stage call whose result is present and sound (or pruned); None means: compute it.

        Args:
            own: find only what `sign` says was computed in this folder, and not what others may have made up.
        """
        self._mirror.settle()
        try:
            record = self.action(key)
        except MissingArtifactError:
            return None
        except DamagedArtifactError as error:
            _warn(error)
            self._actions.remove(key)
            return None
        if own and self._actions.signed(key) != record["result"]:
            return None
        try:
            self._look_for(record["result"])
        except PrunedArtifactError:
            return record
        except (MissingArtifactError, DamagedArtifactError) as error:
            _warn(error)
            self.quarantine(record["result"])
            return None
        return record

    def sign(self, key: str, digest: str) -> None:
        """Note that a call was carried out in this folder, and what it came to; the note never leaves the folder."""
        self._actions.sign(key, digest)

    def _look_for(self, digest: str) -> None:
        """Raise unless an object is here and sound, or upstream: what nobody reads is not fetched."""
        self.hold(digest)
        try:
            with named_errors(self.root):
                self._shelf.check(digest)
        except (MissingArtifactError, DamagedArtifactError):
            if not self._mirror.holds(digest):
                raise

    def record(self, key: str, record: Mapping[str, Any]) -> None:
        """Write the record of a stage call: the last step of a commit, after which the call is a hit."""
        self._mirror.owe("action", key)
        self._actions.write(key, record)
        self._mirror.flush()

    def action(self, key: str) -> dict[str, Any]:
        """The record of a stage call by its key.

        Raises:
            MissingArtifactError: there is none, or it was forgotten.
            DamagedArtifactError: its file was altered, or is that of another call.
        """
        if not self._actions.path(key).exists():
            self._mirror.fetch_record(key)
        return self._actions.read(key)

    def forget(self, *digests: str) -> int:
        """Remove the records of all calls that led to objects, so that they compute again; returns how many."""
        keys = [record["key"] for record in self.actions() if record["result"] in digests]
        for key in keys:
            self._actions.remove(key)
        self._mirror.forget(keys)
        return len(keys)

    def actions(self) -> Iterator[dict[str, Any]]:
        """All readable action records, oldest first."""
        self._mirror.fetch_records()
        return self._actions.all()

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold a key while computing it: two launchers never compute one key at once; a dead holder's lock is free."""
        with self._shelf.guard(key), self._mirror.lock(key):
            yield


def _warn(error: StoreError) -> None:
    warnings.warn(f"{str(error).split(';')[0]}; computing it again", stacklevel=4)
