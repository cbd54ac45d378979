"""`cohort init`, `run`, `recipes`, `methods`, `check`, `prompt`: write or choose a configuration and train."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.prompt import Prompt
from rich.syntax import Syntax
from rich.table import Table

from flows.commands.options import UNCHANGED, EngineOption, Flag, MethodChanges, Root, console, debugging
from flows.config import IterativeRLConfig
from flows.config.methods import METHODS, row_of
from flows.config.resolve import Choice, choose, descriptions
from flows.runs.paths import Places
from flows.runs.session import run_flow
from flows.runs.summary import print_summary
from flows.wording import number
from pipeline.config import ConfigError
from pipeline.progress import failsafe
from stages.tables import Demonstrations

_ASKED: Final = {
    "model": "Model (a folder, a .gguf file, or owner/name of the hub)",
    "data": "Questions (.jsonl, .csv, .tsv, .parquet)",
    "out": "Configuration to write",
}


def run(
    recipe: str,
    *,
    changes: MethodChanges = UNCHANGED,
    engine: EngineOption = "prefect",
    root: Root = None,
) -> None:
    """Train as a recipe says.

    Parameters
    ----------
    recipe
        Name of a recipe (`cohort recipes`) or a YAML file.
    """
    choice = changes.choose(recipe)
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
    for name, settings in METHODS.items():
        row = row_of(name)
        table.add_row(f"[bold]{name}[/]", settings.get("data_source", "policy"), row.reward, row.coefficient)
    console().print(table)


def recipes(name: str | None = None) -> None:
    """List the recipes, or print one.

    Parameters
    ----------
    name
        The recipe to print in full as YAML, a start for a file of your own.
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
    changes: MethodChanges = UNCHANGED,
    faithful: Flag = False,
    data: bool = True,
    root: Root = None,
) -> None:
    """Check a configuration, the data sets that are here and the room on the disk; print what differs from its recipe.

    Parameters
    ----------
    recipe
        Name of a recipe or a YAML file.
    faithful
        Also list what is not as in the paper, with its sections, and what is chosen where the paper is silent.
    data
        Read the question sets, measure their prompts, and compare a checkpoint with what is free on the disk.
    """
    choice = changes.choose(recipe)
    out = console()
    if differences := choice.differences():
        out.print(f"{escape(recipe)} is valid; it differs from {choice.base.name} in")
        out.print(_differences(choice, differences))
    else:
        out.print(f"{escape(recipe)} is valid")
    _say_dropped(choice, out)
    if data:
        _check_data(recipe, choice.config, Places.under(root), out)
    if faithful:
        from flows.inspection.faithful import print_faithfulness

        print_faithfulness(choice.config, out)


def prompt(recipe: str, *, question: str, changes: MethodChanges = UNCHANGED) -> None:
    """Print the exact text of the prompt that a question becomes, escaped, and its token ids.

    Parameters
    ----------
    recipe
        Name of a recipe or a YAML file.
    question
        Text of the question.
    changes.settings
        `key=value`, for example `--set prompt.instruction="Think step by step."`.
    """
    from flows.algorithm.data_check import scratch_store
    from flows.algorithm.models import early_tokenizer
    from stages.text import encode_prompt, plain_of, prompt_text

    chosen = changes.choose(recipe).config
    with scratch_store():
        tokenizer = early_tokenizer(chosen, _demonstrations(chosen), fetch=True, exact=True).tokenizer
    text, ids = prompt_text(tokenizer, question, chosen.prompt), encode_prompt(tokenizer, question, chosen.prompt)
    special = plain_of(tokenizer).added
    print(f"text\n  {text!r}\n\nids\n  {ids}\n")
    for token in ids:
        mark = "  special" if token in special else ""
        print(f"{token:>8}  {tokenizer.decode([token], skip_special_tokens=False)!r}{mark}")
    print(f"\n{len(ids)} tokens, {sum(token in special for token in ids)} of them special")


def _check_data(recipe: str, config: IterativeRLConfig, places: Places, out: Console) -> None:
    from flows.algorithm.data_check import examine_data
    from flows.planning.request import Request, room_for_checkpoint, subject_of

    named = config.curriculum is not None and config.curriculum.rewards
    found = examine_data(config, places.open_store() if named else None)
    try:
        lacking = room_for_checkpoint(subject_of(config, places, Request()))
    except ConfigError as error:
        found.notes.append(f"the disk is not checked: {error}")
    else:
        found.complaints += [lacking] if lacking else []
    for note in found.notes:
        out.print(note, style="dim", markup=False, soft_wrap=True)
    if found.complaints:
        raise ConfigError("\n  ".join([f"{recipe}: cannot be run as it is", *found.complaints]))


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


def init(
    *,
    model: str | None = None,
    data: Path | None = None,
    out: Path | None = None,
    held_out: Path | None = None,
    question: str | None = None,
    answer: str | None = None,
    minutes: float = 20.0,
    root: Root = None,
) -> None:
    """Write the configuration of a first run; on a terminal it asks for what is not given.

    Parameters
    ----------
    model
        A folder in Hugging Face format, a `.gguf` file, or `owner/name` of a model on the hub.
    data
        Questions with answers: a `.jsonl`, `.csv`, `.tsv` or `.parquet` file.
    out
        YAML file to write; it must not exist.
    held_out
        Questions of the same columns to evaluate on.
    question
        Column of the question, where it has none of the usual names.
    answer
        Column of the answer, likewise.
    minutes
        How long the run may take, by the plan: it decides the steps, and with them how many outputs a step has.
    """
    model, data, out = _asked(model, data, out)
    if out.exists():
        raise ConfigError(f"--out {out}: is there already; name another file, or remove it")
    if minutes <= 0:
        raise ConfigError(f"--minutes: expected a positive number, found {minutes:g}")
    from flows.first_run.beginning import Wishes, begin

    places, terminal = Places.under(root), console()
    wishes = Wishes(model, data, held_out, minutes, question, answer)
    text = begin(wishes, places, lambda topic, sentence: _say(terminal, topic, sentence))
    out.write_text(text, encoding="utf-8")
    terminal.print(text, markup=False, soft_wrap=True)
    terminal.print(f"written to {out}; now: cohort run {out}{places.option()}", markup=False, soft_wrap=True)


def _say(terminal: Console, topic: str, sentence: str) -> None:
    terminal.print(f"{topic:<8} {sentence}", markup=False, soft_wrap=True)


def _asked(model: str | None, data: Path | None, out: Path | None) -> tuple[str, Path, Path]:
    """Return what was given, and ask for the rest where there is a terminal."""
    given = {"model": model, "data": data, "out": out}
    missing = [name for name, value in given.items() if value is None]
    if missing and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(
            f"init: expected {', '.join(f'--{name}' for name in missing)}: there is no terminal to ask on; as in `cohort init "
            "--model model.gguf --data questions.jsonl --out run.yaml`"
        )
    for name in missing:
        given[name] = Prompt.ask(_ASKED[name], default="run.yaml") if name == "out" else Prompt.ask(_ASKED[name])
    return str(given["model"]), Path(str(given["data"])).expanduser(), Path(str(given["out"])).expanduser()
