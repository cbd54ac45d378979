"""One object: a sealed folder whose `manifest.json` names every file with size and sha256.

The content digest of an object covers names, sizes and hashes of the payload, and the schema. The rest of the manifest (type,
rows, provenance) is not part of it. Data is named by it: equal content has one name. Trained state is named by its derivation,
the key of the call in the manifest's provenance; its manifest may name files as unwritten, which are added later or never.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.store.actions import Digest, Label, RecordedCall, complaint, key_of
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
    digest: Digest
    layout: str | None = Field(alias="schema")
    type: Label = "artifact"
    rows: Annotated[int, Field(ge=0)] = 0
    provenance: RecordedCall | None = None
    unwritten: list[str] = []
    """Files of trained state that were not written: whoever reads them has the calls replayed that made them."""
    state: Digest | None = None
    """A random name of the state in memory that was not written, or was written later; None: written at once."""


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
    names = [*(file["name"] for file in manifest["files"]), *described.unwritten]
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


def verify_folder(folder: Path) -> list[str]:
    """Check presence, size and sha256 of every file that was not pruned, and that there is no other file.

    Arrow and safetensors files have no checksum of their own.

    Returns:
        The files that were not written.

    Raises:
        MissingArtifactError, DamagedArtifactError, PrunedArtifactError: with the file and what to do.
    """
    manifest = read_manifest(folder)
    files = manifest["files"]
    freed = freed_files(folder, files)
    if (folder / PRUNED).exists() and freed == {file["name"] for file in files}:
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
    # Another file would be read with the payload (an adapter in a model folder); hidden files are the system's. Unwritten
    # ones come before the manifest that names them.
    unwritten: list[str] = manifest.get("unwritten", [])
    expected = {folder / MANIFEST, folder / PRUNED, *(folder / name for name in unwritten)}
    expected.update(folder / file["name"] for file in files)
    for path in folder.rglob("*"):
        plain_folder = path.is_dir() and not path.is_symlink()
        if not plain_folder and path not in expected and not path.name.startswith("."):
            raise DamagedArtifactError(f"{path} does not belong to this artifact; the next run recomputes it")
    return unwritten


def is_own_file(folder: Path, name: str) -> bool:
    """Return whether `name` is a plain file of an object, and neither it nor a folder above it is a link."""
    places = [folder, *(folder / part for part in reversed(PurePosixPath(name).parents[:-1])), folder / name]
    return not any(place.is_symlink() for place in places) and places[-1].is_file()


def recomputed(digest: str) -> str:
    """Return how to get a pruned artifact back, as the end of a sentence about it."""
    return f"was pruned to free space; `cohort forget {digest[:12]}` and the same run again recompute it"
