"""`cohort init`: write the configuration of a first run from a model and a file of questions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.prompt import Prompt

from flows.commands.options import Root, console
from flows.runs.paths import Places
from pipeline.config import ConfigError

_ASKED: Final = {
    "model": "Model (a folder, a .gguf file, or owner/name of the hub)",
    "data": "Questions (.jsonl, .csv, .tsv, .parquet)",
    "out": "Configuration to write",
}


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
