"""The records of stage calls in a local folder: key of a call -> the digest of its result, its metrics and its provenance."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.provenance import CallRecord, complaint
from pipeline.store.drafts import draft_folder
from pipeline.store.files import (
    DamagedArtifactError,
    MissingArtifactError,
    fsync,
    is_digest,
    named_errors,
    read_sealed,
    write_sealed,
)

__all__ = ["Actions", "read_call"]


def read_call(path: Path) -> dict[str, Any]:
    """The record in a sealed file that is named by its key; every name in it is a digest, every number finite.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedArtifactError: it was altered, is that of another call, or lacks a field or has one of another type.
    """
    record = read_sealed(path)
    try:
        CallRecord.model_validate(record)
    except (ValidationError, RecursionError) as error:
        reason = complaint(error) if isinstance(error, ValidationError) else "nested too deeply"
        raise DamagedArtifactError(f"{path} is no record of a call ({reason}); the next run recomputes it") from None
    if record["key"] != path.stem:
        raise DamagedArtifactError(f"{path} is the record of another call; the next run recomputes it")
    return record


class Actions:
    """Sealed JSON files, one for each stage call, under `actions/` of a store's root."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, key: str) -> Path:
        """Where the record of a call lies, or would.

        Raises:
            MissingArtifactError: what is given is no key, and so no part of a path.
        """
        if not is_digest(key):
            raise MissingArtifactError(f"{key!r:.80} is no key of a call: expected 64 hexadecimal digits")
        return self._root / "actions" / key[:2] / f"{key}.json"

    def write(self, key: str, record: Mapping[str, Any]) -> None:
        """Write or replace a record, durably."""
        with named_errors(self._root), draft_folder(self._root) as draft:
            write_sealed(draft / "record", {**record, "key": key})
            self._place(draft / "record", key)

    def put(self, key: str, sealed: bytes) -> None:
        """Write a record that was sealed elsewhere; whether it is sound shows when it is read."""
        with named_errors(self._root), draft_folder(self._root) as draft:
            (draft / "record").write_bytes(sealed)
            (draft / "record").chmod(0o444)
            fsync(draft / "record")
            self._place(draft / "record", key)

    def _place(self, draft: Path, key: str) -> None:
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(draft, path)
        fsync(path.parent)

    def read(self, key: str) -> dict[str, Any]:
        """A record.

        Raises:
            MissingArtifactError: there is none, or it was forgotten.
            DamagedArtifactError: its file was altered, is that of another call, or no record of one.
        """
        path = self.path(key)
        with named_errors(self._root):
            try:
                return read_call(path)
            except FileNotFoundError:
                raise MissingArtifactError(f"no record of the call {key[:12]} in {self._root}; run it again") from None

    def sign(self, key: str, digest: str) -> None:
        """Note, outside of the records, that a call was carried out in this folder."""
        with named_errors(self._root), draft_folder(self._root) as draft:
            (draft / key).write_text(digest, encoding="ascii")
            (self._root / "own").mkdir(exist_ok=True)
            os.replace(draft / key, self._root / "own" / key)

    def signed(self, key: str) -> str | None:
        """What a call came to that was carried out in this folder; None where that is not known."""
        with contextlib.suppress(OSError, ValueError):
            return (self._root / "own" / key).read_text(encoding="ascii")
        return None

    def remove(self, key: str) -> None:
        """Remove a record, if it is there."""
        with named_errors(self._root):
            self.path(key).unlink(missing_ok=True)

    def keys(self) -> list[str]:
        """The calls that have a record, readable or not, in no order."""
        return [path.stem for path in (self._root / "actions").glob("*/*.json") if is_digest(path.stem)]

    def all(self) -> Iterator[dict[str, Any]]:
        """The readable records, oldest first."""
        records = []
        for key in self.keys():
            with contextlib.suppress(DamagedArtifactError, MissingArtifactError):
                records.append(self.read(key))
        yield from sorted(records, key=lambda record: float(record["created"]))
