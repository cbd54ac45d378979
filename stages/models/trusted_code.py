"""Python code that comes with a model: left behind unless it is asked for by a pin, and run only where the pin says so.

A model of an architecture that transformers lacks brings files of its own (`modeling_x.py`), which loading would run. They
follow the model through the store as what they are, files. Whether they may run is decided anew in every run, by the
digests that its own configuration pins (`trust`), and by nothing that lies in the store: an artifact may come from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pipeline.artifact import ArtifactError
from pipeline.store.context import current_store
from pipeline.store.files import measure

_NAMED: Final = 5
"""Files that a message names."""
_ADAPTER: Final = "adapter_config.json"
"""Next to config.json it makes transformers load further weights. Our adapters have a folder of their own."""


def code_files(folder: Path) -> list[Path]:
    """Return the Python files of a model folder; transformers looks for them next to config.json only."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() == ".py" and file.is_file())


def code_digest(files: list[Path]) -> str:
    """Return the pin of a folder's code, which has no commit: 40 hex digits of a sha256 over names and contents."""
    parts = "".join(f"{file.name} {measure(file)['sha256']}\n" for file in files)
    return hashlib.sha256(parts.encode()).hexdigest()[:40]


def copy_code(source: Path, target: Path, *, name: str) -> None:
    """Copy the code of a model into a checkpoint.

    Args:
        source: what was pinned; the caller has compared it with the pin.
        name: how to call the model.

    Raises:
        ArtifactError: there is no code, or the configuration names code of another repository, which no pin covers.
    """
    files = code_files(source)
    if not files:
        raise ArtifactError(f"{name}: trust_remote_code was asked for and there is no Python file; leave it out")
    _require_own(source, name)
    for file in files:
        shutil.copyfile(file, target / file.name)


def trust(digest: str) -> None:
    """Let code of this digest run in checkpoints of the current store, as long as that is open.

    For what reads a configuration, and for nothing that reads an artifact.
    """
    current_store().trusted.add(digest)


def may_run_code(folder: Path) -> bool:
    """Return whether a loader may run code of the checkpoint in `folder`; asked before every call of transformers on one.

    Returns:
        True: it has code, which is what the running configuration pins. False: it has none.

    Raises:
        ArtifactError: code that is not pinned, code that no pin covers, or an adapter that transformers would load.
    """
    if (folder / _ADAPTER).exists():
        raise ArtifactError(
            f"{folder}: {_ADAPTER} next to the model would load other weights into it; remove the artifact"
        )
    below = sorted(file for file in folder.rglob("*") if file.suffix.lower() == ".py")
    if not below:
        return False
    shown = ", ".join(file.relative_to(folder).as_posix() for file in below[:_NAMED])
    digest = code_digest(files := code_files(folder))
    if digest not in current_store().trusted or files != below:
        raise ArtifactError(
            f"{folder}: the model brings Python code ({shown}), which the running configuration does not pin: none of it ran. "
            f"Code runs only where policy.trust_remote_code=true and policy.revision pin it (of a folder: {digest}); `cohort "
            f"forget {folder.name[:12]}` drops a result that is not yours"
        )
    _require_own(folder, str(folder))
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

    kind = read_object(folder / "config.json").get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING_NAMES:
        return
    if not any(_references(folder)):
        raise ArtifactError(
            f"{name}: transformers {__version__} knows no model_type {kind!r} and the model brings no code for it; take "
            "another version of transformers, or another model"
        )
    raise ArtifactError(
        f"{name}: model_type {kind!r} needs the model's own Python code, which never runs unless asked for. Read that "
        f"code; if you trust it, set {setting}"
    )


def read_object(file: Path) -> dict[str, Any]:
    """Read the JSON object in a file that describes a model; an ArtifactError where there is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: no JSON ({str(error)[:80]}); copy the model again") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{file}: expected a JSON object, found a {type(value).__name__}; copy the model again")
    return value


def _require_own(folder: Path, name: str) -> None:
    for reference in _references(folder):
        if "--" in reference:
            raise ArtifactError(
                f"{name}: auto_map names {reference}, code of another repository, which the revision does not pin; copy "
                "that code into a folder next to the weights and name its own classes in auto_map"
            )


def _references(folder: Path) -> Iterator[str]:
    """Yield the classes that the `auto_map`s of a model name, `module.Class` or `owner/name--module.Class`, in any file."""
    for file in sorted(folder.glob("*.json")):
        yield from _auto_maps(read_object(file))


def _auto_maps(value: Any) -> Iterator[str]:
    match value:
        case dict():
            for key, part in value.items():
                yield from _leaves(part) if key == "auto_map" else _auto_maps(part)
        case list():
            for part in value:
                yield from _auto_maps(part)


def _leaves(value: Any) -> Iterator[str]:
    match value:
        case dict():
            for part in value.values():
                yield from _leaves(part)
        case list():
            for part in value:
                yield from _leaves(part)
        case None:
            pass
        case _:
            yield str(value)
