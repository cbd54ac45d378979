"""The store of artifacts: two small content-addressed stores under one root, as in Bazel.

* `objects/`: name -> sealed folder (payload files and `manifest.json`), read-only once published. Data is named by its content
  digest, trained state by the key of the call that made it;
* `actions/`: key of a stage call -> record with the digest of its result, its metrics and its provenance;
* `own/`: key -> digest, of calls executed here whose result brings code that runs.

Commit order: draft folder on the same file system -> files fsynced -> manifest -> folder fsynced -> rename -> parent
fsynced -> action record last. A crash at any instant leaves no half artifact: what was not renamed is a draft. Equal data
has one name, so two writers of one content end in one folder. Files are read-only, folders not: `rm -r` must work.

Readers call `path(digest)`, which returns a verified local folder. Where the folder is the cache of a remote store
(`pipeline/remote/cache.py`), missing objects are fetched and new ones are uploaded.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.remote.cache import open_cache
from pipeline.remote.store import RemoteStore
from pipeline.store.actions import Actions
from pipeline.store.files import (
    DamagedArtifactError,
    MissingArtifactError,
    PrunedArtifactError,
    StoreError,
    draft_folder,
    named_errors,
    sweep,
)
from pipeline.store.folder import freed_files, read_manifest, seal_folder
from pipeline.store.objects import Objects
from pipeline.store.pins import Pins


class Store:
    """A content-addressed store in a local folder; one that cannot be written can still be opened and read."""

    def __init__(
        self, root: Path | str, remote: RemoteStore | str | None = None, *, cache_gib: float | None = None
    ) -> None:
        """Open a store in a local folder.

        Args:
            remote: a remote store, or its URL, of which the folder is the cache. A folder that is a cache already stays one.
            cache_gib: the cache's largest size; None: the environment's COHORT_STORE_CACHE_GIB, or no limit.

        Raises:
            ConfigError: the URL cannot be one of a store, or its file system's package is not installed.
        """
        self.root = Path(root).resolve()
        self._actions, self._objects = Actions(self.root), Objects(self.root)
        self.pins = Pins(self.root)
        """The objects that live runs need; the pins of the run that uses this store are open."""
        self.replay: Callable[[str], bool] | None = None
        """Makes trained state whole again by its name, where it can; None: what is freed stays so."""
        self.trusted: set[str] = set()
        """Digests of code that the running configuration pins; what they mean is up to stages."""
        self._cache = open_cache(self.root, remote, cache_gib, pinning=lambda: self.pins.lacks(""))
        with contextlib.suppress(OSError):
            for name in ("objects", "actions", "drafts", "locks"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            sweep(self.root)

    # -------------------------------------------------------------------------------------------- objects

    def publish(
        self,
        fill: Callable[[Path], None],
        *,
        about: Mapping[str, Any],
        schema: str | None = None,
        name: str | None = None,
        remedy: str = "",
    ) -> str:
        """Seal the files that `fill` writes into an empty folder, and return their content digest.

        The digest covers names, sizes and hashes of the payload and `schema`. `about` (type, rows, provenance) is kept in the
        manifest only: equal content has one name.

        Args:
            name: key of the call in `about["provenance"]`, under which trained state is placed; None: the content digest. An
                object of that name that is here, sound and whole stays, with a warning where its content differs.
            remedy: what would give equal content, for the warning.

        Raises:
            StoreError: the disk is full, read-only or failing; no artifact is visible then.
        """
        with draft_folder(self.root) as draft:
            try:
                fill(draft)
            except OSError as error:
                # Errors of files that `fill` reads elsewhere pass unchanged.
                inside = error.filename is None or str(error.filename).startswith(str(draft))
                if not (error.errno and inside):
                    raise
                with named_errors(self.root):
                    raise
            with named_errors(self.root):
                digest = seal_folder(draft, about, schema)
                known = None if name is None or about.get("unwritten") else self._known_content(name)
                self._place(draft, name or digest, partial=bool(about.get("unwritten")))
        if known not in (None, digest):
            warnings.warn(
                f"{name} was made again with other content, {digest[:12]} in place of {known}: what was made from it is from "
                f"the earlier one ({remedy or 'deterministic arithmetic would have given equal bits'})",
                stacklevel=3,
            )
        return digest

    def _known_content(self, name: str) -> str | None:
        """Return the content digest that trained state was made with before, as far as this folder knows."""
        with contextlib.suppress(MissingArtifactError, DamagedArtifactError):
            return self._objects.content(name) or self._actions.read(name).get("content")
        return None

    def adopt(self, folder: Path) -> bool:
        """Take an object of another store, verified by the caller, from a folder on this file system.

        Returns:
            Whether it was taken: not where as much of it, or more, is here.
        """
        digest, freed = folder.name, freed_files(folder)
        self.pin(digest)
        if self._objects.has_but(digest, freed):
            return False
        with named_errors(self.root):
            self._place(folder, digest, partial=bool(read_manifest(folder).get("unwritten")))
        if freed:
            self._objects.is_sound(digest)  # `place` takes its drafts to be whole
        return True

    def _place(self, draft: Path, digest: str, *, partial: bool) -> None:
        self.pin(digest)
        if not partial:  # a remote store gets what was written
            self._cache.owe("object", digest)
        self._objects.place(draft, digest, partial=partial)

    def path(self, digest: str, *, replay: bool = True, partial: bool = False) -> Path:
        """Return the verified folder of an object, for reading only.

        Hashes are computed once per process, and again when size, time or inode of a file changed since.

        Args:
            replay: make trained state again that is not there, where this store does that.
            partial: the files that trained state always has are enough.

        Raises:
            MissingArtifactError, DamagedArtifactError, PrunedArtifactError: with the file and what to do.
        """
        self.pin(digest)
        try:
            self._check(digest, partial=partial)
        except (MissingArtifactError, DamagedArtifactError, PrunedArtifactError):
            if not (replay and self.make_whole(digest)):
                raise
            self._check(digest)
        self._cache.used(digest, self.folder(digest))
        return self.folder(digest)

    def _check(self, digest: str, *, partial: bool = False) -> None:
        """Verify an object, fetched if need be; raise as `path` does."""
        with named_errors(self.root):
            try:
                self._objects.check(digest, partial=partial)
            except (MissingArtifactError, DamagedArtifactError, PrunedArtifactError):
                if not self._fetch(digest):
                    raise
                self._objects.check(digest)

    def make_whole(self, digest: str) -> bool:
        """Make trained state again of which files are missing (`replay`); return whether that can be done."""
        return self.replay is not None and self.replay(digest)

    def is_whole(self, digest: str) -> bool:
        """Return whether an object is here, sound and with all its files, or in the remote store."""
        with contextlib.suppress(MissingArtifactError, DamagedArtifactError, PrunedArtifactError):
            self._require(digest)
            return not self.freed(digest)
        return False

    def is_written(self, digest: str) -> bool:
        """Return whether all files of an object that is here were written; they may have been freed since."""
        return self._objects.content(digest) is not None

    def _fetch(self, digest: str) -> bool:
        """Bring an object into the cache; return whether the remote store has it."""
        if not self._cache.remote:
            return False
        with self._objects.lock(f"fetch-{digest}"), draft_folder(self.root) as draft:
            if not self._objects.is_sound(digest, whole=True):  # another process may have fetched it meanwhile
                if not self._cache.pull(digest, draft / digest):
                    return False
                self._objects.place(draft / digest, digest)
        return True

    def pin(self, digest: str) -> None:
        """Keep others from freeing an object while the pins of this store are open; call it before looking for the object."""
        if self.pins.lacks(digest):
            with self._objects.lock(digest):
                self.pins.add(digest)

    def folder(self, digest: str) -> Path:
        """Return where an object lies, if it is there; to look at file sizes only. Read through `path`."""
        return self._objects.folder(digest)

    def manifest(self, digest: str) -> dict[str, Any]:
        """Return files, schema, rows, type and provenance of the first producer of an object."""
        with named_errors(self.root):
            return read_manifest(self._manifest_folder(digest))

    def _manifest_folder(self, digest: str) -> Path:
        """Return the folder with an object's manifest, which the cache may have without the payload."""
        folder = self.folder(digest)
        return folder if folder.exists() else self._cache.manifest(digest)

    def verify(self, digest: str) -> None:
        """Check every file of an object now, whatever was verified before; raise as `path` does.

        Of an object that is not in the cache, check presence and sizes in the remote store.
        """
        if self.folder(digest).exists() or not self._cache.has(digest):
            self._objects.verify(digest)

    def quarantine(self, digest: str) -> Path | None:
        """Move a damaged object out of `objects/`, so that its stage computes it again; where to, None if it is sound."""
        with named_errors(self.root), self._objects.lock(digest):
            # Another process may have recomputed it while this one waited.
            return None if self._objects.is_sound(digest) else self._objects.quarantine(digest)

    def prune(self, digest: str, files: Collection[str] | None = None) -> int:
        """Free the payload of an object, keep its manifest; return the bytes freed.

        Args:
            files: names of the files to free; None: all. The rest can be read as before.

        Raises:
            PinnedArtifactError: another run, which is alive, may need it.
        """

        def require_unpinned(digest: str) -> None:
            self.pins.require_unpinned(digest)
            self._cache.require_unpinned(digest)

        with named_errors(self.root), self._objects.lock(digest):
            self._cache.place_manifest(digest, self.folder(digest))
            count = self._objects.free(digest, files, require=require_unpinned)
            return self._cache.prune(self.folder(digest)) or count

    def freed(self, digest: str) -> frozenset[str]:
        """Return the names of the files that `prune` freed."""
        with named_errors(self.root):
            return freed_files(self._manifest_folder(digest))

    def digests(self) -> list[str]:
        """Return the digests of all objects, pruned ones included."""
        return sorted({*self._objects.digests(), *self._cache.digests()})

    def resolve(self, prefix: str) -> str:
        """Return the one name that starts with `prefix`, of an object or of trained state that can be made again."""
        found = [name for name in self.digests() if name.startswith(prefix)] or self._actions.replayable(prefix)
        if len(found) != 1:
            raise MissingArtifactError(f"{prefix!r} names {len(found)} artifacts in {self.root}; expected exactly one")
        return found[0]

    # -------------------------------------------------------------------------------------------- records of calls

    def find(self, key: str, *, own: bool = False) -> dict[str, Any] | None:
        """Return the record of a call whose result is sound, pruned, or missing and replayed; None: it must be computed.

        With `own` only calls that `sign` marked as executed in this folder, since others may forge records.
        """
        self._cache.settle()
        try:
            record = self.action(key)
        except MissingArtifactError:
            return None
        except DamagedArtifactError as error:
            _warn(error)
            self._actions.remove(key)
            return None
        digest = record["result"]
        if own and self._actions.signed(key) != digest:
            return None
        try:
            self._require(digest)
        except PrunedArtifactError:
            return record
        except (MissingArtifactError, DamagedArtifactError) as error:
            if isinstance(error, MissingArtifactError) and self.replay is not None and record.get("replay"):
                return record
            _warn(error)
            self.quarantine(digest)
            return None
        return record

    def _require(self, digest: str) -> None:
        """Raise unless an object is here and sound, or in the remote store: it is fetched when it is read."""
        self.pin(digest)
        try:
            with named_errors(self.root):
                self._objects.check(digest)
        except (MissingArtifactError, DamagedArtifactError):
            if not self._cache.has(digest):
                raise

    def sign(self, key: str, digest: str) -> None:
        """Note that a call was executed in this folder, and its result; the note never leaves the folder."""
        self._actions.sign(key, digest)

    def record(self, key: str, record: Mapping[str, Any]) -> None:
        """Write the record of a stage call: the last step of a commit, after which the call is a hit."""
        self._cache.owe("action", key)
        self._actions.write(key, record)
        self._cache.flush()

    def action(self, key: str) -> dict[str, Any]:
        """Return the record of a stage call; raise MissingArtifactError or DamagedArtifactError as `Actions.read`."""
        if not self._actions.path(key).exists():
            self._cache.fetch_record(key)
        return self._actions.read(key)

    def forget(self, *digests: str) -> int:
        """Remove the records of all calls that led to objects, so that they compute again; return how many."""
        keys = [record["key"] for record in self.actions() if record["result"] in digests]
        for key in keys:
            self._actions.remove(key)
        self._cache.forget(keys)
        return len(keys)

    def actions(self) -> list[dict[str, Any]]:
        """Return all readable action records, oldest first."""
        self._cache.fetch_records()
        return self._actions.all()

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold a key while computing it: two processes never compute one key at once; a dead holder's lock is free."""
        # Trained state is placed under the name of its call, with the lock of that name.
        with self._objects.lock(f"call-{key}"), self._cache.lock(key):
            yield


def _warn(error: StoreError) -> None:
    warnings.warn(f"{str(error).split(';')[0]}; computing it again", stacklevel=4)
