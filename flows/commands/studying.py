"""`cohort reward-model`: a reward model on labelled solutions of others, beside its baselines."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.markup import escape
from rich.syntax import Syntax

from flows.commands.options import ConfigFiles, Root, Settings, console, debugging
from flows.reward_study.config import choose_study
from flows.reward_study.run import print_study, run_study
from flows.runs.paths import Places
from flows.wording import number

__all__ = ["reward_model"]


def reward_model(
    recipe: str = "gsm8k_solutions",
    *,
    config: ConfigFiles = None,
    set_: Settings = None,
    engine: Annotated[Literal["prefect", "inline"], Parameter(help="inline: no server")] = "prefect",
    root: Root = None,
    show: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Train a reward model on labelled solutions of others, and judge it on questions it has not seen.

    The rules label the solutions (and are compared with the file's own labels), a hash of the question decides what is learned
    from. Printed: AUC with its 95 % interval over questions, within authors and within questions, beside baselines that only
    see length, format, author or the question's length; also written to a markdown file beside the runs, which the last line
    names. The same command again computes nothing.

    Parameters
    ----------
    recipe
        `gsm8k_solutions` (its files lie in `--set path=FOLDER`), or a YAML file.
    config
        YAML file of overrides, nested or with dotted keys; may be given several times.
    set_
        `key=value`, for example `--set training.epochs=3`; `--set judged_on=validation` is for choosing settings.
    engine
        As for `cohort run`.
    root
        As for `cohort run`.
    show
        Only print the whole configuration as YAML (a start for a file of your own).
    """
    choice = choose_study(recipe, config or [], set_ or [])
    places, out = Places.under(root), console()
    if show:
        text = choice.config.to_yaml()
        out.print(Syntax(text, "yaml", background_color="default")) if out.is_terminal else print(text, end="")
        return
    out.print(
        f"[bold]{choice.config.name}[/]  judged on {choice.config.judged_on}, engine {engine}, in {escape(str(places.root))}"
    )
    for key, (was, now) in choice.differences().items():
        out.print(f"  {key}  [dim]{number(was)}[/] -> [bold]{number(now)}[/]", soft_wrap=True)
    command = shlex.join(["cohort", *sys.argv[1:]])
    done = run_study(choice, places, engine=engine, console=out, command=command, debug=debugging())
    out.print()
    print_study(done.study, out)
    out.print(f"\n{done.executed:,} stages computed, {done.cached:,} reused from the store")
    out.print(f"[cyan]{done.report}[/]", soft_wrap=True)
