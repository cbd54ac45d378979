"""A local store as the cache of a remote one: what it lacks is fetched, what it gains is uploaded.

Whatever is made here is first noted as owed to upstream (an empty file under `pending/`) and then made; the note goes when the
upload is confirmed. So a run that is cut off, or whose credentials expire, loses nothing: the next one uploads. The folder
remembers in `upstream.json` which store it is a cache of, and serves no other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.progress import report
from pipeline.remote.alone import Alone
from pipeline.remote.binding import BINDING, bind, bound_to
from pipeline.remote.eviction import GRACE, evict
from pipeline.remote.store import Upstream
from pipeline.store.actions import Actions
from pipeline.store.drafts import draft_folder
from pipeline.store.files import DamagedArtifactError, MissingArtifactError, StoreError, fsync, named_errors
from pipeline.store.locks import locked
from pipeline.store.objects import MANIFEST

__all__ = ["Mirror", "mirror_of"]


class Mirror:
    """What keeps one local folder in step with one remote store. Nothing is asked of that before it is needed."""

    def __init__(
        self, root: Path, upstream: Upstream | str, *, limit: float | None = None, grace: float = GRACE
    ) -> None:
        """Take the folder, the remote store or its URL, the cache's largest size in bytes, and `evict`'s grace in seconds."""
        self.holding: Callable[[], bool] = lambda: False
        """Whether a run is under way in this process, so that others must not free what it looks up."""
        self.upstream = upstream if isinstance(upstream, Upstream) else Upstream(upstream)
        self._root, self._limit, self._grace = root, limit, grace
        self._actions = Actions(root)
        self._bound = self._settled = False
        self._grown: float | None = None
        self._known: set[str] = set()
        self._locks, self._handed, self._guard = 0, set[str](), threading.Lock()

    # -------------------------------------------------------------------------------------------- which store

    def open(self) -> Upstream:
        """The remote store, once it is known to be the one that this folder is a cache of.

        Raises:
            StoreError: it is another one.
        """
        if not self._bound:
            with named_errors(self._root), locked(self._root / "locks" / BINDING):
                bind(self._root, self.upstream, self._adopt)
            self._bound = True
        return self.upstream

    def _adopt(self) -> None:
        """Owe upstream all that a folder held before it became a cache."""
        owed = {path.name.split(".")[0] for path in (self._root / "pending").glob("*")}  # by this process, just now
        digests = [path.name for path in (self._root / "objects").glob("*/*") if path.name not in owed]
        keys = sorted(set(self._actions.keys()) - owed)
        for kind, names in (("object", digests), ("action", keys)):
            for name in names:
                self.owe(kind, name)
        if digests or keys:
            warnings.warn(
                f"{self._root} held {len(digests)} artifacts and {len(keys)} records; they are uploaded to "
                f"{self.upstream.url} now",
                stacklevel=2,
            )

    # -------------------------------------------------------------------------------------------- uploads

    def owe(self, kind: str, name: str) -> None:
        """Note, durably, that an `object` or `action` must go up; before it is made."""
        folder = self._root / "pending"
        with named_errors(self._root):
            folder.mkdir(exist_ok=True)
            # Unlike all others, so that whoever uploads an earlier state does not strike out what was owed since.
            (folder / f"{name}.{kind}.{uuid.uuid4().hex[:8]}").touch()
            fsync(folder)

    def owes(self, digest: str) -> bool:
        """Whether an object is here and not known to be upstream."""
        return any((self._root / "pending").glob(f"{digest}.object.*"))

    def flush(self) -> None:
        """Upload all that is owed, by whichever process: objects first, then records.

        Raises:
            StoreError: says what is wrong; what was not uploaded stays owed.
        """
        pending = self._root / "pending"
        if not any(pending.glob("*.*")):
            return
        upstream = self.open()  # which may find more to owe
        waiting = sorted(pending.glob("*.*"), key=lambda path: ".object." not in path.name)
        for number, path in enumerate(waiting, 1):
            name, kind, _ = path.name.split(".")
            with named_errors(self._root), locked(self._root / "locks" / f"upload-{name}"):
                if path.exists():
                    self._upload(upstream, name, kind)
                    path.unlink(missing_ok=True)
            report("upstream", uploaded=number, total=len(waiting))
        self.evict()

    def _upload(self, upstream: Upstream, name: str, kind: str) -> None:
        # What is gone or damaged here is made again, and owed again.
        with contextlib.suppress(MissingArtifactError, DamagedArtifactError):
            if kind == "object":
                upstream.push(self._root / "objects" / name[:2] / name)
            elif self._actions.read(name):
                upstream.put_record(name, self._actions.path(name).read_bytes())

    def settle(self) -> None:
        """Upload once in a process what earlier ones could not; a failure is told, and hinders nobody from reading."""
        if not self._settled:
            self._settled = True
            try:
                self.flush()
            except StoreError as error:
                warnings.warn(f"not uploaded yet: {error}", stacklevel=3)

    # -------------------------------------------------------------------------------------------- fetching

    def pull(self, digest: str, into: Path) -> bool:
        """Fetch an object, verified, into a folder named by its digest; False if upstream has none.

        Raises:
            DamagedArtifactError: it is damaged upstream too, from where it was removed.
        """
        self._hold(digest)
        try:
            self.open().pull(digest, into)
        except MissingArtifactError:
            return False
        except DamagedArtifactError:
            self._withdraw(digest)
            raise
        self._grow(sum(path.stat().st_size for path in into.rglob("*") if path.is_file()))
        return True

    def holds(self, digest: str) -> bool:
        """Whether upstream has an object, every file in its size; hashes are compared when it is fetched."""
        if digest not in self._known:
            self._hold(digest)
            try:
                self.about(digest, anew=True)
            except MissingArtifactError:
                return False
            except DamagedArtifactError as error:
                warnings.warn(f"{str(error).split(';')[0]}; computing it again", stacklevel=4)
                self._withdraw(digest)
                return False
            self._known.add(digest)
        return True

    def about(self, digest: str, *, anew: bool = False) -> Path:
        """A folder with the manifest of an object that is upstream, without its payload.

        Args:
            anew: ask even if the manifest was fetched before.

        Raises:
            MissingArtifactError, DamagedArtifactError: as `Upstream.manifest`.
        """
        folder = self._root / "manifests" / digest
        if anew or not (folder / MANIFEST).exists():
            upstream = self.open()
            with named_errors(self._root), draft_folder(self._root) as draft:
                upstream.manifest(digest, draft / digest)
                folder.mkdir(parents=True, exist_ok=True)
                for path in (draft / digest).iterdir():
                    os.replace(path, folder / path.name)
        return folder

    def _hold(self, digest: str) -> None:
        if self.holding() and digest not in self._known:
            self.open().hold(digest)

    def _withdraw(self, digest: str) -> None:
        self._known.discard(digest)
        self.open().withdraw(digest)

    def fetch_record(self, key: str) -> None:
        """Fetch the record of a call into the local ones, if upstream has one."""
        sealed = self.open().record(key)
        if sealed is not None:
            self._actions.put(key, sealed)

    def fetch_records(self) -> None:
        """Fetch all records that are not here."""
        upstream = self.open()
        lacking = sorted(set(upstream.keys()) - set(self._actions.keys()))
        for key, sealed in upstream.records(lacking).items() if lacking else ():
            self._actions.put(key, sealed)

    def digests(self) -> list[str]:
        """Digests of all objects upstream."""
        return self.open().digests()

    # -------------------------------------------------------------------------------------------- removing

    def outline(self, digest: str, folder: Path) -> None:
        """Where an object is upstream only, put its manifest into place, so that its payload can be noted as freed."""
        if folder.exists():
            return
        about = self.about(digest, anew=True)
        with draft_folder(self._root) as draft:
            shutil.copytree(about, draft / digest)
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.rename(draft / digest, folder)

    def refuse(self, digest: str) -> None:
        """Raise LeasedArtifactError where a live run on another machine may need an object."""
        self.open().refuse(digest)

    def prune(self, folder: Path) -> int:
        """Free upstream what was freed of a local object; returns the bytes."""
        self._known.discard(folder.name)
        return self.open().prune(folder)

    def forget(self, keys: list[str]) -> None:
        """Remove records upstream."""
        self.open().forget(keys)

    # -------------------------------------------------------------------------------------------- locks, size

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold a key among all machines; what this process was handed meanwhile stays in the cache."""
        with self.open().lock(key):
            with self._guard:
                self._locks += 1
            try:
                yield
            finally:
                with self._guard:
                    self._locks -= 1
                    if not self._locks:
                        self._handed.clear()

    def handed(self, digest: str, folder: Path) -> None:
        """Note that somebody was given the path of an object; the cache may shrink, but not by this one."""
        if self._locks:
            self._handed.add(digest)
        with contextlib.suppress(OSError):
            os.utime(folder)
        self.evict(digest)

    def evict(self, sparing: str = "") -> None:
        """Bring the cache to its size, if it has one and grew by a twentieth of it since the last look."""
        if self._limit is None or (self._grown is not None and self._grown < self._limit / 20):
            return
        self._grown = 0.0

        def keep(name: str) -> bool:
            return name == sparing or name in self._handed or self.owes(name)

        freed = evict(self._root, self._limit, keep=keep, grace=self._grace)
        if freed:
            report("upstream", evicted=freed)

    def _grow(self, size: float) -> None:
        if self._grown is not None:
            self._grown += size


def mirror_of(
    root: Path, upstream: Upstream | str | None, cache_gib: float | None, holding: Callable[[], bool]
) -> Mirror | Alone:
    """What keeps a folder in step with the store that is given, or else with the one that it is the cache of already.

    Raises:
        ConfigError: COHORT_STORE_CACHE_GIB is no number, or the URL cannot be one of a store.
        StoreError: the note of which store the folder is a cache of was altered.
    """
    note = bound_to(root)
    if upstream is None and note is None:
        return Alone(root)
    text = os.environ.get("COHORT_STORE_CACHE_GIB")
    try:
        size = cache_gib if cache_gib is not None else float(text) if text else None
    except ValueError:
        raise ConfigError(f"COHORT_STORE_CACHE_GIB: expected a number of GiB, found {text!r}") from None
    mirror = Mirror(root, upstream or (note.url if note else ""), limit=None if size is None else size * 2**30)
    mirror.holding = holding
    return mirror
