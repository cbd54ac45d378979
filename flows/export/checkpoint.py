"""Write a checkpoint of the store as a plain Hugging Face folder, with a model card that says how it was made."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from flows.export.model_card import Origin, adapter_card, model_card
from flows.inspection.history import History, find_run, history_of
from flows.runs.paths import Places
from flows.runs.record import RunRecord, read_artifacts, read_records
from pipeline.config import ConfigError
from pipeline.store import PrunedArtifactError, Store
from stages.models import Checkpoint, PlainType, write_plain
from stages.models.folders import ADAPTER_SETTINGS
from stages.training.adapters import adapter_base, write_adapter


def find_origin(places: Places, store: Store, what: str) -> Origin:
    """Return the checkpoint that `what` names: the final policy of a run, or a digest or its beginning.

    Raises:
        ConfigError: a run without a final policy, or an artifact that is no checkpoint.
        StoreError: nothing of that name.
    """
    record = find_run(places, what)
    if record is not None and not record.policy:
        raise ConfigError(
            f"{what}: the run has no final policy yet ({record.steps} of {record.total_steps} steps); continue it, or export "
            "the policy of a step by its digest, which `cohort show` lists"
        )
    digest = record.policy if record else store.resolve(what)
    with contextlib.suppress(PrunedArtifactError):
        store.path(digest)  # trained state that is gone is made again
    manifest = store.manifest(digest)
    names = {file["name"] for file in manifest["files"]}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise ConfigError(
            f"{digest[:12]} is no checkpoint ({manifest.get('type', 'unknown')}); `cohort show RUN` lists the policies of a run"
        )
    record = record or _run_of(places, digest)
    history = history_of(places, store, record) if record else None
    return Origin(Checkpoint(digest), history, _step_of(history, digest) if history else None)


def export_checkpoint(
    store: Store, origin: Origin, folder: Path, *, dtype: PlainType, shard_bytes: int, force: bool
) -> list[Path]:
    """Write the folder and return its files: all of it is there, or nothing was touched.

    Args:
        force: replace the model that the folder holds.

    Raises:
        ConfigError: a folder that holds anything, without `force`; with it, one that holds no model.
        PrunedArtifactError: the payload is gone; names the command that computes it again.
    """
    with _drafted(store, origin, folder, force=force) as (draft, target):
        write_plain(origin.checkpoint, draft, dtype=dtype, shard_bytes=shard_bytes)
        if origin.run and (template := origin.run.config.prompt.own_template()) is not None:
            (draft / "chat_template.jinja").write_text(template, encoding="utf-8")
        (draft / "README.md").write_text(model_card(store, origin, draft, dtype=dtype), encoding="utf-8")
    return sorted(target.iterdir())


def export_adapter(store: Store, origin: Origin, folder: Path, *, base: str | None, force: bool) -> list[Path]:
    """Write the adapter alone, in peft's format with a card, and return its files.

    Args:
        base: name or path of the base model for adapter_config.json; None: the base's digest.
        force: replace the adapter that the folder holds.

    Raises:
        ConfigError, PrunedArtifactError: as `export_checkpoint`.
        ArtifactError: the checkpoint has no adapter.
    """
    with _drafted(store, origin, folder, force=force, kind="adapter", marker=ADAPTER_SETTINGS) as (draft, target):
        write_adapter(origin.checkpoint, draft, base=base)
        card = adapter_card(store, origin, draft, base=adapter_base(origin.checkpoint) or "")
        (draft / "README.md").write_text(card, encoding="utf-8")
    return sorted(target.iterdir())


@contextlib.contextmanager
def _drafted(
    store: Store, origin: Origin, folder: Path, *, force: bool, kind: str = "model", marker: str = "config.json"
) -> Iterator[tuple[Path, Path]]:
    """Yield a draft and the folder whose place it takes at the end of the block, unless the block fails."""
    target = folder.expanduser().resolve()
    _check_target(target, force=force, kind=kind, marker=marker)
    store.path(origin.checkpoint.digest)  # a pruned or damaged checkpoint is refused before anything is written
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    draft.mkdir()
    try:
        yield draft, target
        _place(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _run_of(places: Places, digest: str) -> RunRecord | None:
    """Return the latest run whose final policy is the checkpoint, else the latest that used it."""
    records = list(read_records(places))[::-1]
    final = [record for record in records if record.policy == digest]
    used = [record for record in records if digest in read_artifacts(record.folder)]
    return next(iter([*final, *used]), None)


def _step_of(history: History, digest: str) -> int | None:
    steps = [step for step, made in history.ledger.steps.items() if made.get("update_policy") == digest]
    if steps:
        return max(steps)  # an update without a gradient returns the policy it was given
    return max(history.ledger.steps, default=0) if history.record.policy == digest else None


def _check_target(target: Path, *, force: bool, kind: str, marker: str) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; name a folder")
    held = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    if held and not force:
        raise ConfigError(
            f"{target} is not empty (it holds {held[0]}); name another folder, or replace its {kind} with --force"
        )
    if held and marker not in held:
        raise ConfigError(
            f"{target} holds no {kind} that --force could replace (it holds {held[0]}); name another folder"
        )


def _place(draft: Path, target: Path) -> None:
    """Move the draft to its place; in a folder that holds a model, file by file over that model."""
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    if not target.exists():
        draft.rename(target)
        return
    for stale in [*target.glob("*.safetensors"), *target.glob("*.safetensors.index.json")]:
        stale.unlink()  # the weights of two models in one folder would be read as one
    for file in draft.iterdir():
        os.replace(file, target / file.name)
