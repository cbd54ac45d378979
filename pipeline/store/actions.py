"""Records of stage calls: key of a call -> the digest of its result, its metrics and its provenance."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pipeline.store.files import (
    DamagedArtifactError,
    MissingArtifactError,
    canonical_json,
    draft_folder,
    fsync,
    is_digest,
    named_errors,
    printable,
    read_sealed,
    sha256_of,
    write_sealed,
)

LONGEST: Final = 1e10
"""Seconds. Three centuries: no run takes longer, and a calendar has a date for it."""


def _digest(value: str) -> str:
    if not is_digest(value):
        raise ValueError("expected 64 hexadecimal digits")
    return value


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("expected text without control characters")
    return value


def _arguments(value: Any) -> Any:
    """Check recorded arguments: an artifact is named by a digest, never by a path."""
    match value:
        case {"artifact": name} if len(value) == 1:
            _digest(name)
        case dict():
            for part in value.values():
                _arguments(part)
        case list():
            for part in value:
                _arguments(part)
    return value


# Files that others may have written are checked where they are read, and nowhere after that.
Digest = Annotated[str, AfterValidator(_digest)]
Label = Annotated[str, Field(max_length=300), AfterValidator(_printable)]
Moment = Annotated[float, Field(ge=0, le=LONGEST, allow_inf_nan=False)]
"""Seconds since the epoch."""
Seconds = Annotated[float, Field(ge=0, le=LONGEST, allow_inf_nan=False)]
_Arguments = Annotated[dict[str, Any], AfterValidator(_arguments)]
_Metrics = dict[Label, Annotated[float, Field(allow_inf_nan=False)]]


def key_of(stage: str, version: str, arguments: Mapping[str, Any]) -> str:
    """Return the key of a call: a hash of the stage, its version and the described arguments by parameter name."""
    return sha256_of(canonical_json({"stage": stage, "version": version, "arguments": arguments}))


class RecordedCall(BaseModel):
    """The call that made an artifact, as its manifest has it: every field is optional."""

    model_config = ConfigDict(strict=True)

    stage: Label = ""
    version: Label = ""
    arguments: _Arguments = {}
    metrics: _Metrics = {}
    created: Moment = 0.0
    packages: dict[Label, Label] = {}


class Replay(BaseModel):
    """The function of a stage, as `module:name`, and its arguments as far as they are in the key, with their classes."""

    model_config = ConfigDict(strict=True)

    function: Label
    arguments: dict[Label, dict[str, Any]]


class CallRecord(RecordedCall):
    """The record of a stage call; metrics and packages are optional."""

    key: Digest
    result: Digest
    """Digest of data; of trained state the key of the call that made it, which is this one or an input's."""
    content: Digest | None = None
    """Content digest of trained state that this call made; None: the result is named by its content, or was an input."""
    replay: Replay | None = None
    """Of such a call: how to make it again."""
    earlier: list[Digest] = []
    """Content digests that the call came to before, where it was made again and came out differently."""
    stage: Label
    version: Label
    type: Label
    arguments: _Arguments
    seconds: Seconds
    created: Moment
    imported: Label = ""
    """The archive that brought the record; empty: a process that shares this store made it."""


def complaint(error: ValidationError) -> str:
    """Return the first error as one line: `result: expected 64 hexadecimal digits`."""
    first = error.errors(include_url=False)[0]
    place = printable(".".join(map(str, first["loc"])))[:100]
    return f"{place or 'record'}: {first['msg'].removeprefix('Value error, ')}"


def read_call(path: Path) -> dict[str, Any]:
    """Return the record in a sealed file named by its key; every name in it is a digest, every number finite.

    Raise FileNotFoundError without the file, DamagedArtifactError where it was altered or is not the record of that call.
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
    """The records under `actions/` of a store's root: sealed JSON files, one for each stage call."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, key: str) -> Path:
        """Return where the record of a call lies, or would; raise MissingArtifactError for a text that is no key."""
        if not is_digest(key):
            raise MissingArtifactError(f"{key!r:.80} is no key of a call: expected 64 hexadecimal digits")
        return self._root / "actions" / key[:2] / f"{key}.json"

    def write(self, key: str, record: Mapping[str, Any]) -> None:
        """Write or replace a record, durably."""
        with named_errors(self._root), draft_folder(self._root) as draft:
            write_sealed(draft / "record", {**record, "key": key})
            self._place(draft / "record", key)

    def put(self, key: str, sealed: bytes) -> None:
        """Write a record that was sealed elsewhere; it is checked when it is read."""
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
        """Return a record; raise MissingArtifactError where there is none (any more), DamagedArtifactError as `read_call`."""
        path = self.path(key)
        with named_errors(self._root):
            try:
                return read_call(path)
            except FileNotFoundError:
                raise MissingArtifactError(f"no record of the call {key[:12]} in {self._root}; run it again") from None

    def sign(self, key: str, digest: str) -> None:
        """Note, outside of the records, that a call was executed in this folder."""
        with named_errors(self._root), draft_folder(self._root) as draft:
            (draft / key).write_text(digest, encoding="ascii")
            (self._root / "own").mkdir(exist_ok=True)
            os.replace(draft / key, self._root / "own" / key)

    def signed(self, key: str) -> str | None:
        """Return the result of a call that was executed in this folder; None where no such call is known."""
        with contextlib.suppress(OSError, ValueError):
            return (self._root / "own" / key).read_text(encoding="ascii")
        return None

    def remove(self, key: str) -> None:
        """Remove a record, if it is there."""
        with named_errors(self._root):
            self.path(key).unlink(missing_ok=True)

    def keys(self) -> list[str]:
        """Return the keys that have a record, readable or not, in no order."""
        return [path.stem for path in (self._root / "actions").glob("*/*.json") if is_digest(path.stem)]

    def replayable(self, prefix: str) -> list[str]:
        """Return the keys that start with `prefix` of calls that made trained state and can be made again."""
        found = []
        for key in (key for key in self.keys() if key.startswith(prefix)):
            with contextlib.suppress(DamagedArtifactError, MissingArtifactError):
                found += [key] if self.read(key).get("replay") else []
        return found

    def all(self) -> list[dict[str, Any]]:
        """Return the readable records, oldest first."""
        records = []
        for key in self.keys():
            with contextlib.suppress(DamagedArtifactError, MissingArtifactError):
                records.append(self.read(key))
        return sorted(records, key=lambda record: float(record["created"]))
