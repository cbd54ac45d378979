"""Export and import of a part of a store as one file: a plain tar of sealed objects, records of calls, and run folders.

    objects/DIGEST/...     the payload as far as it is there, `manifest.json`, and the note of what was freed
    actions/KEY.json       sealed records of calls
    runs/NAME/...          the folders of runs
    index.json             last: every member's size, and the hash of those that do not carry their own

The whole file is read and verified before anything is placed, and records of calls follow the objects they name: a file that
was cut off or altered changes nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tarfile
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pipeline.progress import report
from pipeline.store.actions import read_call
from pipeline.store.files import (
    DamagedArtifactError,
    PrunedArtifactError,
    StoreError,
    draft_folder,
    free_bytes,
    fsync,
    is_plain_name,
    measure,
    parse_sealed,
    printable,
    read_sealed,
    write_sealed,
)
from pipeline.store.folder import MANIFEST, PRUNED, read_manifest, verify_folder
from pipeline.store.store import Store

_INDEX: Final = "index.json"
_LAYOUT: Final = 1
_NAME: Final = re.compile(
    r"objects/[0-9a-f]{64}/.+|actions/[0-9a-f]{64}\.json|runs/[a-z0-9][a-z0-9._-]{0,80}/[^/.][^/]*"
)


@dataclass
class Imported:
    """The content of an archive, and what of it was new."""

    objects: int = 0
    new_objects: int = 0
    records: int = 0
    new_records: int = 0
    runs: tuple[str, ...] = ()
    stages: Counter[str] = field(default_factory=Counter)
    """Stage -> number of new records of its calls, which are hits from now on."""


# ------------------------------------------------------------------------------------------------ writing


def write_archive(file: Path, store: Store, digests: Iterable[str], keys: Iterable[str], runs: Iterable[Path]) -> int:
    """Write objects, records of calls and run folders into a new file, which appears when it is whole; return its bytes.

    Raise StoreError where an object or record is missing or damaged, or the file cannot be written.
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
    """Adds files to a tar and to its index."""

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
                    shutil.copyfile(path, scratch / "file")  # the log of a live run grows between its copy and its hash
                    members.add(scratch / "file", f"runs/{folder.name}/{path.name}", hashed=True)
        write_sealed(scratch / _INDEX, {"layout": _LAYOUT, "files": members.index})
        members.add(scratch / _INDEX, _INDEX, hashed=False)


def _files_of(store: Store, digest: str) -> Iterator[tuple[Path, str]]:
    """Return the files of an object that are there, verified."""
    with contextlib.suppress(PrunedArtifactError):
        store.path(digest, replay=False)
    files, freed = store.manifest(digest)["files"], store.freed(digest)
    folder = store.folder(digest)
    for name in (*(file["name"] for file in files if file["name"] not in freed), MANIFEST):
        yield folder / name, name
    if freed:
        yield folder / PRUNED, PRUNED


# ------------------------------------------------------------------------------------------------ reading


def read_archive(
    file: Path, store: Store, runs: Path, *, check: Callable[[Path], object] = lambda folder: None
) -> Imported:
    """Import an archive into a store, and its run folders into `runs`; what is here already stays as it is.

    Args:
        check: raises ValueError where a run's folder holds what no run writes.

    Raises:
        StoreError: no archive, one that was cut off or altered, or too little space; nothing of it is visible then.
    """
    try:
        needed, free = file.stat().st_size, free_bytes(store.root)
    except OSError as error:
        raise StoreError(f"{file} or {store.root}: {error.strerror}") from None
    if free < needed:
        raise StoreError(f"{file.name} needs {needed:,} bytes, and {free:,} are free on the disk of {store.root}")
    _look_through(file, needed)
    with draft_folder(store.root) as draft:
        with _readable(file) as tar:
            for member in tar:
                tar.extract(member, draft, filter="data")
        _check_hashes(file, draft)
        objects = _folders(draft / "objects")
        for number, folder in enumerate(objects, 1):
            _verify_object(file, folder)
            report("archive", verified=number, total=len(objects))
        records = [_record(file, path) for path in _entries(draft / "actions")]
        _require_results(file, store, records, {folder.name for folder in objects})
        found = _folders(draft / "runs")
        for folder in found:
            _check_run(file, folder, check)
        return _place(file, store, objects, records, found, runs)


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[tarfile.TarFile]:
    """Open an archive, with errors that name it."""
    try:
        if not file.is_file():  # a pipe would be waited for
            raise StoreError(f"{file} is no file; name one that `cohort store export` wrote")
        with tarfile.open(file, "r:") as tar:
            yield tar
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise StoreError(f"{file.name} is no archive of a store, or was cut off ({error}); copy it again") from None
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise StoreError(f"{file.name} holds a file in the place of a folder ({error.filename}); refused") from None


def _look_through(file: Path, size: int) -> None:
    """Compare the members' names, kinds and sizes with the index, before anything is written."""
    sizes: dict[str, int] = {}
    index: Any = None
    with _readable(file) as tar:
        for member in tar:
            _require_exported(file, member, sizes)
            # All bytes of a plain member are in the file: a larger size is forged.
            if member.offset_data + member.size > size:
                raise StoreError(f"{file.name} ends inside {member.name}: it was cut off or altered; copy it again")
            sizes[member.name] = member.size
            if member.name == _INDEX:
                index = _read_index(file, tar, member)
    if index is None:
        raise StoreError(f"{file.name} ends before its index: it was cut off or altered; copy it again")
    del sizes[_INDEX]
    if index.keys() != sizes.keys():
        one = sorted(index.keys() ^ sizes.keys())[0]
        raise StoreError(f"{file.name} does not hold what its index says ({one}); copy it again")
    for name, expected in index.items():
        if not isinstance(expected, dict) or expected.get("size") != sizes[name]:
            raise StoreError(f"{name} in {file.name} was altered (its size is not the index's); copy the file again")


def _require_exported(file: Path, member: tarfile.TarInfo, seen: Collection[str]) -> None:
    """Refuse what `write_archive` does not write: links, devices, pipes, sparse files, other names, a name twice."""
    known = is_plain_name(member.name) and (_NAME.fullmatch(member.name) or member.name == _INDEX)
    if not known or not member.isreg() or member.issparse():
        raise StoreError(f"{file.name} holds {member.name!r:.200}, which no `cohort store export` writes; refused")
    if member.name in seen:
        raise StoreError(f"{file.name} holds {member.name!r:.200} twice; refused")


def _read_index(file: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any]:
    """Return name -> size and, where it has no hash of its own, sha256 of every member."""
    content = tar.extractfile(member)
    assert content is not None
    try:
        index = parse_sealed(content.read())
    except ValueError:
        raise StoreError(f"the index of {file.name} was altered; copy the file again") from None
    if index.get("layout") != _LAYOUT:
        raise StoreError(f"{file.name} has layout {index.get('layout')!r:.80}; this version of Cohort reads {_LAYOUT}")
    named = index.get("files")
    if not isinstance(named, dict):
        raise StoreError(f"the index of {file.name} names no files; refused")
    return named


def _check_hashes(file: Path, draft: Path) -> None:
    """Compare the members that carry no hash of their own; the look through the archive compared all sizes."""
    for name, expected in read_sealed(draft / _INDEX)["files"].items():
        kind = name.split("/")[0]
        if (kind == "runs" or "sha256" in expected) and measure(draft / name) != expected:
            raise StoreError(f"{name} in {file.name} was altered; copy the file again")


def _verify_object(file: Path, folder: Path) -> None:
    """Compare every hash, and make the files as they are in a store: durable and read-only."""
    try:
        with contextlib.suppress(PrunedArtifactError):
            verify_folder(folder)
        known = {MANIFEST, PRUNED, *(part["name"] for part in read_manifest(folder)["files"])}
    except StoreError as error:
        raise StoreError(f"an artifact in {file.name} was altered ({error}); copy the file again") from None
    for path in folder.rglob("*"):
        if path.is_dir():
            continue
        if path.relative_to(folder).as_posix() not in known:  # hidden files, which a store leaves to the system
            raise StoreError(f"an artifact in {file.name} holds {path.name}, which is not part of it; refused")
        path.chmod(0o444)
        fsync(path)


def _record(file: Path, path: Path) -> dict[str, Any]:
    try:
        return read_call(path)
    except DamagedArtifactError as error:
        reason = str(error).removeprefix(f"{path} ").split(";")[0]
        raise StoreError(f"the record {path.stem[:12]} in {file.name} {reason}; copy the file again") from None


def _require_results(file: Path, store: Store, records: list[dict[str, Any]], brought: set[str]) -> None:
    for record in records:
        if record["result"] not in brought and not store.folder(record["result"]).exists():
            raise StoreError(
                f"{file.name} names the result {record['result'][:12]} of {record['stage']} and does not hold it; export again"
            )


def _check_run(file: Path, folder: Path, check: Callable[[Path], object]) -> None:
    try:
        check(folder)
    except ValueError as error:
        raise StoreError(f"the run {folder.name} in {file.name} is not as a run leaves it ({error}); refused") from None


def _place(
    file: Path, store: Store, objects: list[Path], records: list[dict[str, Any]], runs: list[Path], home: Path
) -> Imported:
    """Place objects, then records, then runs: whatever is visible at any moment has what it names."""
    taken = Imported(len(objects), sum(store.adopt(folder) for folder in objects), len(records))
    for record in records:
        try:
            store.action(record["key"])
        except StoreError:
            store.record(record["key"], {**record, "imported": printable(file.name)})
            taken.new_records += 1
            taken.stages[record["stage"]] += 1
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
