"""Objects of the store: sealed folders whose `manifest.json` names every file with size and sha256.

The content digest of an object covers names, sizes and hashes of the payload, and the schema. The rest of the manifest (type,
rows, provenance) is not part of it. Data is named by it: equal content has one name. Trained state is named by its derivation,
the key of the call in the manifest's provenance. Objects are renamed into place whole and verified before they are read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.store.actions import Digest, Label, RecordedCall, complaint, key_of
from pipeline.store.files import (
    DamagedArtifactError,
    MissingArtifactError,
    PrunedArtifactError,
    Signature,
    StoreError,
    canonical_json,
    draft_folder,
    fsync,
    is_digest,
    is_plain_name,
    measure,
    named_errors,
    read_sealed,
    sha256_of,
    signature,
    write_sealed,
)
from pipeline.store.locks import locked

MANIFEST: Final = "manifest.json"
PRUNED: Final = "pruned.json"
_LOCK: Final = re.compile(r"[a-z0-9][a-z0-9-]*")


class _File(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    size: Annotated[int, Field(ge=0)]
    sha256: Digest


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True)

    files: list[_File]
    digest: Digest
    layout: str | None = Field(alias="schema")
    type: Label = "artifact"
    rows: Annotated[int, Field(ge=0)] = 0
    provenance: RecordedCall | None = None


# ------------------------------------------------------------------------------------------------ one sealed folder


def digest_of(files: list[dict[str, Any]], schema: str | None) -> str:
    """Return the digest of content: a hash of file names, sizes, hashes and schema."""
    return sha256_of(canonical_json({"files": files, "schema": schema}))


def seal_folder(folder: Path, about: Mapping[str, Any], schema: str | None) -> str:
    """Seal a draft and return its digest: files measured, read-only and fsynced, then the manifest, then the folders.

    Raise StoreError where an entry is no plain file (a link may change, or lead out of the store) or has a name of the store's.
    """
    entries = sorted(folder.rglob("*"))
    for path in entries:
        plain = (path.is_file() or path.is_dir()) and not path.is_symlink()
        if not plain or path in (folder / MANIFEST, folder / PRUNED):
            raise StoreError(
                f"{path.name}: an artifact holds plain files and folders, none named {MANIFEST} or {PRUNED}"
            )
    payload = [path for path in entries if path.is_file()]
    files = [{"name": path.relative_to(folder).as_posix(), **measure(path)} for path in payload]
    digest = digest_of(files, schema)
    for path in payload:
        fsync(path)
        path.chmod(0o444)
    write_sealed(folder / MANIFEST, {**about, "digest": digest, "files": files, "schema": schema})
    for path in [*(path for path in entries if path.is_dir()), folder]:
        fsync(path)
    return digest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of the object in `folder`, which is named by its content or by its derivation.

    Raises:
        MissingArtifactError: there is no such folder.
        DamagedArtifactError: the manifest is missing, altered, another object's, lacks a field or has one of another type, or
            names a file outside of the folder.
    """
    if not folder.exists():
        raise MissingArtifactError(f"no artifact {folder.name} at {folder}; run the command that made it again")
    place = folder / MANIFEST
    if folder.is_symlink() or place.is_symlink():
        raise DamagedArtifactError(f"{place} lies behind a link; the next run recomputes it")
    try:
        manifest = read_sealed(place)
        described = _Manifest.model_validate(manifest)
    except FileNotFoundError:
        raise DamagedArtifactError(f"{place} is missing; the next run recomputes it") from None
    except (ValidationError, RecursionError) as error:
        reason = complaint(error) if isinstance(error, ValidationError) else "nested too deeply"
        raise DamagedArtifactError(
            f"{place} does not describe {folder.name} ({reason}); the next run recomputes it"
        ) from None
    names = [file["name"] for file in manifest["files"]]
    fit = all(is_plain_name(name) and name not in (MANIFEST, PRUNED) for name in names) and len({*names}) == len(names)
    content = digest_of(manifest["files"], manifest["schema"])
    made = described.provenance or RecordedCall()
    named = folder.name in (content, key_of(made.stage, made.version, made.arguments))
    if not (fit and named and described.digest == content):
        raise DamagedArtifactError(f"{place} does not describe {folder.name}; the next run recomputes it")
    return manifest


def freed_files(folder: Path, files: list[dict[str, Any]] | None = None) -> frozenset[str]:
    """Return the names of payload files that were pruned; none where nothing was.

    Args:
        files: those of the manifest, if it was read already.

    Raises:
        DamagedArtifactError: the note of pruned files was altered, or names a file that is not of the payload.
    """
    payload = {file["name"] for file in (read_manifest(folder)["files"] if files is None else files)}
    try:
        freed = read_sealed(folder / PRUNED).get("files")
    except FileNotFoundError:
        return frozenset()
    if not isinstance(freed, list) or not all(isinstance(name, str) and name in payload for name in freed):
        raise DamagedArtifactError(
            f"{folder / PRUNED} names files that are not this artifact's; the next run recomputes it"
        )
    return frozenset(freed)


def verify_folder(folder: Path) -> None:
    """Check presence, size and sha256 of every file that was not pruned, and that there is no other file.

    Arrow and safetensors files have no checksum of their own.

    Raises:
        MissingArtifactError, DamagedArtifactError, PrunedArtifactError: with the file and what to do.
    """
    files = read_manifest(folder)["files"]
    freed = freed_files(folder, files)
    if (folder / PRUNED).exists() and freed == {file["name"] for file in files}:
        raise PrunedArtifactError(f"artifact {folder.name[:12]} {recomputed(folder.name)}")
    for file in files:
        if file["name"] in freed:
            continue
        path = folder / file["name"]
        found = measure(path) if _is_own_file(folder, file["name"]) else None
        if found != {"size": file["size"], "sha256": file["sha256"]}:
            state = (
                "is missing, or a link" if found is None else "was altered (its size or sha256 is not the manifest's)"
            )
            raise DamagedArtifactError(f"{path} {state}; the next run recomputes it")
    # Another file would be read with the payload (an adapter in a model folder); hidden files are the system's.
    expected = {folder / MANIFEST, folder / PRUNED, *(folder / file["name"] for file in files)}
    for path in folder.rglob("*"):
        plain_folder = path.is_dir() and not path.is_symlink()
        if not plain_folder and path not in expected and not path.name.startswith("."):
            raise DamagedArtifactError(f"{path} does not belong to this artifact; the next run recomputes it")


def _is_own_file(folder: Path, name: str) -> bool:
    """Return whether `name` is a plain file of an object, and neither it nor a folder above it is a link."""
    places = [folder, *(folder / part for part in reversed(PurePosixPath(name).parents[:-1])), folder / name]
    return not any(place.is_symlink() for place in places) and places[-1].is_file()


def recomputed(digest: str) -> str:
    """Return how to get a pruned artifact back, as the end of a sentence about it."""
    return f"was pruned to free space; `cohort forget {digest[:12]}` and the same run again recompute it"


# ------------------------------------------------------------------------------------------------ all of a local folder


class Objects:
    """The objects under `objects/` of a store's root, read-only once they are there."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._verified: dict[str, Signature] = {}

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

    def place(self, draft: Path, digest: str) -> None:
        """Rename a sealed draft into place, unless a sound and whole object of that name is there."""
        with self.lock(digest):
            folder = self.folder(digest)
            if not self.is_sound(digest) or freed_files(folder):
                aside = self.quarantine(digest)
                if aside is not None and (aside / PRUNED).exists():
                    shutil.rmtree(aside)  # pruned, not damaged: nothing to look into
                self._rename(draft, folder)
            if not (folder / PRUNED).exists():
                self._verified[digest] = signature(folder)

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

    def check(self, digest: str) -> None:
        """Verify an object, unless this process did and size, time and inode of every file are the same since.

        Raise MissingArtifactError, DamagedArtifactError or PrunedArtifactError, with the file and what to do.
        """
        if digest not in self._verified or self._verified[digest] != signature(self.folder(digest)):
            self.verify(digest)

    def verify(self, digest: str) -> None:
        """Check every file of an object now, whatever was verified before; raise as `check` does."""
        self._verified.pop(digest, None)
        with named_errors(self._root):
            before = signature(self.folder(digest))
            try:
                verify_folder(self.folder(digest))
            except FileNotFoundError:
                raise MissingArtifactError(f"artifact {digest} was moved while it was read; run again") from None
        self._verified[digest] = before

    def is_sound(self, digest: str) -> bool:
        """Return whether an object is there, verified now, and not wholly pruned."""
        try:
            self.verify(digest)
        except (MissingArtifactError, DamagedArtifactError, PrunedArtifactError):
            return False
        return True

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
        own = [name for name in freed if _is_own_file(folder, name)]  # a link may lead out of the store
        states = [(folder / name).stat() for name in own]
        for name in own:
            (folder / name).unlink(missing_ok=True)
        return sum(state.st_size for state in states if state.st_nlink == 1)  # else another artifact keeps the bytes

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
