"""`cohort export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.markup import escape

from flows.commands.options import Flag, Root, console
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
    completions: Flag = False,
    format: Literal["lines", "atif"] | None = None,
    step: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    root: Root = None,
) -> None:
    """Write a checkpoint as a folder that `AutoModelForCausalLM.from_pretrained` loads without Cohort; or completions.

    Parameters
    ----------
    what
        A run of `cohort runs`, whose final policy is meant, or the digest of a checkpoint or its beginning.
    folder
        Where to; made if it is not there, and refused if it holds anything. With --completions: the file.
    dtype
        Of the weights: bfloat16, the default, halves the size and rounds; float32 is what training holds.
    shard_gb
        Largest weight file; default: 5.
    force
        Replace the model that the folder holds, or the file.
    adapter
        Only the LoRA adapter, which `PeftModel.from_pretrained(base_model, FOLDER)` loads; without it, the merged weights.
    base
        With --adapter: the base model's name or path, for adapter_config.json. Left out, it is the base's digest.
    completions
        The outputs that a run sampled, as JSON lines: prompt, chat messages, completion, lengths, reward and its components,
        advantage, step, policy.
    format
        With --completions: lines, the default, or atif, a trajectory of Harbor's Agent Trajectory Interchange Format each.
    step
        With --completions: those of this step only.
    """
    if completions:
        if adapter or base is not None or dtype is not None or shard_gb is not None:
            raise ConfigError("--completions writes no weights; leave out --dtype, --shard-gb, --adapter and --base")
        _completions(what, folder, step=step, force=force, atif=format == "atif", root=root)
        return
    if step is not None:
        raise ConfigError("--step is read with --completions; `cohort show RUN` lists the policies of steps by digest")
    if format is not None:
        raise ConfigError("--format is read with --completions; a model is written as transformers loads it")
    if base is not None and not adapter:
        raise ConfigError("--base names the base of an adapter; export one with --adapter")
    if adapter and (dtype is not None or shard_gb is not None):
        raise ConfigError("--adapter: an adapter is written as it is, in one file; leave out --dtype and --shard-gb")
    if adapter:
        _adapter(what, folder, base=base, force=force, root=root)
    else:
        _model(
            what, folder, dtype=dtype or "bfloat16", shard_bytes=int((shard_gb or 5.0) * _GB), force=force, root=root
        )


def _model(
    what: str,
    folder: Path,
    *,
    dtype: Literal["bfloat16", "float32"],
    shard_bytes: int,
    force: bool,
    root: Path | None,
) -> None:
    from flows.export.checkpoint import export_checkpoint, find_origin

    places = Places.under(root)
    with use_store(places.open_store()) as store:
        origin = find_origin(places, store, what)
        files = export_checkpoint(store, origin, folder, dtype=dtype, shard_bytes=shard_bytes, force=force)
    _say(files, f"{origin.checkpoint.digest[:12]} as {dtype}")


def _adapter(what: str, folder: Path, *, base: str | None, force: bool, root: Path | None) -> None:
    from flows.export.checkpoint import export_adapter, find_origin
    from stages.training.adapters import adapter_base

    places = Places.under(root)
    with use_store(places.open_store()) as store:
        origin = find_origin(places, store, what)
        files = export_adapter(store, origin, folder, base=base, force=force)
        begun = str(adapter_base(origin.checkpoint))[:12]
    note = f"it belongs on {begun}: `cohort export {begun} FOLDER --dtype float32`"
    _say(files, f"the adapter of {origin.checkpoint.digest[:12]}", note)


def _say(files: list[Path], what: str, *notes: str) -> None:
    out = console()
    for file in files:
        out.print(f"{size(file.stat().st_size):>9}  {file.name}", highlight=False)
    out.print(f"\nexported {what} to [cyan]{escape(str(files[0].parent))}[/]", soft_wrap=True)
    for note in (*notes, "the license in README.md is for you to fill in before you publish it"):
        out.print(note, style="dim", soft_wrap=True)


def _completions(what: str, file: Path, *, step: int | None, force: bool, atif: bool, root: Path | None) -> None:
    from flows.export.completions import export_completions

    places, out = Places.under(root), console()
    with use_store(places.open_store()) as store:
        count = export_completions(places, store, what, file, step=step, force=force, atif=atif)
    of_step = "" if step is None else f" of step {step}"
    out.print(f"exported {count:,} outputs{of_step} to [cyan]{escape(str(file))}[/]", soft_wrap=True)
