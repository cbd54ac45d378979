"""Files of a store: JSON sealed with its own hash, measured and fsynced files, drafts, and errors that name the store.

A draft is a folder in which an object or record is written before one rename makes it visible. It belongs to the process that
holds its lock. A draft whose lock is free may be removed: its owner is dead, on this host or another.

Free disk space is checked before a stage starts, not when the disk is full. The estimate for a stage is what it wrote the last
times: in this process, or in the run that is being continued, whose results it looked up. A stage without an estimate starts.
Free is what the file system says (`statvfs`), which does not know quotas.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pipeline.store.locks import locked, try_lock

_LINE_BREAK: Final = re.compile("\n *")  # in a string it is escaped
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_LAST: Final = 3
"""Executions of a stage whose largest is the estimate: outputs and their tables differ in length from step to step."""
Signature = tuple[tuple[str, int, int, int], ...]


class StoreError(OSError):
    """The store cannot be written or read; nothing half-written is visible."""


class MissingArtifactError(StoreError):
    """No object of that digest, or no record of that call, is in the store."""


class DamagedArtifactError(StoreError):
    """A file of an object is missing, unexpected, of another size, or of another hash than its manifest says."""


class PrunedArtifactError(StoreError):
    """The payload was freed by `prune`; manifest and action are still there."""


def canonical_json(value: Any) -> str:
    """Return the one text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(text: str) -> str:
    """Return the hexadecimal sha256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a new read-only JSON file that ends in its own hash, and fsync it."""
    seal = sha256_of(canonical_json(value))
    text = json.dumps({**value, "seal": seal}, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with open(path, "x", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    path.chmod(0o444)


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the value in a sealed file; raise FileNotFoundError, or DamagedArtifactError where a byte was altered."""
    try:
        return parse_sealed(path.read_bytes())
    except ValueError as error:
        raise DamagedArtifactError(f"{path} is damaged ({error}); the next run recomputes it") from None


def parse_sealed(content: bytes) -> dict[str, Any]:
    """Return the value in the bytes of a sealed file; raise ValueError where `write_sealed` writes other bytes."""
    try:
        text = content.decode("utf-8")
        value = json.loads(text)
        # On one line: encoding with indentation was a third of what reading a record costs, and `actions` reads thousands.
        whole = json.dumps(value, separators=(",", ": "), sort_keys=True, ensure_ascii=False, allow_nan=False)
        intact = value.pop("seal") == sha256_of(canonical_json(value)) and whole == _LINE_BREAK.sub("", text)
    except (KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if not intact:
        raise ValueError("its seal does not fit")
    sealed: dict[str, Any] = value
    return sealed


def measure(path: Path) -> dict[str, Any]:
    """Return size and sha256 of a file, as in a manifest."""
    with open(path, "rb") as handle:
        return {"size": os.fstat(handle.fileno()).st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def signature(folder: Path) -> Signature:
    """Return name, size, mtime and inode of every entry of a folder: any change to the folder changes this."""
    entries = []
    with contextlib.suppress(FileNotFoundError):  # an entry removed meanwhile makes the signature differ, as it must
        for path in folder.rglob("*"):
            state = path.lstat()
            entries.append((path.relative_to(folder).as_posix(), state.st_size, state.st_mtime_ns, state.st_ino))
    return tuple(sorted(entries))


def is_digest(value: object) -> bool:
    """Return whether a value is an artifact's digest or a call's key: 64 hexadecimal digits in lower case."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def is_plain_name(value: object) -> bool:
    """Return whether a value can name a file inside a folder: relative, `/` only, no `.`, `..` or invisible characters.

    Check every name that others wrote before it becomes a path.
    """
    if not isinstance(value, str) or not value.isprintable() or "\\" in value:
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in value.split("/"))


def printable(text: str) -> str:
    """Return a text that moves no cursor and paints nothing: `?` in place of control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def named_errors(root: Path) -> Iterator[None]:
    """Turn an OSError of the file system into a StoreError that names the store and says what to do."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"the store {root} cannot be used: {error.strerror or error} ({error.filename or root}). "
            "Nothing half-written is visible; free space or fix permissions, then run the same command again"
        ) from error


@contextlib.contextmanager
def draft_folder(root: Path) -> Iterator[Path]:
    """Make an empty folder on the store's file system, removed after the block unless it was renamed."""
    draft = root / "drafts" / uuid.uuid4().hex
    with contextlib.ExitStack() as cleanup:
        with named_errors(root):
            cleanup.enter_context(locked(root / "locks" / draft.name))
            draft.mkdir(parents=True)
        cleanup.callback(shutil.rmtree, draft, ignore_errors=True)
        yield draft


def sweep(root: Path) -> None:
    """Remove drafts and lock files that dead processes left."""
    for name in {path.name for folder in ("drafts", "locks") for path in (root / folder).iterdir()}:
        with try_lock(root / "locks" / name) as abandoned:
            if abandoned:
                shutil.rmtree(root / "drafts" / name, ignore_errors=True)


class DiskFullError(StoreError):
    """Too little space is free for what a stage is about to write; it has not started."""


def free_bytes(folder: Path) -> int:
    """Return how many bytes this user may still write on the file system of `folder`."""
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


def folder_bytes(folder: Path | str) -> int:
    """Return the bytes of the files in a folder, hidden and nested ones too; hard-linked files count as 0."""
    total = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                total += folder_bytes(entry.path)
            else:
                state = entry.stat(follow_symlinks=False)
                total += state.st_size if state.st_nlink == 1 else 0
    return total


@dataclass
class DiskWatch:
    """The bytes that stages wrote, and so will write again."""

    folder: Path
    """A folder on the file system of the store."""
    margin: int
    """Bytes that stay free beyond the estimate."""
    advice: Callable[[], str] = str
    """How to free space; called only when the disk is full."""
    free: Callable[[Path], int] = free_bytes
    """Bytes free on the file system of a folder."""
    written: int = 0
    """Bytes that stages wrote in all."""
    _sizes: dict[str, deque[int]] = field(default_factory=dict)
    _found: dict[str, str] = field(default_factory=dict)
    """Stage -> digest of its last result that was in the store."""

    def found(self, stage: str, digest: str) -> None:
        """Note that the result of a stage was in the store."""
        self._found[stage] = digest

    def estimate(self, stage: str, manifest: Callable[[str], Mapping[str, Any]]) -> int:
        """Return the bytes that a stage will write, by `manifest` of its last result; 0 where nothing is known of it."""
        if stage not in self._sizes and stage in self._found:
            with contextlib.suppress(MissingArtifactError):  # not even a description of trained state is here
                files = manifest(self._found[stage])["files"]
                self._sizes[stage] = deque([sum(file["size"] for file in files)], _LAST)
        return max(self._sizes.get(stage, ()), default=0)

    def before(self, stage: str, manifest: Callable[[str], Mapping[str, Any]]) -> None:
        """Raise DiskFullError, with what is needed and what can be done, where a stage would fill the disk."""
        needed, free = self.estimate(stage, manifest), self.free(self.folder)
        if free >= needed + self.margin:
            return
        advice = self.advice()
        raise DiskFullError(
            f"{stage} did not start: it will write about {_text(needed)}, {_text(self.margin)} shall stay free "
            f"(keep.min_free_gb), and {_text(free)} are free on the disk of {self.folder}. Nothing is lost; free space, then "
            f"run the same command again{advice and f': {advice}'}"
        )

    def wrote(self, stage: str, folder: Path) -> None:
        """Note that a stage made the object in `folder`."""
        count = folder_bytes(folder)
        self.written += count
        self._sizes.setdefault(stage, deque(maxlen=_LAST)).append(count)


def _text(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
