"""`cohort run`, `recipes`, `methods`, `check`, `prompt`: choose a configuration and train."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table

from flows.commands.options import ConfigFiles, Method, Root, Settings, console, debugging
from flows.config import IterativeRLConfig
from flows.config.methods import METHODS, method_settings
from flows.config.resolve import Choice, choose, descriptions
from flows.runs.paths import Places
from flows.runs.session import run_flow
from flows.runs.summary import print_summary
from flows.wording import number
from pipeline.config import ConfigError
from pipeline.progress import failsafe
from stages.tables import Demonstrations

__all__ = ["check", "methods", "prompt", "recipes", "run"]


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
    failsafe("the announcement of the run")(_announce)(choice, places, engine, out)
    if summary := run_flow(choice, places, engine=engine, console=out, debug=debugging()):
        failsafe("the table of the summary")(print_summary)(summary, out, ui_command=f"cohort ui{places.option()}")


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


def check(
    recipe: str,
    *,
    config: ConfigFiles = None,
    set_: Settings = None,
    method: Method = None,
    faithful: Annotated[bool, Parameter(negative="")] = False,
    data: bool = True,
) -> None:
    """Check a configuration and the data sets that are here: all errors at once (exit code 2), or what differs from its recipe.

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
    faithful
        Also list what is not as in the paper, with its sections, and what is chosen where the paper is silent.
    data
        Read the question sets and measure their prompts.
    """
    choice = choose(recipe, config or [], set_ or [], method=method)
    out = console()
    if differences := choice.differences():
        out.print(f"{escape(recipe)} is valid; it differs from {choice.base.name} in")
        out.print(_differences(choice, differences))
    else:
        out.print(f"{escape(recipe)} is valid")
    _say_dropped(choice, out)
    if data:
        _check_data(recipe, choice.config, out)
    if faithful:
        from flows.inspection.faithful import print_faithfulness

        print_faithfulness(choice.config, out)


def prompt(
    recipe: str, *, question: str, config: ConfigFiles = None, set_: Settings = None, method: Method = None
) -> None:
    """Print the prompt that a question becomes: its exact text, escaped, with special tokens by name, and its token ids.

    Parameters
    ----------
    recipe
        Name of a recipe or a YAML file.
    question
        Text of the question.
    config
        YAML file of overrides.
    set_
        `key=value`, for example `--set prompt.instruction="Think step by step."`.
    method
        A method (`cohort methods`) instead of the recipe's.
    """
    from flows.algorithm.data_check import scratch_store
    from flows.algorithm.models import early_tokenizer
    from stages.text import encode_prompt, plain_of, prompt_text

    chosen = choose(recipe, config or [], set_ or [], method=method).config
    with scratch_store():
        tokenizer = early_tokenizer(chosen, _demonstrations(chosen), fetch=True, exact=True).tokenizer
    text, ids = prompt_text(tokenizer, question, chosen.prompt), encode_prompt(tokenizer, question, chosen.prompt)
    special = plain_of(tokenizer).added
    print(f"text\n  {text!r}\n\nids\n  {ids}\n")
    for token in ids:
        mark = "  special" if token in special else ""
        print(f"{token:>8}  {tokenizer.decode([token], skip_special_tokens=False)!r}{mark}")
    print(f"\n{len(ids)} tokens, {sum(token in special for token in ids)} of them special")


def _check_data(recipe: str, config: IterativeRLConfig, out: Console) -> None:
    from flows.algorithm.data_check import examine_data

    found = examine_data(config)
    for note in found.notes:
        out.print(note, style="dim", markup=False, soft_wrap=True)
    if found.complaints:
        raise ConfigError("\n  ".join([f"{recipe}: its data cannot be used", *found.complaints]))


def _announce(choice: Choice, places: Places, engine: str, out: Console) -> None:
    """Say what is about to run, before anything heavy is imported."""
    config = choice.config
    plan = f"{config.iterations} x {config.steps} steps, {config.questions_per_step} questions x {config.rollout.G} outputs"
    where = escape(str(places.root))
    out.print(f"[bold]{config.name}[/]  {plan}, seed {config.seed}, engine {engine}, in {where}", soft_wrap=True)
    differences = choice.differences()
    if differences:
        out.print(_differences(choice, differences))
    _say_dropped(choice, out)


def _say_dropped(choice: Choice, out: Console) -> None:
    for override in choice.dropped():
        text = f"  {override.setting}={override.value} (from {override.source}) has no effect: a later override replaces it"
        out.print(text, style="yellow", markup=False, soft_wrap=True)


def _differences(choice: Choice, differences: dict[str, tuple[Any, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 2))
    table.add_column("changed")
    table.add_column(choice.base.name, style="dim")
    table.add_column("here", style="bold")
    for key, (was, now) in differences.items():
        table.add_row(key, escape(number(was)), escape(number(now)))
    return table


def _demonstrations(config: IterativeRLConfig) -> Demonstrations | None:
    """Return what a policy made from scratch makes its tokenizer from; for a pretrained policy nothing is read."""
    from flows.algorithm.data import prepare_data
    from flows.config import PretrainedPolicy

    return None if isinstance(config.policy, PretrainedPolicy) else prepare_data(config.data).demonstrations
