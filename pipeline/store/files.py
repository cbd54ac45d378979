"""Files of a store: JSON sealed with its own hash, measured and fsynced files, drafts, and errors that name the store.

A draft is a folder in which an object or record is written before one rename makes it visible. It belongs to the process that
holds its lock. A draft whose lock is free may be removed: its owner is dead, on this host or another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pipeline.store.locks import locked, try_lock

_LINE_BREAK: Final = re.compile("\n *")  # in a string it is escaped
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
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
