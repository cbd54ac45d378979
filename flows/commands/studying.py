"""`cohort reward-model`: a reward model on labelled solutions of others, compared with baselines."""

from __future__ import annotations

import shlex
import sys

from rich.markup import escape
from rich.syntax import Syntax

from flows.commands.options import UNCHANGED, Changes, EngineOption, Flag, Root, console, debugging
from flows.reward_study.config import choose_study
from flows.reward_study.run import print_study, run_study
from flows.runs.paths import Places
from flows.wording import number


def reward_model(
    recipe: str = "gsm8k_solutions",
    *,
    changes: Changes = UNCHANGED,
    engine: EngineOption = "prefect",
    root: Root = None,
    show: Flag = False,
) -> None:
    """Train a reward model on labelled solutions of others, and compare it with baselines on questions it has not seen.

    Parameters
    ----------
    recipe
        `gsm8k_solutions` (its files lie in `--set path=FOLDER`), or a YAML file.
    changes.settings
        `key=value`, for example `--set training.epochs=3`; `--set judged_on=validation` is for choosing settings.
    show
        Only print the whole configuration as YAML (a start for a file of your own).
    """
    choice = choose_study(recipe, changes.config, changes.settings)
    places, out = Places.under(root), console()
    if show:
        text = choice.config.to_yaml()
        out.print(Syntax(text, "yaml", background_color="default")) if out.is_terminal else print(text, end="")
        return
    out.print(
        f"[bold]{choice.config.name}[/]  evaluated on {choice.config.judged_on}, engine {engine}, in {escape(str(places.root))}"
    )
    for key, (was, now) in choice.differences().items():
        out.print(f"  {key}  [dim]{number(was)}[/] -> [bold]{number(now)}[/]", soft_wrap=True)
    command = shlex.join(["cohort", *sys.argv[1:]])
    done = run_study(choice, places, engine=engine, console=out, command=command, debug=debugging())
    out.print()
    print_study(done.study, out)
    out.print(f"\n{done.executed:,} stages computed, {done.cached:,} reused from the store")
    out.print(f"[cyan]{done.report}[/]", soft_wrap=True)
