"""`cohort export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.markup import escape

from flows.commands.options import Root, console
from flows.runs.paths import Places
from flows.wording import size
from pipeline.config import ConfigError
from pipeline.store import use_store

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
    from flows.export.checkpoint import export_adapter, export_checkpoint, find_origin
    from stages.training.adapters import adapter_base

    if base is not None and not adapter:
        raise ConfigError("--base names the base of an adapter; export one with --adapter")
    if adapter and (dtype is not None or shard_gb is not None):
        raise ConfigError("--adapter: an adapter is written as it is, in one file; leave out --dtype and --shard-gb")
    dtype, shard_bytes = dtype or "bfloat16", int((shard_gb or 5.0) * _GB)
    places, out = Places.under(root), console()
    with use_store(places.open_store()) as store:
        origin = find_origin(places, store, what)
        if adapter:
            files = export_adapter(store, origin, folder, base=base, force=force)
            begun = str(adapter_base(origin.checkpoint))[:12]
        else:
            files = export_checkpoint(store, origin, folder, dtype=dtype, shard_bytes=shard_bytes, force=force)
    for file in files:
        out.print(f"{size(file.stat().st_size):>9}  {file.name}", highlight=False)
    name = origin.checkpoint.digest[:12]
    kind = f"the adapter of {name}" if adapter else f"{name} as {dtype}"
    out.print(f"\nexported {kind} to [cyan]{escape(str(files[0].parent))}[/]", soft_wrap=True)
    if adapter:
        out.print(f"it belongs on {begun}: `cohort export {begun} FOLDER --dtype float32`", style="dim", soft_wrap=True)
    out.print("the license in README.md is for you to fill in before you publish it", style="dim")
