"""A part of a store as one file, to be carried to another store: a plain tar of sealed objects, records of calls, and folders.

    objects/DIGEST/...     the payload as far as it is there, `manifest.json`, and the note of what was freed
    actions/KEY.json       sealed records of calls
    runs/NAME/...          the folders of runs
    index.json             last: every member's size, and the hash of those that do not carry their own

Nothing is placed before the whole file was read and verified, and records of calls come after the objects they name: a file
that was cut off or altered leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tarfile
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.disk import free_bytes
from pipeline.drafts import draft_folder
from pipeline.objects import MANIFEST, PRUNED, verify_folder
from pipeline.progress import report
from pipeline.sealing import (
    DamagedArtifactError,
    PrunedArtifactError,
    StoreError,
    fsync,
    measure,
    read_sealed,
    stays_inside,
    write_sealed,
)
from pipeline.store import Store

__all__ = ["Imported", "read_archive", "write_archive"]

_INDEX: Final = "index.json"
_LAYOUT: Final = 1
_NAME: Final = re.compile(r"objects/[0-9a-f]{64}/.+|actions/[0-9a-f]{64}\.json|runs/[a-z0-9][a-z0-9._-]{0,80}/[^/]+")


@dataclass
class Imported:
    """What an archive held and what of it was new."""

    objects: int = 0
    new_objects: int = 0
    records: int = 0
    new_records: int = 0
    runs: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------ writing


def write_archive(file: Path, store: Store, digests: Iterable[str], keys: Iterable[str], runs: Iterable[Path]) -> int:
    """Write objects, records of calls and run folders into a new file, which appears when it is whole; returns its bytes.

    Raises:
        StoreError: an object or record is missing or damaged, or the file cannot be written.
    """
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        with tarfile.open(draft, "w", format=tarfile.PAX_FORMAT) as tar:
            _fill(_Members(tar), store, list(digests), sorted(keys), list(runs))
        fsync(draft)
        os.replace(draft, file)
        fsync(file.resolve().parent)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{file} cannot be written: {error.strerror or error}; choose another place") from None
    finally:
        draft.unlink(missing_ok=True)
    return file.stat().st_size


class _Members:
    """Adds files to a tar, and remembers what the index says of them."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar, self.index = tar, dict[str, dict[str, Any]]()

    def add(self, path: Path, name: str, *, hashed: bool) -> None:
        """Add a plain file under a name; owner, times and rights of this machine stay here."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = path.stat().st_size, 0o444
        with open(path, "rb") as handle:
            self._tar.addfile(info, handle)
        self.index[name] = measure(path) if hashed else {"size": info.size}


def _fill(members: _Members, store: Store, digests: list[str], keys: list[str], runs: list[Path]) -> None:
    for number, digest in enumerate(digests, 1):
        for path, name in _files_of(store, digest):
            members.add(path, f"objects/{digest}/{name}", hashed=False)
        report("archive", written=number, total=len(digests))
    with draft_folder(store.root) as scratch:
        for key in keys:
            write_sealed(scratch / key, store.action(key))
            members.add(scratch / key, f"actions/{key}.json", hashed=False)
        for folder in runs:
            for path in sorted(folder.iterdir()):
                if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
                    members.add(path, f"runs/{folder.name}/{path.name}", hashed=True)
        write_sealed(scratch / _INDEX, {"layout": _LAYOUT, "files": members.index})
        members.add(scratch / _INDEX, _INDEX, hashed=False)


def _files_of(store: Store, digest: str) -> Iterator[tuple[Path, str]]:
    """What there is of an object, verified."""
    with contextlib.suppress(PrunedArtifactError):
        store.path(digest)
    files, freed = store.manifest(digest)["files"], store.freed(digest)
    folder = store.folder(digest)
    for name in (*(file["name"] for file in files if file["name"] not in freed), MANIFEST):
        yield folder / name, name
    if freed:
        yield folder / PRUNED, PRUNED


# ------------------------------------------------------------------------------------------------ reading


def read_archive(file: Path, store: Store, runs: Path) -> Imported:
    """Take the content of an archive into a store, and its run folders into `runs`; what is here already stays as it is.

    Raises:
        StoreError: no archive, one that was cut off or altered, or too little space; nothing of it is visible then.
    """
    try:
        needed, free = file.stat().st_size, free_bytes(store.root)
    except OSError as error:
        raise StoreError(f"{file} or {store.root}: {error.strerror}") from None
    if free < needed:
        raise StoreError(f"{file.name} needs {needed:,} bytes, and {free:,} are free on the disk of {store.root}")
    with draft_folder(store.root) as draft:
        _unpack(file, draft)
        objects = _folders(draft / "objects")
        for number, folder in enumerate(objects, 1):
            _verify_object(file, folder)
            report("archive", verified=number, total=len(objects))
        records = [_record(file, path) for path in _entries(draft / "actions")]
        _require_results(file, store, records, {folder.name for folder in objects})
        return _place(store, objects, records, _folders(draft / "runs"), runs)


def _unpack(file: Path, draft: Path) -> None:
    """Extract every member below `draft`, and hold them against the index."""
    seen: set[str] = set()
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if not (member.isreg() and (_NAME.fullmatch(member.name) or member.name == _INDEX)):
                    raise StoreError(
                        f"{file.name} holds {member.name!r}, which no `cohort store export` writes; refused"
                    )
                if not stays_inside(member.name) or member.name in seen:
                    raise StoreError(f"{file.name} holds {member.name!r} twice, or outside of its place; refused")
                seen.add(member.name)
                tar.extract(member, draft, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise StoreError(f"{file.name} is no archive of a store, or was cut off ({error}); copy it again") from None
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise StoreError(f"{file.name} holds a file in the place of a folder ({error.filename}); refused") from None
    if _INDEX not in seen:
        raise StoreError(f"{file.name} ends before its index: it was cut off or altered; copy it again")
    _check_index(file, draft, seen - {_INDEX})


def _check_index(file: Path, draft: Path, found: set[str]) -> None:
    try:
        index = read_sealed(draft / _INDEX)
    except DamagedArtifactError:
        raise StoreError(f"the index of {file.name} was altered; copy the file again") from None
    if index.get("layout") != _LAYOUT:
        raise StoreError(f"{file.name} has layout {index.get('layout')}; this version of Cohort reads {_LAYOUT}")
    named: dict[str, dict[str, Any]] = index["files"]
    if named.keys() != found:
        one = sorted(named.keys() ^ found)[0]
        raise StoreError(f"{file.name} does not hold what its index says ({one}); copy it again")
    for name, expected in named.items():
        path = draft / name
        same = measure(path) == expected if "sha256" in expected else path.stat().st_size == expected["size"]
        if not same:
            raise StoreError(f"{name} in {file.name} was altered; copy the file again")


def _verify_object(file: Path, folder: Path) -> None:
    """Compare every hash, and make the files as they are in a store: durable and read-only."""
    try:
        verify_folder(folder)
    except PrunedArtifactError:
        pass
    except StoreError as error:
        raise StoreError(f"an artifact in {file.name} was altered ({error}); copy the file again") from None
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o444)
            fsync(path)


def _record(file: Path, path: Path) -> dict[str, Any]:
    try:
        record = read_sealed(path)
    except DamagedArtifactError:
        raise StoreError(f"the record {path.stem[:12]} in {file.name} was altered; copy the file again") from None
    if record.get("key") != path.stem:
        raise StoreError(f"the record {path.stem[:12]} in {file.name} is that of another call; refused")
    return record


def _require_results(file: Path, store: Store, records: list[dict[str, Any]], brought: set[str]) -> None:
    for record in records:
        if record["result"] not in brought and not store.folder(record["result"]).exists():
            raise StoreError(
                f"{file.name} names the result {record['result'][:12]} of {record['stage']} and does not hold it; export again"
            )


def _place(store: Store, objects: list[Path], records: list[dict[str, Any]], runs: list[Path], home: Path) -> Imported:
    """Objects, then records, then runs: whatever is visible at any moment has what it names."""
    taken = Imported(len(objects), sum(store.adopt(folder) for folder in objects), len(records))
    for record in records:
        try:
            store.action(record["key"])
        except StoreError:
            store.record(record["key"], {name: value for name, value in record.items() if name != "key"})
            taken.new_records += 1
    home.mkdir(parents=True, exist_ok=True)
    new = [folder for folder in runs if not (home / folder.name).exists()]
    for folder in new:
        draft = home / f".{folder.name}.{uuid.uuid4().hex[:8]}"
        shutil.copytree(folder, draft, copy_function=shutil.copyfile)  # without the rights of an archive's members
        os.rename(draft, home / folder.name)
    taken.runs = tuple(folder.name for folder in new)
    return taken


def _folders(parent: Path) -> list[Path]:
    return [path for path in _entries(parent) if path.is_dir()]


def _entries(parent: Path) -> list[Path]:
    return sorted(parent.iterdir()) if parent.is_dir() else []
