"""Live progress of a run: a rich display in a terminal, plain lines elsewhere (a log file, a pipe, a batch system).

A fold of events after the `RunState` that it shows, which does not depend on it. What stays on the screen is the same in both:
stages before the first step, evaluations, warnings, each once. The terminal shows the moving part below it, plain output prints
it as lines.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flows.runs.state import RunState
from flows.wording import accuracies, duration, number, percent
from pipeline.events import (
    DriftDone,
    EvaluationDone,
    Event,
    PreflightDone,
    StageDone,
    StageFailed,
    StepDone,
    Warned,
    emit,
    recording,
)
from pipeline.progress import describe_failure, failsafe, listen, warn_plainly

_PLAIN_SECONDS: Final = 5.0
"""Plain output repeats the progress of a long stage no more often than this."""
_STEP_METRICS: Final = {
    "reward": "reward/mean",
    "accuracy": "reward/status_ok",  # of the step's own outputs; left out where it is the reward
    "rules": "reward/rule",  # shown with the reward of learned models
    "AUC": "rm/auc",
    "KL": "policy/kl",
    "entropy": "policy/entropy",
    "calls": "tool/calls_mean",
}
_WORTH_A_LINE: Final = 1.0
"""Stages before the first step that took less (seconds) are not mentioned."""
_BAR: Final = 24
_WIDE: Final = 80
"""Columns of a terminal that has room for bars."""
_OURS: Final = tuple(str(Path(__file__).resolve().parents[2] / name) for name in ("pipeline", "stages", "flows"))


class Display:
    """Write the progress of a run to a console; `take` is a fold, called after that of `state`."""

    def __init__(self, state: RunState, console: Console) -> None:
        self.state = state
        self.console = console
        self.live = console.is_terminal and not console.is_dumb_terminal
        self._reused: list[int] = []
        self._greedy: tuple[tuple[int, str], str] | None = None
        """The greedy evaluation of a step and set, kept for the line of the samples that usually follow."""
        self._last_line = state.clock()

    def take(self, event: Event) -> None:
        """Write what an event calls for."""
        match event:
            case StageFailed():
                self._flush_reused()
                stopped = event.error.startswith("KeyboardInterrupt")
                self._line(f"{event.stage} {'stopped' if stopped else 'failed'}", "yellow" if stopped else "red")
            case StageDone(cached=False):
                self._stage_ended(event)
            case StepDone():
                self._step()
            case EvaluationDone():
                metrics = self.state.evaluations[event.set, event.mode]
                self._evaluation((event.step, event.set), event.mode, accuracies(metrics))
            case PreflightDone():
                self._line(f"first outputs: {event.text}")
            case DriftDone():
                self._drift(event.step, self.state.points.last)

    def note(self, topic: str, values: dict[str, Any]) -> None:
        """Write what a progress report calls for."""
        match topic:
            case "server":
                if "note" in values:
                    self._line(f"waiting for the local Prefect server ({values['note']})", "dim")
            case "lock":
                self.warn("another run computes the same stage; waiting for its result")
            case _:
                self._moved(topic)

    def warn(self, message: str) -> None:
        """Emit and show a warning, once per text."""
        if message in self.state.warnings:
            return
        emit(Warned(message))
        if message not in self.state.warnings:  # from a thread outside the run
            self.state.warnings.append(message)
        self._line(f"warning: {message}", "yellow")

    def close(self) -> None:
        """Write what was held back."""
        self._flush_greedy()
        self._flush_reused()

    # ---------------------------------------------------------------- lines that stay

    def _line(self, text: str, style: str = "") -> None:
        self._last_line = self.state.clock()
        self.console.print(Text(f"{_clock(self.state.elapsed)}  {text}", style=style), soft_wrap=True)

    def _stage_ended(self, event: StageDone) -> None:
        if not self.state.evaluations and event.seconds > _WORTH_A_LINE:
            last = {name: value for name, value in self.state.ended.items() if name not in ("done", "total")}
            self._line(f"{event.stage} took {duration(event.seconds)}  {_detail_text(last)}".rstrip())

    def _evaluation(self, where: tuple[int, str], mode: str, text: str) -> None:
        if mode == "greedy":
            self._flush_greedy()
            self._greedy = (where, text)
            return
        if self._greedy and self._greedy[0] == where:
            text, self._greedy = f"{self._greedy[1]}  {text}", None
        self._flush_greedy()
        self._flush_reused()
        self._line(f"step {where[0]:>3}  {where[1]}: {text}", "bold")

    def _drift(self, step: int, metrics: Mapping[str, float]) -> None:
        aucs = [(key.rpartition("/")[2], value) for key, value in metrics.items() if key.startswith("rm/held_out_auc/")]
        if aucs:
            self._flush_greedy()
            self._flush_reused()
            text = "  ".join(f"{name.replace('_', ' ')} {percent(value)}" for name, value in aucs)
            self._line(f"step {step:>3}  reward model, AUC on held-out outputs: {text}", "bold")

    def _flush_greedy(self) -> None:
        if self._greedy:
            (step, name), text = self._greedy
            self._greedy = None
            self._flush_reused()
            self._line(f"step {step:>3}  {name}: {text}", "bold")

    def _step(self) -> None:
        state = self.state
        self._flush_greedy()
        if not state.step_executed:
            self._reused.append(state.step)
            return
        self._flush_reused()
        if not self.live:
            self._line(f"step {state.step:>3}/{state.steps}{_iteration(state)}  {_step_text(state)}{_left(state)}")

    def _flush_reused(self) -> None:
        if self._reused:
            first, last = self._reused[0], self._reused[-1]
            self._reused.clear()
            self._line(f"step {first:>3}" + (f" to {last}" if last > first else "") + "  reused from the store", "dim")

    def _moved(self, topic: str) -> None:
        call = self.state.reporting(topic)
        detail = call.detail if call else {}
        done, total = (detail.get(name) for name in ("done", "total"))
        if self.live or (total and done == total):  # what follows says that it is complete
            return
        if self.state.clock() - self._last_line >= _PLAIN_SECONDS:
            self._line(f"{call.stage if call else topic} {_detail_text(detail)}")

    # ---------------------------------------------------------------- the part that moves

    def __rich__(self) -> RenderableType:
        state = self.state
        wide = self.console.width >= _WIDE
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=28 if wide else None, no_wrap=True, overflow="ellipsis")
        grid.add_column(width=_BAR if wide else 0)
        grid.add_column(no_wrap=True, overflow="ellipsis")
        bar: RenderableType = ProgressBar(max(state.steps, 1), state.step, width=_BAR)
        place = f"step {state.step}/{state.steps}{_iteration(state)}"
        grid.add_row(Text(place, style="bold"), bar, Text(_left(state).strip()))
        for call in list(state.computing.values()):
            total, done = call.detail.get("total"), call.detail.get("done", 0)
            seconds = Text(duration(state.clock() - call.since), style="dim")
            bar = ProgressBar(total, done, width=_BAR) if total else seconds
            grid.add_row(Text(call.stage, style="cyan"), bar, Text(_detail_text(call.detail)))
        last = "  ".join(filter(None, [_clock(state.elapsed), _held_out(state), _step_text(state)]))
        return Group(Text(), grid, Text(last, style="dim", no_wrap=True, overflow="ellipsis"))


@contextlib.contextmanager
def displaying(state: RunState, console: Console, *, all_warnings: bool = False) -> Iterator[Display]:
    """Show a run while the block runs. Warnings of this project are shown once, those of libraries on request only."""
    display = Display(state, console)

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if all_warnings or filename.startswith(_OURS):
            try:
                display.warn(str(message))
            except Exception:
                if str(message) not in state.warnings:
                    state.warnings.append(str(message))
                warn_plainly(str(message))

    with (
        warnings.catch_warnings(),
        recording(state.take, display.take),
        listen(state.note),
        listen(display.note),
    ):
        for package in ("pipeline", "stages", "flows"):
            warnings.filterwarnings("always", module=rf"{package}\.")
        warnings.showwarning = show
        with _live(display, console) if display.live else contextlib.nullcontext():
            try:
                yield display
            finally:
                failsafe("the live display")(display.close)()


@contextlib.contextmanager
def _live(display: Display, console: Console) -> Iterator[None]:
    """Keep the moving part below the lines. It is drawn by a thread of its own and inside every print: an error there is
    kept and becomes a warning at the end."""
    failures: list[str] = []

    def draw() -> RenderableType:
        try:
            return display.__rich__()
        except Exception as error:
            failures.append(describe_failure("the live display", error))
            return Text()

    live = Live(get_renderable=draw, console=console, refresh_per_second=4, transient=True)
    failsafe("the live display")(live.start)()
    try:
        yield
    finally:
        failsafe("the live display")(live.stop)()
        for failure in dict.fromkeys(failures):
            warnings.warn(failure, stacklevel=1)


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds))


def _left(state: RunState) -> str:
    left = state.seconds_left()
    return "" if left is None or state.step >= state.steps else f"  about {duration(left)} left"


def _iteration(state: RunState) -> str:
    """Where there are several; before the first step it is the first."""
    return f", iteration {state.iteration + 1}/{state.iterations}" if state.iterations > 1 else ""


def _held_out(state: RunState) -> str:
    """The last accuracy on each held-out set: by samples, where there are any, else greedily."""
    found: dict[str, float | None] = {}
    for (name, _), metrics in sorted(state.evaluations.items()):  # "greedy" sorts before "sampled"
        found[name] = metrics.get("accuracy", metrics.get("greedy_accuracy", found.get(name)))
    return "  ".join(f"{name} {percent(accuracy)}" for name, accuracy in found.items())


def _step_text(state: RunState) -> str:
    """The last step in one line: metrics, tokens per second, seconds."""
    if not state.metrics:
        return ""
    known = {label: state.metrics[key] for label, key in _STEP_METRICS.items() if key in state.metrics}
    if known.get("accuracy") == known.get("reward"):
        known.pop("accuracy", None)
    parts = [f"{label} {value:.3f}" for label, value in known.items()]
    parts += _rate(state.metrics.get("rollout/tokens_per_s"))
    return "  ".join([*parts, duration(state.step_seconds)])


def _detail_text(detail: Mapping[str, Any]) -> str:
    """What a stage reported last: how far it is, then its values."""
    values = dict(detail)
    done, total, rate = (values.pop(name, None) for name in ("done", "total", "tokens_per_s"))
    count = [] if done is None else [f"{number(done)}/{number(total)}" if total else number(done)]
    return "  ".join([*count, *(f"{name} {number(value)}" for name, value in values.items()), *_rate(rate)])


def _rate(tokens_per_s: float | None) -> list[str]:
    return [] if tokens_per_s is None else [f"{tokens_per_s:,.0f} tokens/s"]
