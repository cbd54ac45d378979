"""A local store as the cache of a remote one: missing objects are fetched, new ones are uploaded.

Whatever is made here is first noted as to be uploaded (an empty file under `pending/`) and then made; the note is removed when
the upload is confirmed. A run that is cut off, or whose credentials expire, loses nothing: the next one uploads. The folder
remembers in `upstream.json` which store it is a cache of, and serves no other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.progress import report
from pipeline.remote.folder import BINDING, GRACE, Binding, Pending, bind, bound_to, evict
from pipeline.remote.store import RemoteStore
from pipeline.store.actions import Actions
from pipeline.store.files import DamagedArtifactError, MissingArtifactError, StoreError, draft_folder, named_errors
from pipeline.store.folder import MANIFEST
from pipeline.store.locks import locked


class LocalOnly:
    """The cache of no remote store: nothing to fetch, nowhere to upload. The docstrings are those of `RemoteCache`."""

    remote: RemoteStore | None = None

    def __init__(self, root: Path) -> None:
        self._root = root

    def owe(self, kind: str, name: str) -> None: ...
    def flush(self) -> None: ...
    def settle(self) -> None: ...
    def place_manifest(self, digest: str, folder: Path) -> None: ...
    def require_unpinned(self, digest: str) -> None: ...
    def fetch_record(self, key: str) -> None: ...
    def fetch_records(self) -> None: ...
    def forget(self, keys: list[str]) -> None: ...
    def used(self, digest: str, folder: Path) -> None: ...

    def pull(self, digest: str, into: Path) -> bool:
        return False

    def has(self, digest: str) -> bool:
        return False

    def manifest(self, digest: str) -> Path:
        raise MissingArtifactError(f"no artifact {digest} in {self._root}; run the command that made it again")

    def prune(self, folder: Path) -> int:
        return 0

    def digests(self) -> list[str]:
        return []

    def lock(self, key: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class RemoteCache:
    """What keeps one local folder in step with one remote store, which receives no request before it is needed."""

    def __init__(
        self,
        root: Path,
        remote: RemoteStore | str,
        *,
        limit: float | None = None,
        grace: float = GRACE,
        pinning: Callable[[], bool] = lambda: False,
    ) -> None:
        """Take a folder and its remote store or the URL of one.

        Args:
            limit: the cache's largest size in bytes; None: no limit.
            grace: seconds, as in `evict`.
            pinning: whether a run is under way in this process, so that others must not free what it looks up.
        """
        self.remote = remote if isinstance(remote, RemoteStore) else RemoteStore(remote)
        self._root, self._limit, self._grace, self._pinning = root, limit, grace, pinning
        self._actions, self._pending = Actions(root), Pending(root)
        self._bound = self._settled = False
        self._grown: float | None = None
        self._known: set[str] = set()
        self._locks, self._used, self._guard = 0, set[str](), threading.Lock()

    # -------------------------------------------------------------------------------------------- which remote store

    def _open(self) -> RemoteStore:
        """Return the remote store; raise StoreError where the folder is the cache of another one."""
        if not self._bound:
            with named_errors(self._root), locked(self._root / "locks" / BINDING):
                self._bind()
            self._bound = True
        return self.remote

    def _bind(self) -> None:
        note = bound_to(self._root)
        found = self.remote.identity(create=note is None)
        if note is not None and note.id != found:
            what = f"store {found[:12]}" if found else "no store yet"
            raise StoreError(
                f"{self._root} is the cache of the store {note.id[:12]} at {note.url}; at {self.remote.url} there is {what}. "
                f"Two stores are not mixed: correct COHORT_STORE, choose another --root, or remove {self._root / BINDING} to "
                f"upload what lies here to {self.remote.url}"
            )
        assert found is not None
        if note is None:
            self._owe_all()
        if note != (found, self.remote.url):
            bind(self._root, Binding(found, self.remote.url))

    def _owe_all(self) -> None:
        """Note all that a folder held before it became a cache as to be uploaded."""
        owed = self._pending.names()  # by this process, just now
        digests = [path.name for path in (self._root / "objects").glob("*/*") if path.name not in owed]
        keys = sorted(set(self._actions.keys()) - owed)
        for kind, names in (("object", digests), ("action", keys)):
            for name in names:
                self.owe(kind, name)
        if digests or keys:
            warnings.warn(
                f"{self._root} held {len(digests)} artifacts and {len(keys)} records; they are uploaded to "
                f"{self.remote.url} now",
                stacklevel=2,
            )

    # -------------------------------------------------------------------------------------------- uploads

    def owe(self, kind: str, name: str) -> None:
        """Note, durably, that an `object` or `action` must be uploaded; call it before it is made."""
        self._pending.add(kind, name)

    def flush(self) -> None:
        """Upload all that is noted, by whichever process; raise StoreError where that fails, and keep the note."""
        if not self._pending.notes():
            return
        remote = self._open()  # which may add notes
        notes = self._pending.notes()
        for number, (note, kind, name) in enumerate(notes, 1):
            with named_errors(self._root), locked(self._root / "locks" / f"upload-{name}"):
                if note.exists():
                    self._upload(remote, kind, name)
                    note.unlink(missing_ok=True)
            report("upstream", uploaded=number, total=len(notes))
        self.evict()

    def _upload(self, remote: RemoteStore, kind: str, name: str) -> None:
        # What is gone or damaged here is made again, and noted again.
        with contextlib.suppress(MissingArtifactError, DamagedArtifactError):
            if kind == "object":
                remote.push(self._root / "objects" / name[:2] / name)
            elif self._actions.read(name):
                remote.put_record(name, self._actions.path(name).read_bytes())

    def settle(self) -> None:
        """Upload once in a process what earlier ones could not; a failure is a warning, since reading needs no upload."""
        if not self._settled:
            self._settled = True
            try:
                self.flush()
            except StoreError as error:
                warnings.warn(f"not uploaded yet: {error}", stacklevel=3)

    # -------------------------------------------------------------------------------------------- fetching

    def pull(self, digest: str, into: Path) -> bool:
        """Fetch an object, verified, into a folder named by its digest; return False if the remote store has none.

        Raise DamagedArtifactError where it is damaged there too; it is removed then.
        """
        self._pin(digest)
        try:
            self._open().pull(digest, into)
        except MissingArtifactError:
            return False
        except DamagedArtifactError:
            self._withdraw(digest)
            raise
        if self._grown is not None:
            self._grown += sum(path.stat().st_size for path in into.rglob("*") if path.is_file())
        return True

    def has(self, digest: str) -> bool:
        """Return whether the remote store has an object, every file in its size; hashes are compared when it is fetched."""
        if digest not in self._known:
            self._pin(digest)
            try:
                self.manifest(digest, fresh=True)
            except MissingArtifactError:
                return False
            except DamagedArtifactError as error:
                warnings.warn(f"{str(error).split(';')[0]}; computing it again", stacklevel=4)
                self._withdraw(digest)
                return False
            self._known.add(digest)
        return True

    def manifest(self, digest: str, *, fresh: bool = False) -> Path:
        """Return a folder with the manifest of a remote object, without its payload.

        Args:
            fresh: fetch it even if it was fetched before.

        Raises:
            MissingArtifactError, DamagedArtifactError: as `RemoteStore.manifest`.
        """
        folder = self._root / "manifests" / digest
        if fresh or not (folder / MANIFEST).exists():
            remote = self._open()
            with named_errors(self._root), draft_folder(self._root) as draft:
                remote.manifest(digest, draft / digest)
                folder.mkdir(parents=True, exist_ok=True)
                for path in (draft / digest).iterdir():
                    os.replace(path, folder / path.name)
        return folder

    def _pin(self, digest: str) -> None:
        if self._pinning() and digest not in self._known:
            self._open().pin(digest)

    def _withdraw(self, digest: str) -> None:
        self._known.discard(digest)
        self._open().withdraw(digest)

    def fetch_record(self, key: str) -> None:
        """Fetch the record of a call into the local ones, if there is one."""
        sealed = self._open().record(key)
        if sealed is not None:
            self._actions.put(key, sealed)

    def fetch_records(self) -> None:
        """Fetch all records that are not here."""
        remote = self._open()
        lacking = sorted(set(remote.keys()) - set(self._actions.keys()))
        for key, sealed in remote.records(lacking).items() if lacking else ():
            self._actions.put(key, sealed)

    def digests(self) -> list[str]:
        """Return the digests of all remote objects."""
        return self._open().digests()

    # -------------------------------------------------------------------------------------------- removing

    def place_manifest(self, digest: str, folder: Path) -> None:
        """Put the manifest of an object that is not here into place, so that its payload can be noted as freed."""
        if folder.exists():
            return
        fetched = self.manifest(digest, fresh=True)
        with draft_folder(self._root) as draft:
            shutil.copytree(fetched, draft / digest)
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.rename(draft / digest, folder)

    def require_unpinned(self, digest: str) -> None:
        """Raise PinnedArtifactError where a live run on another machine may need an object."""
        self._open().require_unpinned(digest)

    def prune(self, folder: Path) -> int:
        """Free in the remote store what was freed of a local object; return the bytes."""
        self._known.discard(folder.name)
        return self._open().prune(folder)

    def forget(self, keys: list[str]) -> None:
        """Remove remote records."""
        self._open().forget(keys)

    # -------------------------------------------------------------------------------------------- locks, size

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold a key among all machines; objects that this process uses meanwhile stay in the cache."""
        with self._open().lock(key):
            with self._guard:
                self._locks += 1
            try:
                yield
            finally:
                with self._guard:
                    self._locks -= 1
                    if not self._locks:
                        self._used.clear()

    def used(self, digest: str, folder: Path) -> None:
        """Note that a caller was given the path of an object; the cache may shrink, but not by this one."""
        if self._locks:
            self._used.add(digest)
        with contextlib.suppress(OSError):
            os.utime(folder)
        self.evict(digest)

    def evict(self, sparing: str = "") -> None:
        """Bring the cache to its size, if it has one and grew by a twentieth of it since the last look."""
        if self._limit is None or (self._grown is not None and self._grown < self._limit / 20):
            return
        self._grown = 0.0

        def keep(name: str) -> bool:
            return name == sparing or name in self._used or self._pending.has_object(name)

        freed = evict(self._root, self._limit, keep=keep, grace=self._grace)
        if freed:
            report("upstream", evicted=freed)


def open_cache(
    root: Path, remote: RemoteStore | str | None, cache_gib: float | None, pinning: Callable[[], bool]
) -> RemoteCache | LocalOnly:
    """Return the cache of the remote store that is given, or else of the one that the folder is bound to.

    Raises:
        ConfigError: COHORT_STORE_CACHE_GIB is no number, or the URL cannot be one of a store.
        StoreError: the note of which store the folder is a cache of was altered.
    """
    note = bound_to(root)
    if remote is None and note is None:
        return LocalOnly(root)
    text = os.environ.get("COHORT_STORE_CACHE_GIB")
    try:
        size = cache_gib if cache_gib is not None else float(text) if text else None
    except ValueError:
        raise ConfigError(f"COHORT_STORE_CACHE_GIB: expected a number of GiB, found {text!r}") from None
    limit = None if size is None else size * 2**30
    return RemoteCache(root, remote or (note.url if note else ""), limit=limit, pinning=pinning)
