"""`cohort doctor`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from flows.commands.options import ConfigFiles, Root, Settings, console
from flows.doctor.examination import Report, examine
from flows.doctor.subject import Subject, subject_of
from flows.doctor.view import as_json, print_report
from flows.places import Places
from pipeline.config import ConfigError

__all__ = ["doctor"]


def doctor(
    recipe: str | None = None,
    *,
    config: ConfigFiles = None,
    set_: Settings = None,
    vllm_python: Annotated[Path | None, Parameter(name="--vllm-python")] = None,
    quick: Annotated[bool, Parameter(negative="")] = False,
    bench: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
    root: Root = None,
) -> int:
    """Say whether this machine can run Cohort, and what to mend: versions, devices, store, servers, environment.

    Exit code 0 when nothing stops a run, 1 otherwise. Nothing is changed: what is written to test the root is removed.

    Parameters
    ----------
    recipe
        Also what this recipe or YAML file needs: its engine for rollouts, its ranks. Without one: what any run needs.
    config
        YAML file of overrides.
    set_
        `key=value`.
    vllm_python
        Interpreter of the environment that has vLLM.
    quick
        Import nothing heavy: versions, store, servers and environment in about a second.
    bench
        Instead measure what this machine computes, moves and writes in a second, for `cohort plan` (about a minute; on a quiet
        machine). The figures are kept in device.json below the root.
    json
        One JSON object instead of the table.
    root
        Folder of store, runs and databases.
    """
    if recipe is None and (config or set_):
        raise ConfigError("doctor: --config and --set change a recipe; name it: cohort doctor RECIPE --set key=value")
    if quick and vllm_python:
        raise ConfigError("doctor: --quick imports nothing heavy, vLLM included; leave out --vllm-python or --quick")
    if bench:
        if quick or recipe or vllm_python:
            raise ConfigError(
                "doctor: --bench measures the machine, whatever the recipe and the engine and never quickly; leave out the rest"
            )
        return _bench(Places.under(root), json=json)
    from flows.choice import choose  # all configs, a second that a machine is examined without

    chosen = choose(recipe, config or [], set_ or []).config if recipe else None
    subject = subject_of(Places.under(root), dict(os.environ), quick=quick, vllm_python=vllm_python, config=chosen)
    if json:
        report = examine(subject)
        print(as_json(report))
    else:
        report = _watched(subject, console())
        print_report(report, console())
    return 1 if report.verdict == "problem" else 0


def _bench(places: Places, *, json: bool) -> int:
    """Measure, keep and print the rates."""
    from flows.doctor.bench import bench
    from flows.doctor.view import print_profile

    out = console()
    with out.status("importing ...") as status:
        profile = bench(places, announce=lambda text: status.update(f"{text} ..."))
    if json:
        print(profile.model_dump_json(indent=2))
    else:
        print_profile(profile, out)
    return 0


def _watched(subject: Subject, out: Console) -> Report:
    """The report; meanwhile a terminal says which of the heavy checks it waits for."""
    with out.status("looking ...") as status:
        return examine(subject, announce=lambda name: status.update(f"{name}: other processes import it ..."))
