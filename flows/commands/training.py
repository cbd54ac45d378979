"""`cohort run`, `compare`, `recipes`, `methods`, `check`: choose a configuration and train."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from flows.choice import Choice, choose, descriptions
from flows.commands.options import ConfigFiles, Root, Settings, console, debugging
from flows.comparison import Outcome, arms_of, comparison_file, comparison_markdown, print_comparison
from flows.methods import METHODS, PAPER, method_settings
from flows.places import Places
from flows.session import run_flow
from flows.summary import print_summary
from flows.wording import number
from pipeline.residency import evict

__all__ = ["check", "compare", "methods", "recipes", "run"]

Method = Annotated[str | None, Parameter(name="--method")]


def run(
    recipe: str,
    *,
    config: ConfigFiles = None,
    set_: Settings = None,
    method: Method = None,
    engine: Annotated[Literal["prefect", "inline"], Parameter(help="inline: no server")] = "prefect",
    root: Root = None,
) -> None:
    """Train as a recipe says. The same command again continues an interrupted run and repeats nothing that is computed.

    Parameters
    ----------
    recipe
        Name of a recipe (`cohort recipes`) or a YAML file.
    config
        YAML file of overrides, nested or with dotted keys; may be given several times.
    set_
        `key=value`, for example `--set rollout.G=8`; may be given several times.
    method
        Train by another method than the recipe's (`cohort methods`); `--config` and `--set` come after it.
    engine
        `prefect` shows states and logs in Prefect's UI (a local server is started when none is configured); `inline` makes
        plain calls.
    root
        Folder of store, runs and databases; default: COHORT_ROOT or ./artifacts.
    """
    choice = choose(recipe, config or [], set_ or [], method=method)
    places, out = Places.under(root), console()
    _announce(choice, places, engine, out)
    summary = run_flow(choice, places, engine=engine, console=out, debug=debugging())
    print_summary(summary, out, ui_command=f"cohort ui{places.option()}")


def compare(
    recipe: str,
    *,
    method: Annotated[list[str] | None, Parameter(name="--method", negative="")] = None,
    seeds: Annotated[int, Parameter(validator=Number(gte=1))] = 1,
    config: ConfigFiles = None,
    set_: Settings = None,
    engine: Annotated[Literal["prefect", "inline"], Parameter(help="inline: no server")] = "prefect",
    root: Root = None,
) -> None:
    """Train a recipe by several methods from one supervised policy, on equally many outputs, and print what came of it.

    An arm is what `cohort run RECIPE --method METHOD` trains, with one seed. Every arm is a run of its own (`cohort runs`,
    MLflow); what arms share is computed once, and the same command again computes nothing. Printed at the end: accuracy
    before and after by held-out set, then outputs, time, memory and critic; also written, with every setting, to a markdown
    file beside the runs, which the last line names.

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
    places, out = Places.under(root), console()
    arms = arms_of(recipe, method or PAPER, seeds, files=config or [], settings=set_ or [])
    outcomes = []
    for place, arm in enumerate(arms, 1):
        out.print(f"\n[bold]arm {place} of {len(arms)}[/]")
        _announce(arm.choice, places, engine, out)
        evict()  # nothing of one arm stays in memory for the next
        outcomes.append(Outcome(arm, run_flow(arm.choice, places, engine=engine, console=out, debug=debugging())))
    out.print()
    print_comparison(outcomes, out)
    file = comparison_file(places, arms)
    file.write_text(comparison_markdown(outcomes, shlex.join(["cohort", *sys.argv[1:]])), encoding="utf-8")
    out.print(f"[cyan]{file}[/]", soft_wrap=True)


def methods() -> None:
    """List the methods: the rows of the paper's Table 10, then later ones."""
    table = Table(title="grad J = E[ (1/|o|) sum_t GC grad log pi_theta(o_t) ]   (Eq. 5)", title_justify="left")
    for column in ("method", "data source", "reward"):
        table.add_column(column, no_wrap=True)
    table.add_column("gradient coefficient (GC)")
    base = choose("arithmetic_cpu").config
    for name in METHODS:
        config = base.override(method_settings(name, base))
        row = config.update.objective.ROW
        table.add_row(f"[bold]{name}[/]", config.data_source, row.reward, row.coefficient)
    console().print(table)


def recipes(name: str | None = None) -> None:
    """List the recipes, or print one in full as YAML (a start for a file of your own).

    Parameters
    ----------
    name
        The recipe to print.
    """
    out = console()
    if name:
        text = choose(name).base.to_yaml()
        out.print(Syntax(text, "yaml", background_color="default")) if out.is_terminal else print(text, end="")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for recipe, text in descriptions().items():
        table.add_row(f"[bold]{recipe}[/]", text)
    out.print(table)


def check(recipe: str, *, config: ConfigFiles = None, set_: Settings = None, method: Method = None) -> None:
    """Check a configuration without running it: all errors at once (exit code 2), or what differs from its recipe.

    Parameters
    ----------
    recipe
        Name of a recipe or a YAML file.
    config
        YAML file of overrides.
    set_
        `key=value`.
    method
        A method (`cohort methods`) instead of the recipe's.
    """
    choice = choose(recipe, config or [], set_ or [], method=method)
    out = console()
    differences = choice.differences()
    if not differences:
        out.print(f"{recipe} is valid")
        return
    out.print(f"{recipe} is valid; it differs from {choice.base.name} in")
    out.print(_differences(choice, differences))


def _announce(choice: Choice, places: Places, engine: str, out: Console) -> None:
    """Say what is about to run, before anything heavy is imported."""
    config = choice.config
    plan = f"{config.iterations} x {config.steps} steps, {config.questions_per_step} questions x {config.rollout.G} outputs"
    out.print(f"[bold]{config.name}[/]  {plan}, seed {config.seed}, engine {engine}, in {places.root}", soft_wrap=True)
    differences = choice.differences()
    if differences:
        out.print(_differences(choice, differences))


def _differences(choice: Choice, differences: dict[str, tuple[Any, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 2))
    table.add_column("changed")
    table.add_column(choice.base.name, style="dim")
    table.add_column("here", style="bold")
    for key, (was, now) in differences.items():
        table.add_row(key, number(was), number(now))
    return table
