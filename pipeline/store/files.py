"""Bytes on disk that can be trusted: JSON with a hash of itself, measured and fsynced files, errors that name the store."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

__all__ = [
    "DamagedArtifactError",
    "MissingArtifactError",
    "PrunedArtifactError",
    "StoreError",
    "canonical_json",
    "sha256_of",
]

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
    """One text per value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(text: str) -> str:
    """Hexadecimal sha256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a new read-only JSON file that ends in its own hash, and fsync it."""
    with open(path, "x", encoding="utf-8") as handle:
        handle.write(_sealed_text(value))
        handle.flush()
        os.fsync(handle.fileno())
    path.chmod(0o444)


def read_sealed(path: Path) -> dict[str, Any]:
    """The value in a sealed file.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedArtifactError: any of its bytes differs from what `write_sealed` wrote, line breaks and indentation apart: these
            a parser ignores.
    """
    try:
        return parse_sealed(path.read_bytes())
    except ValueError as error:
        raise DamagedArtifactError(f"{path} is damaged ({error}); the next run recomputes it") from None


def parse_sealed(content: bytes) -> dict[str, Any]:
    """The value in the bytes of a sealed file; raises ValueError where they differ from what `write_sealed` writes."""
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


def _sealed_text(value: Mapping[str, Any]) -> str:
    seal = sha256_of(canonical_json(value))
    return json.dumps({**value, "seal": seal}, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)


def measure(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, as manifests hold them."""
    with open(path, "rb") as handle:
        return {"size": os.fstat(handle.fileno()).st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def signature(folder: Path) -> Signature:
    """What changes when anything in a folder does, without reading it: name, size, mtime and inode of every entry."""
    entries = []
    with contextlib.suppress(FileNotFoundError):  # removed meanwhile: then the signature differs, as it must
        for path in folder.rglob("*"):
            state = path.lstat()
            entries.append((path.relative_to(folder).as_posix(), state.st_size, state.st_mtime_ns, state.st_ino))
    return tuple(sorted(entries))


def is_digest(value: object) -> bool:
    """Whether a value can be the name of an artifact or the key of a call: 64 hexadecimal digits in lower case."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def is_plain_name(value: object) -> bool:
    """Whether a value can name a file inside a folder: relative, with `/` alone, without `.`, `..` and invisible characters.

    Whoever reads a name that others wrote asks this before the name becomes a path.
    """
    if not isinstance(value, str) or not value.isprintable() or "\\" in value:
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in value.split("/"))


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def named_errors(root: Path) -> Iterator[None]:
    """Turn a bare OSError of the file system into one that names the store and says what to do."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"the store {root} cannot be used: {error.strerror or error} ({error.filename or root}). "
            "Nothing half-written is visible; free space or mend permissions, then run the same command again"
        ) from error
