"""One object of the store: a folder whose `manifest.json` names every file with size and sha256.

The digest covers names, sizes and hashes of the payload and the schema; what else the manifest says (type, rows, provenance) is
no part of it, so that equal content has one name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pipeline.sealing import (
    DamagedArtifactError,
    MissingArtifactError,
    PrunedArtifactError,
    StoreError,
    canonical_json,
    fsync,
    measure,
    read_sealed,
    sha256_of,
    stays_inside,
    write_sealed,
)

__all__ = ["MANIFEST", "PRUNED", "freed_files", "read_manifest", "recomputed", "seal_folder", "verify_folder"]

MANIFEST: Final = "manifest.json"
PRUNED: Final = "pruned.json"


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
        DamagedArtifactError: the manifest is missing, altered, another object's, or names a file outside of the folder.
    """
    if not folder.exists():
        raise MissingArtifactError(f"no artifact {folder.name} at {folder}; run the command that made it again")
    try:
        manifest = read_sealed(folder / MANIFEST)
    except FileNotFoundError:
        raise DamagedArtifactError(f"{folder / MANIFEST} is missing; the next run recomputes it") from None
    inside = all(stays_inside(file["name"]) for file in manifest["files"])
    if not inside or digest_of(manifest["files"], manifest["schema"]) != folder.name:
        raise DamagedArtifactError(f"{folder / MANIFEST} does not describe {folder.name}; the next run recomputes it")
    return manifest


def freed_files(folder: Path, files: list[dict[str, Any]]) -> frozenset[str]:
    """Names of the payload's files that `prune` freed; none where it never did.

    Args:
        files: of the manifest.

    Raises:
        DamagedArtifactError: the note of what was freed was altered.
    """
    try:
        note = read_sealed(folder / PRUNED)
    except FileNotFoundError:
        return frozenset()
    # Without a list it is the note of a store that only knew whole payloads.
    return frozenset(note.get("files", [file["name"] for file in files]))


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
        found = measure(path) if path.is_file() else None
        if found != {"size": file["size"], "sha256": file["sha256"]}:
            state = "is missing" if found is None else "was altered (its size or sha256 is not the manifest's)"
            raise DamagedArtifactError(f"{path} {state}; the next run recomputes it")
    # A stranger would be read with the payload (an adapter in a model folder); hidden files are the system's.
    expected = {folder / MANIFEST, folder / PRUNED, *(folder / file["name"] for file in files)}
    for path in folder.rglob("*"):
        if path.is_file() and path not in expected and not path.name.startswith("."):
            raise DamagedArtifactError(f"{path} does not belong to this artifact; the next run recomputes it")


def recomputed(digest: str) -> str:
    """What to say of an artifact that was pruned."""
    return f"was pruned to free space; `cohort forget {digest[:12]}` and the same run again recompute it"
