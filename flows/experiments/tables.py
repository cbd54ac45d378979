"""Tables of an experiment: what each arm came to and what it cost, on the screen, as markdown and in the report.

All figures come from the records of what was computed, so a repeated comparison shows the same ones.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from rich.console import Console
from rich.table import Table

from flows.experiments.arms import Arm, Changes
from flows.experiments.results import ExperimentResult, RunResult
from flows.runs.paths import Places
from flows.wording import duration, number, percent
from pipeline.config import flatten

_MEASURES: Final = {"greedy": "greedy_accuracy", "samples": "accuracy"}
"""Heading and metric of the accuracies shown."""
_COSTS: Final[dict[str, tuple[str, Callable[[float], str]]]] = {
    "outputs": ("outputs", number),
    "output tokens": ("tokens", number),
    "sampling": ("sampling_seconds", duration),
    "updating": ("updating_seconds", duration),
    "peak MiB": ("peak_mib", lambda value: number(round(value))),
    "tensors MiB": ("tensors_mib", lambda value: number(round(value, 1))),
    "critic parameters": ("critic_parameters", number),
}
"""Heading, name in `Summary.cost`, and how it is written."""
_AUC: Final = "rm/auc"
_HELD_OUT_AUC: Final = "rm/held_out_auc/"


@dataclass(frozen=True)
class Grid:
    """A table; the first column names its rows."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    """What a reader must know of it."""
    numbers: bool = True
    """Whether all columns but the first hold numbers."""


class Outcome(NamedTuple):
    """An arm with one seed, and its run, which finished."""

    arm: Arm
    run: RunResult


def spread(values: Sequence[float], write: Callable[[float], str] = percent) -> str:
    """Write mean and, where they differ, the range: `0.512 (0.490-0.530)`; `-` without values."""
    if not values:
        return "-"
    mean, low, high = (write(value) for value in (statistics.fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}-{high})"


def _measures(runs: Sequence[RunResult], held_out: str) -> dict[str, str]:
    found = {key for run in runs for key in run.final.get(held_out, {})}
    return {label: key for label, key in _MEASURES.items() if key in found}


def _accuracy_headings(measures: Mapping[str, str]) -> list[str]:
    return [*(f"{label} {when}" for label in measures for when in ("before", "after")), "best"]


def _accuracy_cells(runs: Sequence[RunResult], held_out: str, measures: Mapping[str, str]) -> list[str]:
    """Write accuracies of an arm before, at the end and at best, over its runs."""
    times = ([run.before.get(held_out, {}) for run in runs], [run.final.get(held_out, {}) for run in runs])
    cells = [spread([one[key] for one in time if key in one]) for key in measures.values() for time in times]
    return [*cells, spread([run.best[held_out][1] for run in runs if held_out in run.best])]


# ------------------------------------------------------------------------------------------------ after the runs


def print_comparison(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print one table per held-out set and one of costs, a line per arm: mean over seeds and, for several, the range."""
    for grid in _tables(outcomes):
        for place, columns in enumerate(_fitting(grid, console.width)):
            table = Table(title=grid.title if place == 0 else f"{grid.title} (continued)", title_justify="left")
            for column in columns:
                justify: Any = "left" if column == 0 else "right"
                table.add_column(grid.headings[column], justify=justify, no_wrap=True)
            for row in grid.rows:
                table.add_row(*(row[column] for column in columns))
            console.print(table)


def _fitting(grid: Grid, width: int) -> Iterator[list[int]]:
    """Split the columns into tables that are each no wider than `width`, the first column in all of them."""
    # A border and two spaces.
    wide = [max(len(row[place]) for row in [grid.headings, *grid.rows]) + 3 for place in range(len(grid.headings))]
    part = [0]
    for column in range(1, len(wide)):
        if len(part) > 1 and sum(wide[one] for one in [*part, column]) >= width:
            yield part
            part = [0]
        part.append(column)
    yield part


def comparison_markdown(outcomes: Sequence[Outcome], command: str, *, name: str, asks: str = "") -> str:
    """Return what was compared, how to read it, and the same tables, as markdown.

    Args:
        name: of the experiment.
        asks: what it is to find out.
    """
    arms = [outcome.arm for outcome in outcomes]
    plans = " or ".join(dict.fromkeys(arm.plan for arm in arms))
    title = f"# {name}: {', '.join(dict.fromkeys(arm.name for arm in arms))}"
    asked = [asks, ""] if asks else []
    lines = [title, "", *asked, f"`{command}`", "", f"{plans}, {_seeds(arms)}.", "", _READING, ""]
    lines += _settings_markdown(arms)
    for grid in _tables(outcomes):
        lines += [f"## {grid.title}", "", *markdown_rows(grid), ""]
    return "\n".join(lines)


def markdown_rows(grid: Grid) -> list[str]:
    """Return a table as markdown, numbers to the right."""
    head = [f"| {' | '.join(grid.headings)} |", f"|---|{'---:|' * (len(grid.headings) - 1)}"]
    return head + [f"| {' | '.join(row)} |" for row in grid.rows]


_READING: Final = """\
All arms start from the policy `before`, the same for all; seeds draw the questions and the outputs. Several seeds are shown as
mean (lowest-highest). `best` is the highest accuracy of any evaluation, of samples where there are any. Costs are those of
training, without evaluation and supervised fine-tuning, from the records of what was computed: outputs that two arms share are
counted in both. Outputs count when they are drawn, also those that nothing is learned from; those of sft are demonstrations.
`peak MiB` is that of a GPU during an update, on a CPU that of the whole process, which also holds what earlier arms left;
`tensors MiB` is what stays alive after it. The folder of a run (`cohort runs`) has its config.yaml with every setting."""


def _settings_markdown(arms: Sequence[Arm]) -> list[str]:
    shared, own = _settings(arms)
    lines = []
    if shared:
        lines += ["| changed in the recipe, for all | recipe | here |", "|---|---|---|"]
        lines += [f"| `{key}` | {was} | {now} |" for key, (was, now) in shared.items()] + [""]
    lines += ["| arm | what it sets | runs |", "|---|---|---|"]
    for label, changes in own.items():
        runs = ", ".join(f"`{arm.choice.config.name}`" for arm in arms if arm.label == label)
        sets = ", ".join(f"`{key}={now}`" for key, (_, now) in changes.items())
        lines.append(f"| {label} | {sets or '-'} | {runs} |")
    return [*lines, ""]


def _settings(arms: Sequence[Arm]) -> tuple[Changes, dict[str, Changes]]:
    """Return what differs from the recipe in all arms, and in those of each one on top (of a critic: from the policy too)."""
    changes: dict[str, Changes] = {}
    for arm in arms:
        policy = flatten({"critic": arm.choice.config.update.model_dump(mode="json")})
        changes[arm.label] = {
            key: (was, now)
            for key, (was, now) in arm.choice.differences().items()
            if key not in ("name", "seed", "experiment") and policy.get(key, ...) != now
        }
    first, *others = changes.values()
    shared = {key: now for key, now in first.items() if others and all(other.get(key) == now for other in others)}
    return shared, {label: {k: v for k, v in found.items() if k not in shared} for label, found in changes.items()}


def _seeds(arms: Sequence[Arm]) -> str:
    seeds = sorted({arm.seed for arm in arms})
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _tables(outcomes: Sequence[Outcome]) -> Iterator[Grid]:
    """Make the tables: accuracies by held-out set, then what it cost."""
    if not outcomes:
        return
    groups: dict[str, list[RunResult]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.arm.label, []).append(outcome.run)
    over = _seeds([outcome.arm for outcome in outcomes])
    over = f"mean (range) over {over}" if over.startswith("seeds") else over
    for name in outcomes[0].run.final:
        measures = _measures([outcome.run for outcome in outcomes], name)
        rows = [[label, *_accuracy_cells(runs, name, measures)] for label, runs in groups.items()]
        yield Grid(f"{name}: accuracy, {over}", ["arm", *_accuracy_headings(measures)], rows)
    rows = [
        [label, *(spread([run.cost[key] for run in runs], write) for key, write in _COSTS.values())]
        for label, runs in groups.items()
    ]
    yield Grid(f"cost of training, {over}", ["arm", *_COSTS], rows)


# ------------------------------------------------------------------------------------------------ in the report


def accuracy_tables(result: ExperimentResult) -> Iterator[Grid]:
    """Make one table per held-out set, a row per arm: mean over the seeds that finished and the range."""
    for name in result.held_out_sets:
        measures = _measures(result.runs, name)
        runs = {arm.label: result.finished(arm.name) for arm in result.arms}
        rows = [[label, str(len(own)), *_accuracy_cells(own, name, measures)] for label, own in runs.items()]
        yield Grid(name.replace("_", " "), ["arm", "runs", *_accuracy_headings(measures)], rows)


def findings(result: ExperimentResult) -> Iterator[str]:
    """Say of each held-out set which arm ends highest, which is next, and whether their seeds' ranges overlap."""
    for name in result.held_out_sets:
        key = "accuracy" if any("accuracy" in run.final.get(name, {}) for run in result.runs) else "greedy_accuracy"
        finals = {arm.name: values for arm in result.arms if (values := result.finals(arm.name, name, key))}
        order = sorted(finals, key=lambda arm: -statistics.fmean(finals[arm]))
        what = "accuracy of samples" if key == "accuracy" else "greedy accuracy"
        place = name.replace("_", " ")
        if len(order) < 2:
            yield from (f"{place}: {what} of {arm} after training: {spread(finals[arm])}." for arm in order)
            continue
        first, second = order[:2]
        texts = [f"{arm} ({_over(finals[arm])})" for arm in (first, second)]
        yield f"{place}: {what} after training is highest in {texts[0]}, then {texts[1]}; {_apart(finals, first, second)}."


def _over(values: Sequence[float]) -> str:
    mean = percent(statistics.fmean(values))
    return mean if len(values) == 1 else f"mean {mean}, {percent(min(values))} to {percent(max(values))}"


def _apart(finals: Mapping[str, Sequence[float]], first: str, second: str) -> str:
    if min(len(finals[first]), len(finals[second])) < 2:
        return "one seed does not show whether the difference would repeat"
    overlap = min(finals[first]) <= max(finals[second])
    return "the ranges of their seeds overlap" if overlap else "the ranges of their seeds do not overlap"


def reward_model_table(result: ExperimentResult, places: Places) -> Grid | None:
    """Make a table of the reward models' AUC against the rules' verdicts, by arm and step, over seeds; None without any."""
    points: dict[tuple[str, int], dict[str, list[float]]] = {}
    for run in result.runs:
        summary = run.summary(places) if run.status == "finished" else None
        for step, metrics in _measured(summary.curve if summary else {}).items():
            for key in (key for key in metrics if key.startswith((_AUC, _HELD_OUT_AUC))):
                points.setdefault((run.arm, step), {}).setdefault(key, []).append(metrics[key])
    if not points:
        return None
    keys = sorted({key for metrics in points.values() for key in metrics})
    headings = [key.removeprefix("rm/").replace("_", " ").replace("/", ": ") for key in keys]
    rows = [
        [arm, str(step), *(spread(metrics.get(key, [])) for key in keys)] for (arm, step), metrics in points.items()
    ]
    return Grid("reward models: AUC against the rules", ["arm", "after step", *headings], rows)


def _measured(curve: Mapping[int, Mapping[str, float]]) -> Mapping[int, Mapping[str, float]]:
    """Return the steps at which reward models met held-out outputs; without any, those with evaluations."""
    for prefix in (_HELD_OUT_AUC, "eval/"):
        steps = {step: part for step, part in curve.items() if any(key.startswith(prefix) for key in part)}
        if steps:
            return steps
    return {}


# ------------------------------------------------------------------------------------------------ settings


def setting_pair(was: Any, now: Any) -> tuple[str, str]:
    """Write two values of a setting: lists of parts by their kinds, in full where those are equal."""
    short = setting(was), setting(now)
    return short if short[0] != short[1] else (_full(was), _full(now))


def setting(value: Any) -> str:
    """Write a value of a configuration; a list of parts by their kinds."""
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        kinds = (part.get("kind", part) if isinstance(part, dict) else getattr(part, "kind", part) for part in value)
        return ", ".join(map(str, kinds))
    return number(value)


def _full(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
