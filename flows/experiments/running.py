"""The runs of an experiment, in turn in this process or side by side in processes of their own.

A run that fails is reported and the others go on; an interruption stops all. A stage that several
runs ask for is computed by one of them while the others wait (`pipeline/store/locks.py`); the lock of a killed process is
free at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape

from flows.config import IterativeRLConfig
from flows.config.resolve import Asked
from flows.experiments.arms import Arm, PlannedExperiment
from flows.experiments.results import experiment_folder, is_finished
from flows.runs.paths import Places
from flows.runs.record import InterruptedRunError, read_record, run_folder
from flows.runs.session import run_flow
from pipeline.config import Config
from pipeline.orchestration.interruption import interruptible
from pipeline.residency import evict
from pipeline.store.context import Engine
from pipeline.workers.group import importing_ours

_POLL: Final = 0.1
_PROGRESS_SECONDS: Final = 30.0
"""How often the progress of the runs is printed."""
_GRACE: Final = 30.0
"""Seconds that a run has to note that it was interrupted, before it is killed."""


class ChildConfig(Config):
    """Everything that a process needs to run one arm with one seed (`cohort child FILE`)."""

    config: IterativeRLConfig
    "The run."
    baseline: IterativeRLConfig
    "What it is compared with in MLflow."
    asked: Asked = Asked()
    "What the run was made from, for its record."
    tags: dict[str, str]
    "Its tags in MLflow."
    difference: dict[str, Any]
    "Its parameters `diff.*` in MLflow."
    engine: Engine
    "As for `cohort run`."
    root: Path
    "Folder of store, runs and databases."
    command: str
    "What continues the experiment."


def progress_of(name: str, folder: Path) -> str:
    """Say how far a run is, by the record in its folder: `fig6-one-s0 step 3/40`."""
    record = read_record(folder)
    return f"{name} {f'step {record.steps}/{record.total_steps}' if record else 'starting'}"


def run_in_turn(
    planned: PlannedExperiment, places: Places, *, engine: Engine, console: Console, command: str, debug: bool = False
) -> dict[str, str]:
    """Run every chosen arm, one after the other; returns the errors by name of the run.

    Raises:
        InterruptedRunError: stopped from outside.
    """
    errors: dict[str, str] = {}
    for place, arm in enumerate(planned.chosen, 1):
        _announce(planned, arm, f"{place} of {len(planned.chosen)}", console)
        evict()  # nothing of one arm stays in memory for the next
        try:
            run_flow(
                planned.against_baseline(arm),
                places,
                engine=_engine(arm, places, engine),
                console=console,
                command=command,
                debug=debug,
                tags=planned.tags(arm),
                difference=planned.settings(arm),
            )
        except InterruptedRunError:
            raise
        except Exception as error:  # whatever a stage raised: the other arms go on
            if debug:
                raise
            errors[arm.choice.config.name] = f"{type(error).__name__}: {error}"
            console.print(f"[red]failed:[/] {arm.choice.config.name}: {escape(str(error))}", soft_wrap=True)
    evict()
    return errors


def run_side_by_side(
    planned: PlannedExperiment, places: Places, *, limit: int, engine: Engine, console: Console, command: str
) -> dict[str, str]:
    """Run every chosen arm in a process of its own, `limit` at a time; returns the errors by name of the run.

    Raises:
        InterruptedRunError: stopped from outside; the processes were interrupted and have ended.
    """
    errors: dict[str, str] = {}
    waiting = list(planned.chosen)
    children: list[_Child] = []
    printed = time.monotonic()
    with interruptible(), _ending(children, command):
        while waiting or children:
            while waiting and len(children) < limit:
                children.append(_start(planned, waiting.pop(0), places, engine, command))
                console.print(f"started  {children[-1].name}  [dim]{escape(str(children[-1].log))}[/]", soft_wrap=True)
            time.sleep(_POLL)
            for child in [child for child in children if child.process.poll() is not None]:
                children.remove(child)
                _signal(child, signal.SIGKILL)  # workers that a killed run leaves behind
                line = f"finished {child.name}"
                if error := child.error():
                    errors[child.name] = error
                    line = f"[red]failed[/]   {child.name}  {escape(error)}"
                console.print(line, soft_wrap=True)
            if children and time.monotonic() - printed > _PROGRESS_SECONDS:
                printed = time.monotonic()
                progress = ", ".join(progress_of(child.name, child.folder) for child in children)
                console.print(progress, style="dim", soft_wrap=True)
    return errors


@dataclass
class _Child:
    name: str
    folder: Path
    log: Path
    process: subprocess.Popen[bytes]

    def error(self) -> str:
        """Say why it ended without a result; empty where it did not."""
        code = self.process.returncode
        if code == 0:
            return ""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}; its log: {self.log}"
        record = read_record(self.folder)
        said = record.attempts[-1].error if record and record.attempts[-1].start.pid == self.process.pid else ""
        return said or f"ended with exit code {code}; its log: {self.log}"


def _start(planned: PlannedExperiment, arm: Arm, places: Places, engine: Engine, command: str) -> _Child:
    choice = planned.against_baseline(arm)
    needed = ChildConfig(
        config=choice.config,
        baseline=choice.base,
        asked=choice.asked,
        tags=planned.tags(arm),
        difference=planned.settings(arm),
        engine=_engine(arm, places, engine),
        root=places.root,
        command=command,
    )
    folder = experiment_folder(places, planned.experiment.name) / "children"
    folder.mkdir(parents=True, exist_ok=True)
    file, log = folder / f"{choice.config.name}.yaml", folder / f"{choice.config.name}.log"
    file.write_text(needed.to_yaml(), encoding="utf-8")
    with open(log, "wb") as output:
        # A session of its own: Ctrl-C reaches this process only, which interrupts each child once.
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "child", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=importing_ours(os.environ),
        )
    return _Child(choice.config.name, run_folder(places, choice.config), log, process)


@contextlib.contextmanager
def _ending(children: Sequence[_Child], command: str) -> Iterator[None]:
    """Let no child outlive the block: each is interrupted, and killed where that does not help."""
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(command) from None
    finally:
        for child in children:
            _signal(child, signal.SIGINT)
        deadline = time.monotonic() + _GRACE
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
            _signal(child, signal.SIGKILL)
            child.process.wait()


def _signal(child: _Child, number: int) -> None:
    """Signal the child and the workers it has."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, number)


def _engine(arm: Arm, places: Places, engine: Engine) -> Engine:
    """Read a run that finished before inline: thousands of reused stages would keep a Prefect server busy for minutes, with
    45 ms of its time each."""
    return "inline" if is_finished(places, arm) else engine


def _announce(planned: PlannedExperiment, arm: Arm, place: str, console: Console) -> None:
    sets = [f"{key}={now}" for key, now in planned.settings(arm).items()]
    console.print(f"\n[bold]arm {escape(arm.label)}, seed {arm.seed}[/] ({place})  {arm.plan}", soft_wrap=True)
    if sets:
        console.print(f"  against {planned.experiment.baseline}: {escape(', '.join(sets))}", soft_wrap=True)
