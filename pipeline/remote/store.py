"""A store behind a URL that several machines share: the same layout as a local one, so that a copy of it *is* one.

`objects/ab/DIGEST/` (payload, then `manifest.json` last), `actions/ab/KEY.json` (last of all), `store.json` (which store it
is), `locks/` and `pins/`. Object stores have no rename, so an object without a manifest does not exist, whatever else of it
is there. What was uploaded is compared in size with a listing before its manifest follows; what is downloaded is hashed.
"""

from __future__ import annotations

import contextlib
import json
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pipeline.remote.bucket import PATIENCE, Bucket, Entry
from pipeline.remote.locks import LEASE_SECONDS, RemoteLocks, RemotePins, ServerClock
from pipeline.store.files import DamagedArtifactError, MissingArtifactError, StoreError, is_digest, measure
from pipeline.store.folder import MANIFEST, PRUNED, freed_files, read_manifest
from pipeline.store.pins import PinnedArtifactError

_IDENTITY: Final = "store.json"
_ATTEMPTS: Final = 3
"""How often a file that arrived in another size, or with another hash, is sent or fetched again."""
_IDENTIFIER: Final = re.compile(r"[0-9a-f]{32}")


class RemoteStore:
    """The remote side of a store; it receives no request before the first call."""

    def __init__(self, url: str, *, patience: float = PATIENCE, lease_seconds: float = LEASE_SECONDS) -> None:
        """Take a URL without credentials, seconds for which a request is repeated, and seconds of a lock without renewal.

        Raises:
            ConfigError: the URL cannot be one of a store, or its file system's package is not installed.
        """
        self._bucket = Bucket(url, patience=patience)
        self._clock = ServerClock(self._bucket)
        self._locks = RemoteLocks(self._bucket, self._clock, seconds=lease_seconds)
        self._pins = RemotePins(self._bucket, self._clock, seconds=lease_seconds)
        self.url = self._bucket.url

    def identity(self, *, create: bool = True) -> str | None:
        """Return the name that this store got when it was first used, now if `create`; None: it has none."""
        found = self._identity()
        if found is not None or not create:
            return found
        with self._locks.held("identity"):
            found = self._identity()
            if found is None:
                found = uuid.uuid4().hex
                self._bucket.write(_IDENTITY, json.dumps({"id": found, "layout": 1}).encode())
        return found

    def _identity(self) -> str | None:
        try:
            found = json.loads(self._bucket.read(_IDENTITY))["id"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError):
            found = None
        if not isinstance(found, str) or not _IDENTIFIER.fullmatch(found):
            raise StoreError(f"{self.url}/{_IDENTITY} is not that of a store; choose another folder")
        return found

    def push(self, folder: Path) -> None:
        """Upload a sealed object, named by its folder, unless it is there: payload, then, once all sizes fit, the manifest.

        Raise StoreError where files arrive in another size again and again; the object is not visible then.
        """
        expected = _payload(folder)
        there = self._entries(folder.name)
        outdated = PRUNED in there and not (folder / PRUNED).exists()  # made again since it was pruned
        if MANIFEST in there and not _incomplete(expected, there) and not outdated:
            return
        self._upload(folder, expected, there)
        if outdated:
            self._bucket.remove([_object(folder.name, PRUNED)])
        for name in (PRUNED, MANIFEST):
            if (folder / name).exists():
                self._bucket.write(_object(folder.name, name), (folder / name).read_bytes())

    def _upload(self, folder: Path, expected: Mapping[str, int], there: Mapping[str, Entry]) -> None:
        for _ in range(_ATTEMPTS):
            wanting = _incomplete(expected, there)
            if not wanting:
                return
            for name in wanting:
                self._bucket.upload(folder / name, _object(folder.name, name))
            there = self._entries(folder.name)
        found = {name: there[name].size if name in there else None for name in _incomplete(expected, there)}
        if found:
            raise StoreError(
                f"{self.url}: {len(found)} files of {folder.name[:12]} do not arrive whole: expected bytes "
                f"{ {name: expected[name] for name in found} }, found {found}; run the same command again"
            )

    def manifest(self, digest: str, into: Path) -> None:
        """Fetch the manifest and, if any, the note of pruned files into a folder named by the digest.

        Raises:
            MissingArtifactError: there is no such object.
            DamagedArtifactError: the manifest was altered, or a file of the payload is missing or of another size.
        """
        there = self._entries(digest)
        if MANIFEST not in there:
            raise MissingArtifactError(f"no artifact {digest} at {self.url}; run the command that made it again")
        into.mkdir(parents=True, exist_ok=True)
        for name in {MANIFEST, PRUNED} & there.keys():
            with contextlib.suppress(FileNotFoundError):  # withdrawn meanwhile
                self._bucket.download(_object(digest, name), into / name)
                (into / name).chmod(0o444)
        if wrong := _incomplete(_payload(into), there):
            place = f"{self.url}/{_object(digest, wrong[0])}"
            raise DamagedArtifactError(f"{place} is missing or of another size; the next run recomputes it")

    def pull(self, digest: str, into: Path) -> None:
        """Fetch an object into a folder named by its digest, every file verified by its hash.

        Raises:
            MissingArtifactError: there is none.
            DamagedArtifactError: a file is missing, or its hash is wrong however often it is fetched.
        """
        self.manifest(digest, into)
        wanted = _payload(into)
        for file in read_manifest(into)["files"]:
            if file["name"] in wanted:
                self._pull(digest, file, into / file["name"])

    def _pull(self, digest: str, file: Mapping[str, Any], path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                self._bucket.download(_object(digest, file["name"]), path)
                if measure(path) == {"size": file["size"], "sha256": file["sha256"]}:
                    path.chmod(0o444)
                    return
        place = f"{self.url}/{_object(digest, file['name'])}"
        raise DamagedArtifactError(f"{place} is damaged (its hash is not the manifest's); the next run recomputes it")

    def withdraw(self, digest: str) -> None:
        """Remove an object that was found damaged, its manifest first."""
        names = sorted(self._entries(digest), key=lambda name: name != MANIFEST)
        self._bucket.remove(_object(digest, name) for name in names)

    def prune(self, folder: Path) -> int:
        """Free what the note of pruned files in an object's local folder names, the note first; return the bytes freed.

        Raise PinnedArtifactError where a live process on another machine has yet to fetch it; nothing was freed then.
        """
        freed = freed_files(folder)
        there = self._entries(folder.name)
        if MANIFEST not in there:
            return 0
        note = _object(folder.name, PRUNED)
        before = self._bucket.read(note) if PRUNED in there else None
        self._bucket.write(note, (folder / PRUNED).read_bytes())
        if holders := self._pins.of(folder.name):
            self._bucket.remove([note]) if before is None else self._bucket.write(note, before)
            raise _pinned(folder.name, holders)
        gone = [name for name in freed if name in there]
        self._bucket.remove(_object(folder.name, name) for name in gone)
        return sum(there[name].size for name in gone)

    def pin(self, digest: str) -> None:
        """Keep other machines from freeing an object while this process lives; call it before looking for the object."""
        self._pins.add(digest)

    def require_unpinned(self, digest: str) -> None:
        """Raise PinnedArtifactError where a live process on another machine needs an object."""
        if holders := self._pins.of(digest):
            raise _pinned(digest, holders)

    def digests(self) -> list[str]:
        """Return the digests of all objects, pruned ones included."""
        found = (name.split("/") for name in self._bucket.entries("objects"))
        return sorted(parts[1] for parts in found if len(parts) == 3 and parts[2] == MANIFEST and is_digest(parts[1]))

    def _entries(self, digest: str) -> dict[str, Entry]:
        return self._bucket.entries(f"objects/{digest[:2]}/{digest}")

    def put_record(self, key: str, sealed: bytes) -> None:
        """Upload the record of a call whose result is there."""
        self._bucket.write(_action(key), sealed)

    def record(self, key: str) -> bytes | None:
        """Return the sealed record of a call; None if there is none."""
        try:
            return self._bucket.read(_action(key))
        except FileNotFoundError:
            return None

    def records(self, keys: list[str]) -> dict[str, bytes]:
        """Return many sealed records at once; those that are gone are left out."""
        found = self._bucket.read_all(_action(key) for key in keys)
        return {Path(name).stem: data for name, data in found.items()}

    def forget(self, keys: list[str]) -> None:
        """Remove records."""
        self._bucket.remove(_action(key) for key in keys)

    def keys(self) -> list[str]:
        """Return the keys that have a record."""
        stems = (Path(name).stem for name in self._bucket.entries("actions") if name.endswith(".json"))
        return [stem for stem in stems if is_digest(stem)]

    def lock(self, key: str) -> contextlib.AbstractContextManager[None]:
        """Hold a key among all machines that share the store."""
        return self._locks.held(key)

    def probe(self) -> float:
        """Write, list and delete below the URL, or raise StoreError; return how many seconds this host's clock is ahead."""
        return self._clock.measured()


def _object(digest: str, name: str) -> str:
    return f"objects/{digest[:2]}/{digest}/{name}"


def _action(key: str) -> str:
    return f"actions/{key[:2]}/{key}.json"


def _payload(folder: Path) -> dict[str, int]:
    """Return name -> size of the files that an object should have; without those that were freed."""
    files = read_manifest(folder)["files"]
    freed = freed_files(folder, files)
    return {file["name"]: file["size"] for file in files if file["name"] not in freed}


def _pinned(digest: str, holders: list[str]) -> PinnedArtifactError:
    return PinnedArtifactError(
        f"artifact {digest[:12]} is in use by {', '.join(holders)}, which may need it; free it when that has ended"
    )


def _incomplete(expected: Mapping[str, int], there: Mapping[str, Entry]) -> list[str]:
    """Return the files that are not there in their size."""
    return [name for name, size in expected.items() if name not in there or there[name].size != size]
