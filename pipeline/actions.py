"""The records of stage calls in a local folder: key of a call -> the digest of its result, its metrics and its provenance."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.drafts import draft_folder
from pipeline.sealing import (
    DamagedArtifactError,
    MissingArtifactError,
    fsync,
    named_errors,
    read_sealed,
    write_sealed,
)

__all__ = ["Actions"]


class Actions:
    """Sealed JSON files, one for each stage call, under `actions/` of a store's root."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, key: str) -> Path:
        """Where the record of a call lies, or would."""
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
            DamagedArtifactError: its file was altered, or is that of another call.
        """
        path = self.path(key)
        with named_errors(self._root):
            try:
                record = read_sealed(path)
            except FileNotFoundError:
                raise MissingArtifactError(f"no record of the call {key[:12]} in {self._root}; run it again") from None
        if record["key"] != key:
            raise DamagedArtifactError(f"{path} is the record of another call; the next run recomputes it")
        return record

    def remove(self, key: str) -> None:
        """Remove a record, if it is there."""
        with named_errors(self._root):
            self.path(key).unlink(missing_ok=True)

    def keys(self) -> list[str]:
        """The calls that have a record, readable or not, in no order."""
        return [path.stem for path in (self._root / "actions").glob("*/*.json")]

    def all(self) -> Iterator[dict[str, Any]]:
        """The readable records, oldest first."""
        records = []
        for key in self.keys():
            with contextlib.suppress(DamagedArtifactError, MissingArtifactError):
                records.append(self.read(key))
        yield from sorted(records, key=lambda record: float(record.get("created", 0.0)))
