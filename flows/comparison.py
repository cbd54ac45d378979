"""Methods side by side: each trained from the same policy on equally many outputs, what it cost and what it came to.

Arms are ordinary runs (`cohort runs`, MLflow, resumable); what they share, such as supervised fine-tuning and the offline
outputs, is computed once. All figures come from the artifacts' own records, so a repeated comparison shows the same ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from flows.choice import Choice
from flows.methods import method_settings
from flows.summary import Summary
from flows.wording import duration, number, percent

__all__ = ["Arm", "Outcome", "arms_of", "comparison_markdown", "print_comparison"]


@dataclass(frozen=True)
class Arm:
    """One method with one seed."""

    method: str
    seed: int
    choice: Choice


@dataclass(frozen=True)
class Outcome:
    """What an arm came to."""

    arm: Arm
    summary: Summary


def arms_of(base: Choice, methods: Sequence[str], seeds: int) -> list[Arm]:
    """Every method with every seed of Algorithm 1's own randomness, from one supervised policy; all are checked at once.

    Raises:
        ConfigError: an unknown method, or one that does not fit the base.
    """
    arms = []
    for seed in range(base.config.seed, base.config.seed + seeds):
        for method in methods:
            settings = method_settings(method, base.config)
            settings |= {"seed": seed, "name": f"{settings['name']}-s{seed}"}
            config = base.config.override(settings, source=f"method {method}")
            arms.append(Arm(method, seed, Choice(config, base.config)))
    return arms


def print_comparison(outcomes: Sequence[Outcome], console: Console) -> None:
    """One table per held-out set, a line per method: mean over seeds and, for several, the range."""
    for title, columns in _tables(outcomes):
        table = Table(title=title, title_justify="left")
        for name in columns:
            table.add_column(name, justify="left" if name == "method" else "right")
        for row in zip(*columns.values(), strict=True):
            table.add_row(*row)
        console.print(table)


def comparison_markdown(outcomes: Sequence[Outcome]) -> str:
    """The same tables as markdown."""
    lines: list[str] = []
    for title, columns in _tables(outcomes):
        lines += [title, "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(row)} |" for row in zip(*columns.values(), strict=True)] + [""]
    return "\n".join(lines)


def _tables(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Title and columns: accuracies by held-out set, then what it cost."""
    groups: dict[str, list[Summary]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.arm.method, []).append(outcome.summary)
    seeds = sorted({outcome.arm.seed for outcome in outcomes})
    over = f"mean (range) over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"

    def each(write: Callable[[float], str], value: Callable[[Summary], float]) -> list[str]:
        return [_spread(write, [value(summary) for summary in group]) for group in groups.values()]

    for name, measured in outcomes[0].summary.after.items():
        columns = {"method": list(groups)}
        for label, key in _MEASURES.items():
            if key in measured:
                columns[f"{label} before"] = each(percent, lambda s, n=name, k=key: s.before[n][k])  # type: ignore[misc]
                columns["after" + " " * (len(columns) // 2)] = each(percent, lambda s, n=name, k=key: s.after[n][k])  # type: ignore[misc]
        yield f"{name}: accuracy, {over}", columns
    columns = {"method": list(groups)}
    for label, (key, write) in _COSTS.items():
        columns[label] = each(write, lambda s, k=key: s.cost[k])  # type: ignore[misc]
    yield f"cost of training, {over}", columns


_MEASURES = {"greedy": "greedy_accuracy", "samples": "accuracy"}
"""Heading and metric of the accuracies shown."""
_COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "outputs": ("outputs", number),
    "tokens sampled": ("tokens", number),
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
