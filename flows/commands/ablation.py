"""`cohort ablate`, `compare`, and what runs one arm in a process of its own."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.choice import Choice
from flows.commands.options import ConfigFiles, Root, Settings, console, debugging
from flows.experiments.ablation import (
    conclude,
    earlier_settings,
    outcomes_of,
    reasons,
    tables_file,
    track_experiment,
)
from flows.experiments.arms import PlannedExperiment, method_experiment, plan
from flows.experiments.comparison import print_comparison
from flows.experiments.report import report_file
from flows.experiments.results import Sharing, experiment_folder
from flows.experiments.running import ChildConfig, is_finished, run_in_turn, run_side_by_side
from flows.experiments.studies import EXPERIMENTS, named_experiment
from flows.methods import PAPER
from flows.places import Places
from flows.records import read_record, run_folder
from flows.session import run_flow
from flows.wording import duration, number
from pipeline.config import ConfigError, parse_settings
from pipeline.orchestration import Engine

__all__ = ["ablate", "child", "compare", "experiments"]

EngineOption = Annotated[Literal["prefect", "inline"], Parameter(name="--engine", help="inline: no server")]

Flag = Annotated[bool, Parameter(negative="")]


def ablate(
    name: str,
    *,
    arm: Annotated[list[str] | None, Parameter(name="--arm", negative="")] = None,
    seeds: str | None = None,
    quick: Flag = False,
    paper: Flag = False,
    parallel: Annotated[int, Parameter(validator=Number(gte=1))] = 1,
    dry_run: Flag = False,
    config: ConfigFiles = None,
    set_: Settings = None,
    engine: EngineOption = "prefect",
    root: Root = None,
) -> None:
    """Run the arms of an experiment, computing what they share once, and print what came of them.

    Every arm with every seed is a run of its own (`cohort runs`, MLflow). The same command again continues, and computes
    nothing that is there; an arm that is added later computes what is its own. The last lines say how many stage calls were
    asked for, computed and reused, and where results and tables lie.

    Parameters
    ----------
    name
        An experiment (`cohort experiments`), or a YAML file with name, asks, base, arms, baseline and seeds.
    arm
        Run this arm only; may be given several times.
    seeds
        `3`: three seeds, counted up from the experiment's first; `0,1,2`: these.
    quick
        A study of the paper in smaller sizes.
    paper
        A study of the paper with its model and numbers, for machines that hold them.
    parallel
        Runs at a time, each in a process of its own; 1 = one after the other, in this process.
    dry_run
        Print the arms and what differs from the baseline; run nothing.
    config
        YAML file of overrides for every arm; may be given several times.
    set_
        `key=value` for every arm, after its own overrides.
    engine
        As for `cohort run`.
    root
        As for `cohort run`.
    """
    if "seed" in parse_settings(set_ or []):
        raise ConfigError("--set seed: the seeds of an experiment are given by --seeds, for example --seeds 4,5")
    experiment = named_experiment(name, scale=_scale(quick, paper))
    if seeds is not None:
        experiment = experiment.override({"seeds": _seeds(seeds, experiment.seeds[0])}, source="--seeds")
    planned = plan(experiment, files=config or [], settings=set_ or [], only=arm or [])
    places, out = Places.under(root), console()
    _introduce(planned, places, out)
    if not dry_run:
        _conduct(planned, places, engine, parallel, out)


def compare(
    recipe: str,
    *,
    method: Annotated[list[str] | None, Parameter(name="--method", negative="")] = None,
    seeds: Annotated[int, Parameter(validator=Number(gte=1))] = 1,
    config: ConfigFiles = None,
    set_: Settings = None,
    engine: EngineOption = "prefect",
    root: Root = None,
) -> None:
    """Train a recipe by several methods from one supervised policy, on equally many outputs, and print what came of it.

    An experiment whose arms are methods (`cohort ablate`). An arm is what `cohort run RECIPE --method METHOD` trains, with one
    seed. Printed at the end: accuracy before and after by held-out set, then outputs, time, memory and critic; also written,
    with every setting, to a markdown file that the last lines name.

    Parameters
    ----------
    recipe
        Name of a recipe or a YAML file: everything but the method. The policy it starts RL from is that of every arm.
    method
        A method (`cohort methods`), several times for several: --method grpo --method ppo. Default: all six of Table 10.
    seeds
        Runs per method, each with the next seed (questions, outputs); the table shows mean (lowest-highest).
    config
        YAML file of overrides for every arm; may be given several times.
    set_
        `key=value` for every arm, after its method; one that a method does not know is refused before anything runs.
    engine
        As for `cohort run`.
    root
        As for `cohort run`.
    """
    planned = method_experiment(recipe, method or PAPER, seeds, files=config or [], settings=set_ or [])
    places, out = Places.under(root), console()
    _conduct(planned, places, engine, 1, out)


def experiments(name: str | None = None, *, quick: Flag = False, paper: Flag = False) -> None:
    """List the paper's studies as experiments, or print one as YAML (a start for a file of your own).

    Parameters
    ----------
    name
        The experiment to print.
    quick
        In smaller sizes.
    paper
        With the paper's model and numbers.
    """
    if name:
        print(named_experiment(name, scale=_scale(quick, paper)).to_yaml(), end="")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for each in EXPERIMENTS:
        experiment = named_experiment(each)
        table.add_row(f"[bold]{each}[/]", ", ".join(experiment.arms), experiment.asks)
    console().print(table)


def child(file: Path) -> None:
    """Run one arm with one seed as `cohort ablate --parallel` says in a file.

    Parameters
    ----------
    file
        YAML of `flows/experiments/running.py: ChildConfig`.
    """
    told = ChildConfig.from_yaml(file.read_text(encoding="utf-8"), source=str(file))
    run_flow(
        Choice(told.config, told.baseline),
        Places(told.root),
        engine=told.engine,
        console=console(),
        command=told.command,
        debug=debugging(),
        tags=told.tags,
        difference=told.difference,
    )


def _scale(quick: bool, paper: bool) -> str:
    if quick and paper:
        raise ConfigError("--quick and --paper are two sizes; give one")
    return "quick" if quick else "paper" if paper else ""


def _seeds(text: str, first: int) -> list[int]:
    """`3`: so many from `first` on; `4,5` or `4,`: these."""
    try:
        values = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = []
    if not values or ("," not in text and values[0] < 1):
        raise ConfigError(f"--seeds {text}: expected how many (3), or which, with commas (0,1,2)")
    return values if "," in text else list(range(first, first + values[0]))


# ------------------------------------------------------------------------------------------------ on the screen


def _introduce(planned: PlannedExperiment, places: Places, out: Console) -> None:
    """The question, the arms, and what differs from the baseline and from earlier runs."""
    experiment = planned.experiment
    out.print(f"[bold]{experiment.name}[/]  {experiment.asks}")
    chosen = {arm.name for arm in planned.chosen}
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("arm", "plan", f"differs from {experiment.baseline} in"):
        table.add_column(heading, overflow="fold")
    for arm in planned.arms[: len(planned.names)]:  # those with the first seed
        config = arm.choice.config
        size = f"{config.iterations} x {config.steps} steps, {config.questions_per_step} x {config.rollout.G} outputs"
        differs = "\n".join(_change(key, *change) for key, change in planned.differences(arm).items())
        table.add_row(arm.label + ("" if arm.name in chosen else "  (not now)"), size, differs or "-")
    out.print(table)
    merged = [arm.label for arm in planned.arms[: len(planned.names)] if arm.also]
    for label in merged:
        out.print(f"[yellow]equal configurations, run once:[/] {label}")
    done = sum(is_finished(places, arm) for arm in planned.chosen)
    seeds = ", ".join(map(str, experiment.seeds))
    out.print(f"{len(planned.chosen)} runs, seeds {seeds}; {done} finished before; in {places.root}", soft_wrap=True)


def _change(key: str, was: object, now: object) -> str:
    """One setting, as it was and is; of lists of parts their kinds, where those tell the difference."""
    short = [
        f"[{', '.join(part['kind'] for part in value)}]"
        if isinstance(value, list) and value and all(isinstance(part, dict) and "kind" in part for part in value)
        else number(value)
        for value in (was, now)
    ]
    shown = short if short[0] != short[1] else [number(was), number(now)]
    return f"{key}: {escape(shown[0])} -> {escape(shown[1])}"


def _conduct(planned: PlannedExperiment, places: Places, engine: Engine, parallel: int, out: Console) -> None:
    """Run what is chosen, leave the results, print them."""
    command, started = shlex.join(["cohort", *sys.argv[1:]]), time.time()
    changed = earlier_settings(planned, places)
    if changed:
        text = "; ".join(_change(key, *change) for key, change in changed.items())
        out.print(f"[yellow]other settings than when these runs were last made:[/] {text}", soft_wrap=True)
    with track_experiment(planned, places) as tracker:
        if parallel == 1:
            errors = run_in_turn(planned, places, engine=engine, console=out, command=command, debug=debugging())
        else:
            errors = run_side_by_side(planned, places, limit=parallel, engine=engine, console=out, command=command)
        out.print()
        print_comparison(outcomes_of(planned, places), out)  # first: a folder that cannot be written must not hide it
        result = conclude(planned, places, command, tracker)
    for line in [*_calls(planned, places, started), *_sharing(result.sharing)]:
        out.print(line, soft_wrap=True)
    if changed:
        out.print("computed because of the other settings, by stage:")
        for reason in reasons(places, started):
            out.print(f"  {reason}", markup=False, soft_wrap=True)
    out.print(
        f"results  [cyan]{experiment_folder(places, planned.experiment.name) / 'experiment.json'}[/]", soft_wrap=True
    )
    out.print(f"tables   [cyan]{tables_file(places, planned)}[/]", soft_wrap=True)
    out.print(f"report   [cyan]{report_file(places, planned.experiment.name)}[/]", soft_wrap=True)
    if errors:
        failed = "\n".join(f"  {name}: {error}" for name, error in errors.items())
        raise RuntimeError(
            f"{len(errors)} of {len(planned.chosen)} runs failed; the same command tries them again\n{failed}"
        )


def _calls(planned: PlannedExperiment, places: Places, since: float) -> Iterator[str]:
    """What this command asked for, computed and reused."""
    attempts = [
        attempt
        for arm in planned.chosen
        if (record := read_record(run_folder(places, arm.choice.config)))
        for attempt in record.attempts
        if attempt.started >= since
    ]
    executed, reused = sum(one.executed for one in attempts), sum(one.cached for one in attempts)
    yield f"stage calls: {executed + reused:,} asked for, {executed:,} computed, {reused:,} reused"


def _sharing(sharing: Sharing) -> Iterator[str]:
    """What the runs of the experiment have in common, whenever they ran."""
    if sharing.runs > 1:
        saved = duration(sharing.seconds_apart - sharing.seconds_together)
        yield (
            f"the {sharing.runs} runs apart: {sharing.asked:,} stages in {duration(sharing.seconds_apart)}; together: "
            f"{sharing.distinct:,} in {duration(sharing.seconds_together)} ({sharing.ratio:.2f} of it); {saved} saved"
        )
