"""One object of the store: a folder whose `manifest.json` names every file with size and sha256.

The digest covers names, sizes and hashes of the payload and the schema; what else the manifest says (type, rows, provenance) is
no part of it, so that equal content has one name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.provenance import Digest, Label, RecordedCall, complaint
from pipeline.store.files import (
    DamagedArtifactError,
    MissingArtifactError,
    PrunedArtifactError,
    StoreError,
    canonical_json,
    fsync,
    is_plain_name,
    measure,
    read_sealed,
    sha256_of,
    write_sealed,
)

__all__ = [
    "MANIFEST",
    "PRUNED",
    "freed_files",
    "is_own_file",
    "read_manifest",
    "recomputed",
    "seal_folder",
    "verify_folder",
]

MANIFEST: Final = "manifest.json"
PRUNED: Final = "pruned.json"


class _File(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    size: Annotated[int, Field(ge=0)]
    sha256: Digest


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True)

    files: list[_File]
    layout: str | None = Field(alias="schema")
    type: Label = "artifact"
    rows: Annotated[int, Field(ge=0)] = 0
    provenance: RecordedCall | None = None


def digest_of(files: list[dict[str, Any]], schema: str | None) -> str:
    """The name of content: a hash of file names, sizes, hashes and schema."""
    return sha256_of(canonical_json({"files": files, "schema": schema}))


def seal_folder(folder: Path, about: Mapping[str, Any], schema: str | None) -> str:
    """Make a draft an object that can be renamed into place: measured, read-only, fsynced, manifest last.

    Raises:
        StoreError: an entry that is no plain file (a link may change, or lead out of the store) or has a name of the store's.
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
    """The manifest of the object in `folder`, which is named by its digest.

    Raises:
        MissingArtifactError: there is no such folder.
        DamagedArtifactError: the manifest is missing, altered, another object's, lacks a field or has one of another type, or
            names a file outside of the folder.
    """
    if not folder.exists():
        raise MissingArtifactError(f"no artifact {folder.name} at {folder}; run the command that made it again")
    if folder.is_symlink() or (folder / MANIFEST).is_symlink():
        raise DamagedArtifactError(f"{folder / MANIFEST} lies behind a link; the next run recomputes it")
    try:
        manifest = read_sealed(folder / MANIFEST)
        _Manifest.model_validate(manifest)
    except FileNotFoundError:
        raise DamagedArtifactError(f"{folder / MANIFEST} is missing; the next run recomputes it") from None
    except (ValidationError, RecursionError) as error:
        reason = complaint(error) if isinstance(error, ValidationError) else "nested too deeply"
        raise DamagedArtifactError(
            f"{folder / MANIFEST} does not describe {folder.name} ({reason}); the next run recomputes it"
        ) from None
    names = [file["name"] for file in manifest["files"]]
    fit = all(is_plain_name(name) and name not in (MANIFEST, PRUNED) for name in names) and len({*names}) == len(names)
    if not fit or digest_of(manifest["files"], manifest["schema"]) != folder.name:
        raise DamagedArtifactError(f"{folder / MANIFEST} does not describe {folder.name}; the next run recomputes it")
    return manifest


def freed_files(folder: Path, files: list[dict[str, Any]]) -> frozenset[str]:
    """Names of the payload's files that `prune` freed; none where it never did.

    Args:
        files: of the manifest.

    Raises:
        DamagedArtifactError: the note of what was freed was altered, or names what is none of the payload.
    """
    try:
        note = read_sealed(folder / PRUNED)
    except FileNotFoundError:
        return frozenset()
    payload, freed = {file["name"] for file in files}, note.get("files")
    if not isinstance(freed, list) or not all(isinstance(name, str) and name in payload for name in freed):
        raise DamagedArtifactError(
            f"{folder / PRUNED} names files that are not this artifact's; the next run recomputes it"
        )
    return frozenset(freed)


def verify_folder(folder: Path) -> None:
    """Check presence, size and sha256 of every file (Arrow and safetensors have no checksum), and that there is no other.

    Where a part was freed, the rest is checked.

    Raises:
        MissingArtifactError, DamagedArtifactError, PrunedArtifactError: with the file and what to do.
    """
    files = read_manifest(folder)["files"]
    names = {file["name"] for file in files}
    freed = freed_files(folder, files)
    if (folder / PRUNED).exists() and freed == names:
        raise PrunedArtifactError(f"artifact {folder.name[:12]} {recomputed(folder.name)}")
    for file in files:
        if file["name"] in freed:
            continue
        path = folder / file["name"]
        found = measure(path) if is_own_file(folder, file["name"]) else None
        if found != {"size": file["size"], "sha256": file["sha256"]}:
            state = (
                "is missing, or a link" if found is None else "was altered (its size or sha256 is not the manifest's)"
            )
            raise DamagedArtifactError(f"{path} {state}; the next run recomputes it")
    # A stranger would be read with the payload (an adapter in a model folder); hidden files are the system's.
    expected = {folder / MANIFEST, folder / PRUNED, *(folder / file["name"] for file in files)}
    for path in folder.rglob("*"):
        plain_folder = path.is_dir() and not path.is_symlink()
        if not plain_folder and path not in expected and not path.name.startswith("."):
            raise DamagedArtifactError(f"{path} does not belong to this artifact; the next run recomputes it")


def is_own_file(folder: Path, name: str) -> bool:
    """Whether `name` is a plain file of an object, and neither it nor a folder above it a link to what is none of it."""
    places = [folder, *(folder / part for part in reversed(PurePosixPath(name).parents[:-1])), folder / name]
    return not any(place.is_symlink() for place in places) and places[-1].is_file()


def recomputed(digest: str) -> str:
    """What to say of an artifact that was pruned."""
    return f"was pruned to free space; `cohort forget {digest[:12]}` and the same run again recompute it"
