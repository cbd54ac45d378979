"""The runs of an experiment on whatever workers serve a work pool, here or on other hosts that share the store.

Each run is a run of one Prefect deployment. A run whose worker died is submitted again and repeats the stage that was in
flight. At the end every run that finished is read again in this process, which computes nothing and leaves its folder, its
MLflow run and its figures here, whatever root the worker had.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final
from uuid import UUID

from rich.console import Console
from rich.markup import escape

from flows.deploying.deployment import deploy
from flows.deploying.pool import cancel, crash_lost, require_pool, serving, state_of, submit
from flows.experiments.arms import Arm, PlannedExperiment
from flows.experiments.results import is_finished
from flows.experiments.running import progress_of, run_in_turn
from flows.runs.paths import Places
from flows.runs.record import InterruptedRunError, run_folder
from pipeline.experiment import fitted_name
from pipeline.orchestration.flow_runs import mark_crashed
from pipeline.orchestration.interruption import interruptible
from pipeline.orchestration.server import ServerError, ensure_server, keep_server

SUBMISSIONS: Final = 10
"""How often one run is submitted at most. Every time it continues; ours: more deaths than that are no accident."""
_POLL: Final = 1.0
_SWEEP_SECONDS: Final = 5.0
"""How often dead runs of this host are looked for, and workers that serve the pool."""
_PROGRESS_SECONDS: Final = 30.0
_SERVER_SECONDS: Final = 600.0
"""How long a server that does not answer is waited for, before the runs are given up; the local one is started again."""
_GRACE: Final = 30.0
"""Seconds that runs have to end once they were cancelled."""
_ENDED: Final = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


@dataclass
class _Submitted:
    """A run, and the state of its latest submission."""

    arm: Arm
    id: UUID
    state: str = "SCHEDULED"
    message: str = ""
    times: int = 1

    @property
    def name(self) -> str:
        return self.arm.choice.config.name


@dataclass
class _Board:
    """The runs that are out, and what has come of the others."""

    planned: PlannedExperiment
    places: Places
    pool: str
    console: Console
    submissions: int
    deployment: str = ""
    out: list[_Submitted] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    unserved: bool = False
    """Whether no worker serves the pool, as was printed."""

    def say(self, word: str, run: _Submitted, more: str = "") -> None:
        """Print a line about a run."""
        self.console.print(f"{word:<9} {run.name}  {escape(more)}".rstrip(), soft_wrap=True)

    def deploy(self, *, require_versions: bool) -> None:
        """Make the deployment that every run is one of."""
        made = deploy(
            self.planned.against_baseline(self.planned.chosen[0]),
            self.places,
            # Not one of `cohort deploy`, which may have a schedule.
            name=fitted_name(f"ablate-{self.planned.experiment.name}"),
            pool=self.pool,
            restarts=0,  # this process submits again what died; two who do would run it twice
            require_versions=require_versions,
        )
        self.deployment = made.name
        self.console.print(f"deployed  {made.name} to the pool {made.pool}  [dim]{made.url}[/]", soft_wrap=True)

    def submit(self, arm: Arm) -> UUID:
        """Ask for the run once more."""
        return submit(
            self.deployment,
            arm.choice.config,
            tags=self.planned.tags(arm),
            difference=self.planned.settings(arm),
            asked=arm.choice.asked,
        )

    def look(self) -> None:
        """Ask for the state of every run, say what changed, and submit again what died."""
        for run in list(self.out):
            state, run.message = state_of(run.id)
            changed, run.state = state != run.state, state
            if changed and state == "RUNNING":
                self.say("started", run)
            if state == "CRASHED" and run.times < self.submissions:
                run.id, run.times, run.state = self.submit(run.arm), run.times + 1, "SCHEDULED"
                self.say("[yellow]died[/]     ", run, f"submitted again ({run.times} of at most {self.submissions})")
            elif state in _ENDED:
                self.out.remove(run)
                self._ended(run)

    def _ended(self, run: _Submitted) -> None:
        error = "" if run.state == "COMPLETED" else f"{run.state.lower()}: {run.message or 'no reason given'}"
        # It can be read here where its record is, or where both name one store by URL.
        if not error and not is_finished(self.places, run.arm) and not os.environ.get("COHORT_STORE"):
            error = (
                f"its worker finished it under another root than {self.places.root}, and stored it where this process does "
                "not read: give both one folder (--root), or one store (COHORT_STORE)"
            )
        if error:
            self.errors[run.name] = error
        self.say("[red]failed[/]   " if error else "finished", run, error)


def require_workers_pool(planned: PlannedExperiment, places: Places, pool: str) -> None:
    """Refuse a pool that is not there, where anything is to run.

    Raises:
        ConfigError: no such pool.
        ServerError: no Prefect server answers.
    """
    if not all(is_finished(places, arm) for arm in planned.chosen):
        ensure_server(places.prefect)
        require_pool(pool)


def run_on_workers(
    planned: PlannedExperiment,
    places: Places,
    *,
    pool: str,
    console: Console,
    command: str,
    require_versions: bool = False,
    submissions: int = SUBMISSIONS,
) -> dict[str, str]:
    """Have every chosen arm that is not finished run by the workers of a pool; returns the errors by name of the run.

    Raises:
        ConfigError: a pool of another type than `process`.
        ServerError: no Prefect server answers.
        InterruptedRunError: stopped from outside; the runs were cancelled, and the store has what they computed.
    """
    board = _Board(planned, places, pool, console, submissions)
    waiting = [arm for arm in planned.chosen if not is_finished(places, arm)]
    if waiting:
        ensure_server(places.prefect)
        board.deploy(require_versions=require_versions)
        with keep_server(places.prefect), interruptible(), _cancelling(board, command):
            for arm in waiting:
                board.out.append(_Submitted(arm, board.submit(arm)))
                board.say("submitted", board.out[-1])
            _await(board)
    return board.errors | _read(planned, places, board.errors, console, command)


def _await(board: _Board) -> None:
    """Wait until no run is out."""
    import httpx  # what Prefect's client speaks

    printed = swept = answered = time.monotonic()
    while board.out:
        time.sleep(_POLL)
        now = time.monotonic()
        try:
            board.look()
            if now - swept > _SWEEP_SECONDS:
                swept = now
                _sweep(board)
            answered = now
        except (ServerError, httpx.HTTPError):  # workers go on without it, and so does what is here
            if now - answered > _SERVER_SECONDS:
                raise
        if now - printed > _PROGRESS_SECONDS:
            printed = now
            silent = "the Prefect server does not answer: " if answered < now else ""
            progress = ", ".join(_progress(board, run) for run in board.out)
            board.console.print(f"{silent}{progress}", style="dim", soft_wrap=True)


def _sweep(board: _Board) -> None:
    """Mark what is dead, and ask for workers, once, where runs wait and none serves the pool."""
    mark_crashed()
    crash_lost(board.pool, [run.id for run in board.out if run.state == "RUNNING"])
    waiting = sum(run.state == "SCHEDULED" for run in board.out)
    unserved = bool(waiting) and not serving(board.pool)
    if unserved and not board.unserved:
        board.console.print(
            f"[yellow]no worker serves the pool {board.pool}[/], and {waiting} runs wait. Start one, here or on a host that "
            f"shares {board.places.root}:\n"
            f"  cohort worker --pool {shlex.quote(board.pool)}{escape(board.places.option())}",
            soft_wrap=True,
        )
    board.unserved = unserved


def _progress(board: _Board, run: _Submitted) -> str:
    if run.state != "RUNNING":
        return f"{run.name} {run.state.lower()}"
    return progress_of(run.name, run_folder(board.places, run.arm.choice.config))


def _read(
    planned: PlannedExperiment, places: Places, errors: dict[str, str], console: Console, command: str
) -> dict[str, str]:
    """Read what finished again, in this process: nothing is computed, and every folder and MLflow run is complete here."""
    finished = tuple(arm for arm in planned.chosen if arm.choice.config.name not in errors)
    if not finished:
        return {}
    console.print(f"\nreading the {len(finished)} runs again from the store", style="dim")
    return run_in_turn(replace(planned, chosen=finished), places, engine="inline", console=console, command=command)


@contextlib.contextmanager
def _cancelling(board: _Board, command: str) -> Iterator[None]:
    """Cancel the runs that the block leaves behind; workers end their processes."""
    try:
        yield
    except BaseException as error:
        _cancel(board)
        if isinstance(error, KeyboardInterrupt):
            raise InterruptedRunError(command) from None
        raise


def _cancel(board: _Board) -> None:
    if not board.out:
        return
    board.console.print(f"cancelling {len(board.out)} runs ...", style="dim")
    from prefect.exceptions import PrefectException

    with contextlib.suppress(ServerError, KeyboardInterrupt):  # a second Ctrl-C: do not wait for the workers
        for run in board.out:
            with contextlib.suppress(PrefectException):  # one that cannot be cancelled does not keep the others going
                cancel(run.id)
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline and any(state_of(run.id)[0] not in _ENDED for run in board.out):
            time.sleep(_POLL)
