"""`cohort export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.markup import escape

from flows.commands.options import Root, console
from flows.runs.paths import Places
from flows.wording import size
from pipeline.config import ConfigError
from pipeline.store import Store, use_store

if TYPE_CHECKING:
    from flows.export.checkpoint import Origin

__all__ = ["export"]

_GB = 1_000_000_000


def export(
    what: str,
    folder: Path,
    *,
    dtype: Literal["bfloat16", "float32"] | None = None,
    shard_gb: Annotated[float | None, Parameter(name="--shard-gb", validator=Number(gt=0))] = None,
    force: bool = False,
    adapter: bool = False,
    base: str | None = None,
    root: Root = None,
) -> None:
    """Write a checkpoint as a folder that `AutoModelForCausalLM.from_pretrained` loads without Cohort.

    Parameters
    ----------
    what
        A run of `cohort runs`, whose final policy is meant, or the digest of a checkpoint or its beginning.
    folder
        Where to; made if it is not there, and refused if it holds anything.
    dtype
        Of the weights: bfloat16, the default, halves the size and rounds; float32 is what training holds.
    shard_gb
        Largest weight file; default: 5.
    force
        Replace the model that the folder holds.
    adapter
        Only the LoRA adapter, which `PeftModel.from_pretrained(base_model, FOLDER)` loads; without it, the merged weights.
    base
        With --adapter: the base model's name or path, for adapter_config.json. Left out, it is the base's digest.
    """
    from flows.export.checkpoint import export_checkpoint, find_origin

    if base is not None and not adapter:
        raise ConfigError("--base names the base of an adapter; export one with --adapter")
    if adapter and (dtype is not None or shard_gb is not None):
        raise ConfigError("--adapter: an adapter is written as it is, in one file; leave out --dtype and --shard-gb")
    dtype, shard_gb = dtype or "bfloat16", shard_gb or 5.0
    places, out = Places.under(root), console()
    with use_store(places.open_store()) as store:
        origin = find_origin(places, store, what)
        if adapter:
            _export_adapter(store, origin, folder, base, force)
            return
        files = export_checkpoint(store, origin, folder, dtype=dtype, shard_bytes=int(shard_gb * _GB), force=force)
    for file in files:
        out.print(f"{size(file.stat().st_size):>9}  {file.name}", highlight=False)
    out.print(
        f"\nexported {origin.checkpoint.digest[:12]} as {dtype} to [cyan]{escape(str(files[0].parent))}[/]",
        soft_wrap=True,
    )
    out.print("the license in README.md is for you to fill in before you publish it", style="dim")


def _export_adapter(store: Store, origin: Origin, folder: Path, base: str | None, force: bool) -> None:
    from flows.export.checkpoint import export_adapter
    from stages.training.adapters import adapter_base

    checkpoint = origin.checkpoint
    files, out = export_adapter(store, origin, folder, base=base, force=force), console()
    for file in files:
        out.print(f"{size(file.stat().st_size):>9}  {file.name}", highlight=False)
    out.print(
        f"\nexported the adapter of {checkpoint.digest[:12]} to [cyan]{escape(str(files[0].parent))}[/]", soft_wrap=True
    )
    begun = str(adapter_base(checkpoint))[:12]
    out.print(f"it belongs on {begun}: `cohort export {begun} FOLDER --dtype float32`", style="dim", soft_wrap=True)
    out.print("the license in README.md is for you to fill in before you publish it", style="dim")
