"""`cohort ablate`, `compare`, and what runs one arm in a process of its own."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table

from flows.commands.options import UNCHANGED, Changes, EngineOption, Flag, Root, console, debugging
from flows.config.methods import PAPER
from flows.config.resolve import Choice
from flows.experiments.ablation import (
    conclude,
    earlier_settings,
    outcomes_of,
    print_arms,
    print_changes,
    print_outcome,
    track_experiment,
)
from flows.experiments.arms import PlannedExperiment, method_experiment, plan
from flows.experiments.results import collect
from flows.experiments.running import ChildConfig, run_in_turn, run_side_by_side
from flows.experiments.studies import EXPERIMENTS, named_experiment
from flows.experiments.tables import print_comparison
from flows.experiments.workers import require_workers_pool, run_on_workers
from flows.runs.paths import Places
from flows.runs.session import run_flow
from pipeline.config import ConfigError
from pipeline.progress import failsafe
from pipeline.store.context import Engine


def ablate(
    name: str,
    *,
    arm: Annotated[list[str] | None, Parameter(name="--arm", negative="")] = None,
    seeds: str | None = None,
    quick: Flag = False,
    paper: Flag = False,
    parallel: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    workers: str | None = None,
    require_versions: Flag = False,
    dry_run: Flag = False,
    changes: Changes = UNCHANGED,
    engine: EngineOption = "prefect",
    root: Root = None,
) -> None:
    """Run the arms of an experiment, each with every seed, and print what came of them.

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
        Runs at a time, each in a process of its own here; 1, the default: one after the other, in this process.
    workers
        A work pool of Prefect: its workers (`cohort worker --pool POOL`), on this host or others that share the store, run the
        arms. What a worker that dies had begun goes on with another.
    require_versions
        With --workers: refuse workers with other package versions than these here.
    dry_run
        Print the arms and what differs from the baseline; run nothing.
    changes.config
        YAML file of overrides for every arm; may be given several times.
    changes.settings
        `key=value` for every arm, after its own overrides.
    """
    experiment = named_experiment(name, scale=_scale(quick, paper))
    if seeds is not None:
        experiment = experiment.override({"seeds": _seeds(seeds, experiment.seeds[0])}, source="--seeds")
    planned = plan(experiment, files=changes.config, settings=changes.settings, only=arm or [])
    places, out = Places.under(root), console()
    pool = _pool(workers, parallel, engine, require_versions=require_versions)
    failsafe("the table of arms")(print_arms)(planned, places, out)
    if not dry_run:
        _conduct(planned, places, engine, out, parallel=parallel or 1, pool=pool)


def compare(
    recipe: str,
    *,
    method: Annotated[list[str] | None, Parameter(name="--method", negative="")] = None,
    seeds: Annotated[int, Parameter(validator=Number(gte=1))] = 1,
    changes: Changes = UNCHANGED,
    engine: EngineOption = "prefect",
    root: Root = None,
) -> None:
    """Run the experiment whose arms are methods, from one supervised policy and on equally many outputs.

    Parameters
    ----------
    recipe
        Name of a recipe or a YAML file: everything but the method. The policy it starts RL from is that of every arm.
    method
        A method (`cohort methods`), several times for several: --method grpo --method ppo. Default: all six of Table 10.
    seeds
        Runs per method, each with the next seed (questions, outputs); the table shows mean (lowest-highest).
    changes.config
        YAML file of overrides for every arm; may be given several times.
    changes.settings
        `key=value` for every arm, after its method; one that a method does not know is refused before anything runs.
    """
    planned = method_experiment(recipe, method or PAPER, seeds, files=changes.config, settings=changes.settings)
    places, out = Places.under(root), console()
    _conduct(planned, places, engine, out)


def experiments(name: str | None = None, *, quick: Flag = False, paper: Flag = False) -> None:
    """List the paper's studies as experiments, or print one.

    Parameters
    ----------
    name
        The experiment to print as YAML, a start for a file of your own.
    quick
        In smaller sizes.
    paper
        With the paper's model and numbers.
    """
    if name:
        print(named_experiment(name, scale=_scale(quick, paper)).to_yaml(), end="")
        return
    if quick or paper:
        raise ConfigError("--quick and --paper are sizes of one experiment; name it")
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
    needed = ChildConfig.from_yaml(file.read_text(encoding="utf-8"), source=str(file))
    run_flow(
        Choice(needed.config, needed.baseline, needed.asked),
        Places(needed.root),
        engine=needed.engine,
        console=console(),
        command=needed.command,
        debug=debugging(),
        tags=needed.tags,
        difference=needed.difference,
    )


@dataclass(frozen=True)
class Pool:
    """Where `--workers` has runs run."""

    name: str
    require_versions: bool


def _pool(workers: str | None, parallel: int | None, engine: Engine, *, require_versions: bool) -> Pool | None:
    """Return where `--workers` has runs run, if it is given.

    Raises:
        ConfigError: options that contradict each other.
    """
    if workers is None:
        if require_versions:
            raise ConfigError("--require-versions is asked of workers; give --workers POOL too, or leave it out")
        return None
    if parallel is not None:
        raise ConfigError(
            f"--workers {workers} and --parallel {parallel} are two ways of running arms side by side; give one. How many runs "
            f"the pool takes at a time, its workers say: `cohort worker --pool {workers} --limit {parallel}`"
        )
    if engine == "inline":
        raise ConfigError("--workers needs Prefect's server, which --engine inline does without; leave one of them out")
    return Pool(workers, require_versions)


def _scale(quick: bool, paper: bool) -> str:
    if quick and paper:
        raise ConfigError("--quick and --paper are two sizes; give one")
    return "quick" if quick else "paper" if paper else ""


def _seeds(text: str, first: int) -> list[int]:
    """Read `3` as so many from `first` on, and `4,5` or `4,` as these."""
    try:
        values = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = []
    if not values or ("," not in text and values[0] < 1):
        raise ConfigError(f"--seeds {text}: expected how many (3), or which, with commas (0,1,2)")
    return values if "," in text else list(range(first, first + values[0]))


def _conduct(
    planned: PlannedExperiment,
    places: Places,
    engine: Engine,
    out: Console,
    *,
    parallel: int = 1,
    pool: Pool | None = None,
) -> None:
    """Run what is chosen, leave the results, print them."""
    command, started = shlex.join(["cohort", *sys.argv[1:]]), time.time()
    changed = earlier_settings(planned, places)
    failsafe("the table of changes")(print_changes)(changed, out)
    if pool is not None:
        require_workers_pool(planned, places, pool.name)
    with track_experiment(planned, places) as log:
        if pool is not None:
            errors = run_on_workers(
                planned, places, pool=pool.name, console=out, command=command, require_versions=pool.require_versions
            )
        elif parallel == 1:
            errors = run_in_turn(planned, places, engine=engine, console=out, command=command, debug=debugging())
        else:
            errors = run_side_by_side(planned, places, limit=parallel, engine=engine, console=out, command=command)
        out.print()
        # First: a folder that cannot be written must not hide it.
        result = collect(planned, places, command)
        failsafe("the tables of the experiment")(print_comparison)(outcomes_of(planned, result), out)
        conclude(planned, result, places, log)
    failsafe("the counts of the experiment")(print_outcome)(
        planned, places, result.sharing, out, since=started, because=bool(changed)
    )
    if errors:
        failed = "\n".join(f"  {name}: {error}" for name, error in errors.items())
        raise RuntimeError(
            f"{len(errors)} of {len(planned.chosen)} runs failed; the same command tries them again\n{failed}"
        )
