"""What a run came to: policies before and after on every held-out set, where the time went, where everything lies.

One value, `Summary`: printed as tables, written as summary.json, drawn as the learning curve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from flows.config import IterativeRLConfig
from flows.runs.state import RunState
from flows.wording import at_k, code, duration, markdown, percent
from stages.models import Checkpoint

_MISMATCH: Final = "rollout/mismatch_"
"""Prefix of the figures of `stages/update/mismatch.py`."""

_CURVES: Final = ("eval/", "reward/mean", "reward/rule", "rm/auc", "rm/held_out_auc/", "tool/", "time/tools", _MISMATCH)
"""Prefixes of the metrics that summary.json keeps by step; all others are in MLflow and in the store."""

_WORTH_A_ROW: Final = 0.05
"""Seconds; less is shown as zero."""

Points = Mapping[int, Mapping[str, float]]


@dataclass(frozen=True)
class Summary:
    """The outcome of one run, as summary.json holds it."""

    name: str
    steps: int
    """Steps (exploration stages) that the final policy went through."""
    before: dict[str, dict[str, float]]
    """Set -> metrics of the policy before the first step (0)."""
    after: dict[str, dict[str, float]]
    """Set -> metrics of the final policy."""
    best: dict[str, tuple[int, float]]
    """Set -> step and accuracy of the best evaluation (of samples where there are any, else greedy)."""
    curve: dict[int, dict[str, float]]
    """Step -> evaluation metrics, mean reward, AUCs of reward models on held-out outputs, engine against trainer."""
    cost: dict[str, float]
    """What training took over all steps, evaluation apart: see `training_cost`."""
    time: dict[str, dict[str, float]]
    """Stage -> calls, executed, cached, failed, seconds, saved."""
    seconds: float
    """Wall time of this run."""
    server_seconds: float
    """Part of it that was spent waiting for the Prefect server to start."""
    policy: str
    """Digest of the final policy."""
    paths: dict[str, str]
    """What lies where, by what it is."""
    warnings: list[str] = field(default_factory=list)
    """What this run warned of; what a reused stage warned of, the run that computed it says."""
    mismatch: dict[str, float] = field(default_factory=dict)
    """How far rollout engine and trainer were apart at the worst step, by figure; empty where it was not measured."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def summarise(
    config: IterativeRLConfig, points: Points, state: RunState, policy: Checkpoint, paths: Mapping[str, Path]
) -> Summary:
    """The outcome of a run from its metrics by step and the reports of its stages."""
    evaluated = sorted(step for step, metrics in points.items() if any(key.startswith("eval/") for key in metrics))
    curve = {
        step: {key: value for key, value in points[step].items() if key.startswith(_CURVES)} for step in sorted(points)
    }
    return Summary(
        name=config.name,
        steps=state.step,
        before=_sets(points[evaluated[0]]) if evaluated else {},
        after=_sets(points[evaluated[-1]]) if evaluated else {},
        best=_best({step: _sets(points[step]) for step in evaluated}),
        curve=curve,
        cost=training_cost(points),
        time={stage: asdict(totals) | {"calls": totals.calls} for stage, totals in state.stages.items()},
        seconds=state.elapsed,
        server_seconds=state.server_seconds,
        policy=policy.digest,
        paths={what: str(path) for what, path in paths.items()},
        warnings=list(state.warnings),
        mismatch=worst_mismatch(points),
    )


def training_cost(points: Points) -> dict[str, float]:
    """Outputs drawn to learn from (DAPO's also those it replaces) and their tokens, seconds of sampling and of updating,
    largest memory of an update (MiB; on a CPU of the whole process), largest total of the tensors that stay alive after one,
    parameters of the value function.

    From the artifacts' own records: a repeated run has the same cost as the run that computed them.
    """

    def total(*names: str) -> float:
        return sum(metrics.get(name, 0.0) for metrics in points.values() for name in names)

    def largest(*names: str) -> float:
        return max((metrics.get(name, 0.0) for metrics in points.values() for name in names), default=0.0)

    return {
        "outputs": total("rollout/samples"),
        "tokens": total("rollout/tokens"),
        "sampling_seconds": total("rollout/seconds"),
        "updating_seconds": total("time/update", "time/critic", "time/values", "time/logprobs", "time/reference"),
        "peak_mib": largest("memory/update_mb", "memory/critic_mb"),
        "tensors_mib": largest("memory/tensors_mb"),
        "critic_parameters": largest("critic/parameters"),
    }


def worst_mismatch(points: Points) -> dict[str, float]:
    """Largest `rollout/mismatch_*` of all steps, of the effective sample size the smallest, by figure."""
    found: dict[str, list[float]] = {}
    for metrics in points.values():
        for key, value in metrics.items():
            if key.startswith(_MISMATCH):
                found.setdefault(key.removeprefix(_MISMATCH), []).append(value)
    return {figure: min(values) if figure == "ess" else max(values) for figure, values in found.items()}


def _sets(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """`{"eval/held_out/accuracy": x}` as `{"held_out": {"accuracy": x}}`."""
    sets: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        if key.startswith("eval/"):
            _, name, metric = key.split("/", 2)
            sets.setdefault(name, {})[metric] = value
    return sets


def _best(evaluations: Mapping[int, Mapping[str, Mapping[str, float]]]) -> dict[str, tuple[int, float]]:
    """The first step that reached the highest accuracy, by set."""
    best: dict[str, tuple[int, float]] = {}
    for step, sets in sorted(evaluations.items()):
        for name, metrics in sets.items():
            found = metrics.get("accuracy", metrics.get("greedy_accuracy"))
            if found is not None and (name not in best or found > best[name][1]):
                best[name] = (step, found)
    return best


# ------------------------------------------------------------------------------------------------ on the screen


def print_summary(summary: Summary, console: Console, *, ui_command: str) -> None:
    """Tables of accuracies and times, then where to look next."""
    console.print()
    if summary.after:
        console.print(_accuracy_table(summary))
    if drift := _drift_table(summary.curve):
        console.print(drift)
    console.print(_time_table(summary))
    console.print(_reuse(summary))
    if summary.mismatch:
        console.print(mismatch_line(summary.mismatch), soft_wrap=True)
    for warning in summary.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    console.print()
    width = max(map(len, [*summary.paths, "compare runs"]))
    for what, path in summary.paths.items():
        console.print(f"{what:<{width}}  [cyan]{escape(path)}[/]", soft_wrap=True, highlight=False)
    console.print(f"{'compare runs':<{width}}  [bold]{escape(ui_command)}[/]", soft_wrap=True, highlight=False)


def _accuracy_table(summary: Summary) -> Table:
    table = Table(title=f"{summary.name}: before RL and after {summary.steps} steps", title_justify="left")
    table.add_column("held-out set")
    table.add_column("measure")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("change", justify="right")
    for name, after in summary.after.items():
        before = summary.before.get(name, {})
        table.add_section()
        for number, (label, key) in enumerate(_measures(after)):
            was, now = before.get(key), after.get(key)
            change = "-" if was is None or now is None else f"{now - was:+.3f}"
            cells = [_with_interval(part, key) for part in (before, after)]
            table.add_row(name if number == 0 else "", label, *cells, change)
    return table


def _measures(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Label and key of what an evaluation has, greedy first, then samples, Pass@K and Maj@K by K."""
    named = [("greedy accuracy", "greedy_accuracy"), ("accuracy of samples", "accuracy")]
    return [(label, key) for label, key in named if key in metrics] + list(at_k(metrics).items())


def _drift_table(curve: Points) -> Table | None:
    """How reward models aged (`flows/algorithm/rewards.py`), a line per step at which they were measured; None without any."""
    prefix = "rm/held_out_auc/"
    rows = {step: metrics for step, metrics in curve.items() if any(key.startswith(prefix) for key in metrics)}
    if not rows:
        return None
    table = Table(title="reward model: AUC against the rules on held-out outputs", title_justify="left")
    table.add_column("after step", justify="right")
    for heading in _DRIFT.values():
        table.add_column(heading, justify="right")
    for step, metrics in rows.items():
        table.add_row(str(step), *(percent(metrics.get(prefix + cell)) for cell in _DRIFT))
    return table


_DRIFT: Final = {
    "old_model_old_policy": "as it was, old policy",
    "old_model_new_policy": "as it was, new policy",
    "new_model_old_policy": "retrained, old policy",
    "new_model_new_policy": "retrained, new policy",
}
"""Which model on whose outputs, and the heading."""


def _with_interval(metrics: Mapping[str, float], key: str) -> str:
    low, high = metrics.get(f"{key}_ci_low"), metrics.get(f"{key}_ci_high")
    interval = "" if low is None or high is None else f" [dim]({low:.3f} - {high:.3f})[/]"
    return percent(metrics.get(key)) + interval


def _time_table(summary: Summary) -> Table:
    table = Table(title="where the time went", title_justify="left", show_footer=True)
    total = sum(part["seconds"] for part in summary.time.values())
    saved = sum(part["saved"] for part in summary.time.values())
    executed = sum(part["executed"] for part in summary.time.values())
    cached = sum(part["cached"] for part in summary.time.values())
    outside = {
        "waiting for the Prefect server": summary.server_seconds,
        "start-up and between stages": max(0.0, summary.seconds - summary.server_seconds - total),
    }
    table.add_column("stage", footer="wall time")
    table.add_column("computed", justify="right", footer=f"{executed:,.0f}")
    table.add_column("reused", justify="right", footer=f"{cached:,.0f}")
    table.add_column("time", justify="right", footer=duration(summary.seconds))
    table.add_column("share", justify="right")
    table.add_column("time saved", justify="right", footer=duration(saved) if saved else "-")
    wall = summary.seconds or 1.0
    for stage, part in sorted(summary.time.items(), key=lambda item: -item[1]["seconds"]):
        cells = [f"{part['executed']:,.0f}", f"{part['cached']:,.0f}", duration(part["seconds"])]
        share = f"{part['seconds'] / wall:.0%}"
        table.add_row(stage, *cells, share, duration(part["saved"]) if part["saved"] else "-")
    for what, seconds in outside.items():
        if seconds >= _WORTH_A_ROW:
            table.add_row(f"[dim]{what}[/]", "", "", duration(seconds), f"{seconds / wall:.0%}", "-")
    return table


def _reuse(summary: Summary) -> str:
    executed = sum(part["executed"] for part in summary.time.values())
    cached = sum(part["cached"] for part in summary.time.values())
    saved = sum(part["saved"] for part in summary.time.values())
    if not cached:
        return f"{executed:,.0f} stages computed; the same command again computes none of them"
    return f"{executed:,.0f} stages computed, {cached:,.0f} reused from the store (they took {duration(saved)} when computed)"


def mismatch_line(worst: Mapping[str, float]) -> str:
    """Rollout engine against trainer at the worst step, in one line."""
    named = {"mean": "mean {:.2g}", "max": "largest {:.2g}", "kl": "KL {:.2g}", "ess": "effective sample size {:.4g}"}
    parts = [text.format(worst[figure]) for figure, text in named.items() if figure in worst]
    return f"log-probabilities of rollout engine and trainer, worst step: {', '.join(parts)}"


def summary_markdown(summary: Summary, command: str, differences: Mapping[str, tuple[Any, Any]]) -> str:
    """The outcome as markdown, for the description of the run in MLflow."""
    lines = [code(command), ""]
    if differences:
        lines += ["| changed | recipe | here |", "|---|---|---|"]
        lines += [f"| {code(key)} | {markdown(was)} | {markdown(now)} |" for key, (was, now) in differences.items()] + [
            ""
        ]
    lines += ["| held-out set | measure | before | after |", "|---|---|---|---|"]
    for name, after in summary.after.items():
        before = summary.before.get(name, {})
        lines += [
            f"| {markdown(name)} | {label} | {percent(before.get(key))} | {percent(after.get(key))} |"
            for label, key in _measures(after)
        ]
    lines += ["", mismatch_line(summary.mismatch)] if summary.mismatch else []
    lines += ["", *(f"* warning: {markdown(warning)}" for warning in summary.warnings)] if summary.warnings else []
    return "\n".join([*lines, "", f"Policy `{summary.policy}` after {summary.steps} steps."])
