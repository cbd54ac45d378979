"""Python code that comes with a model: left behind unless it is asked for by a pin, and then run only as it was pinned.

A model of an architecture that transformers lacks brings files of its own (`modeling_x.py`), which loading would run. They
enter the store with a record, `trusted_code.json`, that names each with its sha256. Loaders run code of a checkpoint only
where that record stands, and only the files it names; nobody but an import that was asked to can write one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Final

from pipeline.artifact import ArtifactError
from pipeline.sealing import measure

__all__ = ["RECORD", "code_digest", "code_files", "is_trusted", "require_known", "trust_code"]

RECORD: Final = "trusted_code.json"
_NAMED: Final = 5
"""Files that a message names."""


def code_files(folder: Path) -> list[Path]:
    """The Python files of a model folder; transformers looks for them beside config.json only."""
    return sorted(file for file in folder.iterdir() if file.suffix == ".py" and file.is_file())


def code_digest(files: list[Path]) -> str:
    """What pins the code of a folder, which has no commit: 40 hexadecimal digits of a sha256 over names and contents."""
    parts = "".join(f"{file.name} {measure(file)['sha256']}\n" for file in files)
    return hashlib.sha256(parts.encode()).hexdigest()[:40]


def trust_code(source: Path, target: Path, *, pin: str, name: str) -> None:
    """Copy the code of a model into a checkpoint, with the record that lets loaders run it.

    Args:
        pin: the commit or `code_digest` that was asked for; the caller has checked that `source` is that.
        name: how to call the model.

    Raises:
        ArtifactError: there is no code, or the configuration names code of another repository, which no pin covers.
    """
    files = code_files(source)
    if not files:
        raise ArtifactError(f"{name}: trust_remote_code was asked for and there is no Python file; leave it out")
    for reference in _references(source):
        if "--" in reference:
            raise ArtifactError(
                f"{name}: auto_map names {reference}, code of another repository, which the revision does not pin; copy "
                "that code into a folder beside the weights and name its own classes in auto_map"
            )
    for file in files:
        shutil.copyfile(file, target / file.name)
    record = {"pin": pin, "files": {file.name: measure(file)["sha256"] for file in files}}
    (target / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def is_trusted(folder: Path) -> bool:
    """Whether code of a checkpoint may run: it has the record, and its Python files are those of the record.

    Raises:
        ArtifactError: a Python file that the record does not name, lacks, or names with another hash.
    """
    if not (folder / RECORD).is_file():
        return False
    named = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
    found = {file.name: measure(file)["sha256"] for file in code_files(folder)}
    if found != named:
        names = sorted(name for name in {*found, *named} if found.get(name) != named.get(name))
        raise ArtifactError(
            f"{folder}: {', '.join(names[:_NAMED])}: not the code that {RECORD} names; import the model again"
        )
    return True


def require_known(folder: Path, *, setting: str, name: str) -> None:
    """Refuse a model that transformers cannot build without running code of the model's own.

    Args:
        setting: what would allow that, for the message.
        name: how to call the model.

    Raises:
        ArtifactError: an architecture that transformers lacks.
    """
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind in CONFIG_MAPPING_NAMES:
        return
    if not _references(folder):
        raise ArtifactError(
            f"{name}: transformers {__version__} knows no model_type {kind!r} and the model brings no code for it; take "
            "another version of transformers, or another model"
        )
    raise ArtifactError(
        f"{name}: model_type {kind!r} needs the model's own Python code, which never runs unless asked for. Read that "
        f"code; if you trust it, set {setting}"
    )


def _references(folder: Path) -> list[str]:
    """The classes that the `auto_map`s of a model name, `module.Class` or `owner/name--module.Class`."""
    found: list[str] = []
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        mapping = json.loads(file.read_text(encoding="utf-8")).get("auto_map") if file.is_file() else None
        found += [str(part) for part in _leaves(mapping) if part is not None]
    return found


def _leaves(value: Any) -> list[Any]:
    match value:
        case dict():
            return [leaf for part in value.values() for leaf in _leaves(part)]
        case list():
            return [leaf for part in value for leaf in _leaves(part)]
        case _:
            return [value]
