"""Arms side by side: tables of what each came to and what it cost, on the screen and as markdown.

All figures come from the artifacts' own records, so a repeated comparison shows the same ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.config.resolve import Choice
from flows.summary import Summary
from flows.wording import duration, number, percent
from pipeline.config import flatten

__all__ = ["Arm", "Changes", "Outcome", "comparison_markdown", "print_comparison"]

Columns = dict[str, list[str]]
"""Heading -> one cell per arm."""
Changes = Mapping[str, tuple[Any, Any]]
"""Dotted key -> what it was, what it is."""


@dataclass(frozen=True)
class Arm:
    """One arm of an experiment with one seed: a run."""

    name: str
    seed: int
    choice: Choice
    also: tuple[str, ...] = ()
    """Further names of the arm: arms that came to the same configuration."""

    @property
    def label(self) -> str:
        """All its names."""
        return " = ".join([self.name, *self.also])


@dataclass(frozen=True)
class Outcome:
    """What an arm came to."""

    arm: Arm
    summary: Summary


# ------------------------------------------------------------------------------------------------ for people


def print_comparison(outcomes: Sequence[Outcome], console: Console) -> None:
    """One table per held-out set and one of costs, a line per arm: mean over seeds and, for several, the range."""
    for title, columns in _tables(outcomes):
        for place, part in enumerate(_fitting(columns, console.width)):
            table = Table(title=title if place == 0 else f"{title} (continued)", title_justify="left")
            for name in part:
                table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
            for row in zip(*part.values(), strict=True):
                table.add_row(*row)
            console.print(table)


def _fitting(columns: Columns, width: int) -> Iterator[Columns]:
    """The columns as tables that are each no wider than `width`, the arms in all of them."""
    first, *others = columns
    part, used = {first: columns[first]}, _width(first, columns)
    for name in others:
        if len(part) > 1 and used + _width(name, columns) >= width:
            yield part
            part, used = {first: columns[first]}, _width(first, columns)
        part[name] = columns[name]
        used += _width(name, columns)
    yield part


def _width(name: str, columns: Columns) -> int:
    return max(map(len, [name, *columns[name]])) + 3  # a border and two spaces


def comparison_markdown(outcomes: Sequence[Outcome], command: str, *, name: str, asks: str = "") -> str:
    """What was compared, how to read it, and the same tables, as markdown.

    Args:
        name: of the experiment.
        asks: what it is to find out.
    """
    arms = [outcome.arm for outcome in outcomes]
    title = f"# {name}: {', '.join(dict.fromkeys(arm.name for arm in arms))}"
    asked = [asks, ""] if asks else []
    plan = f"{_plans(arms)}, {_seeds(arms)}."
    lines = [title, "", *asked, f"`{command}`", "", plan, "", _READING, "", *_settings_markdown(arms)]
    for title, columns in _tables(outcomes):
        lines += [f"## {title}", "", f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
        lines += [f"| {' | '.join(row)} |" for row in zip(*columns.values(), strict=True)] + [""]
    return "\n".join(lines)


def _plans(arms: Sequence[Arm]) -> str:
    """Steps, questions and outputs; of arms that differ in them each."""
    plans = [
        f"{config.iterations} x {config.steps} steps of {config.questions_per_step} questions x {config.rollout.G} outputs"
        for config in (arm.choice.config for arm in arms)
    ]
    return " or ".join(dict.fromkeys(plans))


_READING = """\
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
    """What differs from the recipe in all arms, and in those of each one besides (of a critic: from the policy too)."""
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


def _tables(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, Columns]]:
    """Title and columns: accuracies by held-out set, then what it cost."""
    groups: dict[str, list[Summary]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.arm.label, []).append(outcome.summary)
    over = _seeds([outcome.arm for outcome in outcomes])
    over = f"mean (range) over {over}" if over.startswith("seeds") else over

    def each(write: Callable[[float], str], value: Callable[[Summary], float]) -> list[str]:
        return [_spread(write, [value(summary) for summary in group]) for group in groups.values()]

    for name, measured in outcomes[0].summary.after.items():
        columns = {"arm": list(groups)}
        for label, key in _MEASURES.items():
            if key in measured:
                columns[f"{label} before"] = each(percent, lambda s, n=name, k=key: s.before[n][k])  # type: ignore[misc]
                columns[f"{label} after"] = each(percent, lambda s, n=name, k=key: s.after[n][k])  # type: ignore[misc]
        columns["best"] = each(percent, lambda s, n=name: s.best[n][1])  # type: ignore[misc]
        yield f"{name}: accuracy, {over}", columns
    columns = {"arm": list(groups)}
    for label, (key, write) in _COSTS.items():
        columns[label] = each(write, lambda s, k=key: s.cost[k])  # type: ignore[misc]
    yield f"cost of training, {over}", columns


_MEASURES = {"greedy": "greedy_accuracy", "samples": "accuracy"}
"""Heading and metric of the accuracies shown."""
_COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "outputs": ("outputs", number),
    "output tokens": ("tokens", number),
    "sampling": ("sampling_seconds", duration),
    "updating": ("updating_seconds", duration),
    "peak MiB": ("peak_mib", lambda value: number(round(value))),
    "tensors MiB": ("tensors_mib", lambda value: number(round(value, 1))),
    "critic parameters": ("critic_parameters", number),
}
"""Heading, name in `Summary.cost`, and how it is written."""


def _spread(write: Callable[[float], str], values: Sequence[float]) -> str:
    mean = write(statistics.fmean(values))
    low, high = write(min(values)), write(max(values))
    return mean if low == high else f"{mean} ({low}-{high})"
