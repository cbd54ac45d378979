"""The `cohort` command. It imports little: what a command needs is imported when the command is called."""

from __future__ import annotations

import errno
import functools
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Final

from cyclopts import App, CycloptsError, Group
from rich.markup import escape

from flows.commands.options import console
from pipeline.config.text import without_password
from pipeline.orchestration.interruption import exit_code, interruptible, is_interruption

_ENVIRONMENT: Final = {
    # Telemetry of all parts is off.
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # Third parties speak when something is wrong.
    "DATASETS_VERBOSITY": "error",
    "GIT_PYTHON_REFRESH": "quiet",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",  # an error is printed here, once, not also with Prefect's traceback
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Defaults; what the user has set wins. Worker processes inherit them."""
_QUIET_LOGGERS: Final = ("DeepSpeed", "deepspeed", "matplotlib", "mlflow", "alembic", "httpx")
_EPILOGUE: Final = (
    "--debug with any command shows tracebacks. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, "
    "130 interrupted, 129 by a terminal that was closed."
)

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS: Final = tuple(
    text for number in _FULL for text in (f"(os error {number})", f"[Errno {number}]", os.strerror(number))
)

app = App(
    name="cohort",
    help="Reinforcement learning for reasoning models as a pipeline of cached, resumable, comparable stages.",
    help_epilogue=_EPILOGUE,
    help_format="plaintext",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
)
_RUN, _LOOK, _KEEP = (Group(name, sort_key=place) for place, name in enumerate(("Train", "Look", "Keep")))


_COMPARE: Final = """Train a recipe by several methods; tables of what they cost and came to.

An arm is what `cohort run RECIPE --method METHOD` trains, with one seed, and a run of its own (`cohort runs`, MLflow). What
arms share is computed once, and the same command again computes nothing."""


_REWARD_MODEL: Final = """Train a reward model on labelled solutions of others; compare it with baselines.

Nothing is learned from the questions it is evaluated on, and the same command again computes nothing."""


_GRADE: Final = """Grade answers in a file as a recipe's reward would: check the verifier on your data before you train.

FILE has one JSON object a line: `gold`, the right answer as your data state it; `output`, the whole text of a model; and, where
you know it, `expected`, true or false. The recipe's accuracy component grades them, and nothing else of the reward counts.
Printed are the counts of each status and, with `expected`, the rows that are graded otherwise; then the exit code is 1.

A row is ok (reward 1), wrong or unparseable (0: another answer, or none), timeout or error (no reward: math-verify took too
long, or cannot read the gold answer). `read_as` is the answer that was read, in the spelling in which it is compared. Where
that is not what the output says, change `conventions` or `mark` of the component, `reward.reads` or `reward.thinking`."""


_INIT: Final = """Write the configuration of a first run for a model and a file of questions.

It looks at the data, the model and the machine, samples a few groups with a few prompts, and plans. What is written is a YAML
file with the reason above each section; `cohort run` takes it. Data, a model or a machine that no run can use is refused before
anything is sampled."""


_ABLATE: Final = """Run an experiment: named arms times seeds, what they share computed once; tables.

The paper's studies (`cohort experiments`) or a YAML file. The same command again computes nothing; an arm that is added later
computes what is its own."""


def _add(name: str, place: str, text: str, group: Group) -> None:
    app.command(f"flows.commands.{place}", name=name, help=text, group=group)


_add("init", "training:init", _INIT, _RUN)
_add("run", "training:run", "Train as a recipe says; again: continue, reusing all that is computed.", _RUN)
_add("compare", "ablation:compare", _COMPARE, _RUN)
_add("reward-model", "grading:reward_model", _REWARD_MODEL, _RUN)
_add("ablate", "ablation:ablate", _ABLATE, _RUN)
_add("experiments", "ablation:experiments", "List the paper's studies, or print one as YAML.", _RUN)
_add("methods", "training:methods", "List the methods: Table 10 of the paper, and later ones.", _RUN)
_add("recipes", "training:recipes", "List the recipes, or print one as YAML.", _RUN)
_add("check", "training:check", "Check a configuration and its data; every error at once.", _RUN)
_add("prompt", "training:prompt", "What the policy reads for a question: the exact text and token ids.", _RUN)
_add("grade", "grading:grade", _GRADE, _RUN)
_add("plan", "machine:plan", "What a run needs before it begins: memory, time, disk, and what to change.", _RUN)
_add("deploy", "deploying:deploy", "Put a recipe on Prefect's workers: by hand, from a form, on a schedule.", _RUN)
_add("worker", "deploying:worker", "Run what deployments have due; continue runs whose worker was killed.", _RUN)
app.command("flows.commands.ablation:child", name="child", help="One arm, for ablate --parallel.", show=False)
_add("runs", "looking:runs", "What ran: when, how far, how well.", _LOOK)
_add("show", "looking:show", "Show a run, a step of it, or any artifact: groups with rewards, a checkpoint.", _LOOK)
_add("diff", "comparing:diff", "What differs between two runs or two artifacts, and why.", _LOOK)
_add("replay", "comparing:replay", "One stage of a run again with other settings; what changes.", _LOOK)
_add("report", "comparing:report", "Write the report of an experiment again: one HTML file.", _LOOK)
_add("explain", "looking:explain", "Why a stage was computed and not reused.", _LOOK)
_add("lineage", "looking:lineage", "What an artifact was made from, down to the data.", _LOOK)
_add("ui", "serving:ui", "Open MLflow's and Prefect's user interfaces.", _LOOK)
_add("export", "exporting:export", "Write a checkpoint as a plain Hugging Face folder, or completions as JSON.", _KEEP)
_add("doctor", "machine:doctor", "Say whether this machine can run Cohort, and what to fix.", _KEEP)
_add("prove", "machine:prove", "Run a few steps by every engine that is installed; one JSON and one HTML file.", _KEEP)
_add("verify", "keeping:verify", "Hash every artifact again; report and repair damage.", _KEEP)
_add(
    "prune", "storing:prune", "Free the space of old checkpoints, optimizer states, rollouts; runs stay cached.", _KEEP
)
_add("forget", "keeping:forget", "Let a stage compute its result again.", _KEEP)
server = App(name="server", help="The local Prefect server: up, down, status.", group=_KEEP)
server.command("flows.commands.serving:server_up", name="up", help="Start it, or find the one that runs.")
server.command("flows.commands.serving:server_down", name="down", help="Stop it.")
server.command("flows.commands.serving:server_status", name="status", help="Whether it runs, and where.")
app.command(server)
store = App(name="store", help="What lies on the disk: du, prune, verify, export, import.", group=_KEEP)
store.command("flows.commands.storing:du", name="du", help="How large it is: by type of artifact, by run.")
store.command("flows.commands.storing:prune", name="prune", help="Free payloads; runs stay cached (as `cohort prune`).")
store.command("flows.commands.keeping:verify", name="verify", help="Hash every artifact again (as `cohort verify`).")
store.command("flows.commands.storing:export_archive", name="export", help="Write runs or artifacts into one file.")
store.command("flows.commands.storing:import_archive", name="import", help="Take in a file of `cohort store export`.")
app.command(store)
mlflow = App(name="mlflow", help="The MLflow picture of the runs: sync.", group=_KEEP)
mlflow.command("flows.commands.serving:mlflow_sync", name="sync", help="Send what MLflow does not have yet.")
app.command(mlflow)


def main() -> None:
    """Entry point of the console script."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    code = run_command(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a terminal that was closed, a full disk: Python would end with code 120 for it
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def run_command(tokens: Sequence[str]) -> int:
    """Run one command line; returns its exit code. Errors become one clear message, with `--debug` a traceback."""
    arguments = [token for token in tokens if token != "--debug"]
    if len(arguments) < len(tokens):
        os.environ["COHORT_DEBUG"] = "1"
    debug = os.environ.get("COHORT_DEBUG", "") not in ("", "0")
    _hush(debug=debug)
    try:
        with interruptible():
            result = app(arguments, exit_on_error=False, print_error=True, result_action="return_value")
        return result if isinstance(result, int) else 0
    except CycloptsError:
        return 2  # printed by cyclopts
    except KeyboardInterrupt:
        return exit_code()
    except BrokenPipeError:  # `| head` has read enough; nothing is left to say, also not at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        if is_interruption(error) and type(error).__name__ != "InterruptedRunError":
            return exit_code()  # what the interrupt broke on its way is no error of its own
        return _explain(error)


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk, or a used quota, is behind an error; libraries that are not Python's put the number into a text."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number in _FULL or any(text in str(error) for text in _FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _explain(error: Exception) -> int:
    """Print an error for people; its exit code."""
    from flows.runs.record import InterruptedRunError
    from pipeline.config import ConfigError

    text = without_password(str(error))
    say = functools.partial(console(errors=True).print, soft_wrap=True)
    match error:
        case InterruptedRunError():
            say(f"\ninterrupted; nothing is lost. Continue with\n\n  [bold]{escape(str(error))}[/]")
            return exit_code()
        case ConfigError():
            say(f"[red]configuration:[/] {escape(text)}")
            return 2
        case ValueError() | OSError() | RuntimeError():
            say(f"[red]error:[/] {escape(text or type(error).__name__)}")
        case _:
            say(f"[red]error:[/] {type(error).__name__}: {escape(text)}")
    if _is_full(error):
        say(
            "the disk is full: `cohort prune` frees old checkpoints, `cohort store du` says what takes how much, --root moves"
        )
    say("[dim]--debug shows where; what was computed is kept, the same command continues[/]")
    return 1


def _hush(*, debug: bool) -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not debug:
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        for name in _QUIET_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
