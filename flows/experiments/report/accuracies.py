"""What the arms came to: accuracies before, at the end and at best, reward models' AUC, and a sentence on who is ahead."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Final

from flows.experiments.report.cells import Grid, spread
from flows.experiments.results import ExperimentResult, RunResult
from flows.places import Places
from flows.wording import percent

__all__ = ["MEASURES", "accuracy_tables", "findings", "held_out_sets", "reward_model_table"]

MEASURES: Final = {"greedy": "greedy_accuracy", "samples": "accuracy"}
"""Heading and metric of the accuracies shown."""
_AUC: Final = "rm/auc"
_HELD_OUT_AUC: Final = "rm/held_out_auc/"


def held_out_sets(result: ExperimentResult) -> list[str]:
    """The held-out sets that any run was evaluated on."""
    return list(dict.fromkeys(name for run in result.runs for name in run.final))


def accuracy_tables(result: ExperimentResult) -> Iterator[Grid]:
    """One table per held-out set, a row per arm: mean over the seeds that finished and the range."""
    for name in held_out_sets(result):
        found = [key for run in result.runs for key in run.final.get(name, {})]
        measures = {label: key for label, key in MEASURES.items() if key in found}
        headings = ["arm", "runs", *(f"{label} {when}" for label in measures for when in ("before", "after")), "best"]
        rows = []
        for arm in result.arms:
            runs = _finished(result, arm.name)
            cells = [" = ".join([arm.name, *arm.also]), str(len(runs))]
            for key in measures.values():
                before = [run.before[name][key] for run in runs if key in run.before.get(name, {})]
                cells += [spread(before), spread(result.finals(arm.name, name, key))]
            rows.append([*cells, spread([run.best[name][1] for run in runs if name in run.best])])
        yield Grid(name.replace("_", " "), headings, rows)


def findings(result: ExperimentResult) -> Iterator[str]:
    """Of each held-out set, which arm ends highest, which is next, and whether their seeds' ranges overlap."""
    for name in held_out_sets(result):
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


def reward_model_table(result: ExperimentResult, places: Places) -> Grid | None:
    """AUC of the reward models against the rules' verdicts, by arm and step, mean over seeds; None without any."""
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
    """The steps at which reward models were held against held-out outputs; without any, those with evaluations."""
    for prefix in (_HELD_OUT_AUC, "eval/"):
        steps = {step: part for step, part in curve.items() if any(key.startswith(prefix) for key in part)}
        if steps:
            return steps
    return {}


def _finished(result: ExperimentResult, arm: str) -> list[RunResult]:
    return [run for run in result.runs if (run.arm, run.status) == (arm, "finished")]


def _over(values: list[float]) -> str:
    mean = percent(statistics.fmean(values))
    return mean if len(values) == 1 else f"mean {mean}, {percent(min(values))} to {percent(max(values))}"


def _apart(finals: Mapping[str, list[float]], first: str, second: str) -> str:
    if min(len(finals[first]), len(finals[second])) < 2:
        return "one seed does not tell whether the difference would repeat"
    overlap = min(finals[first]) <= max(finals[second])
    return "the ranges of their seeds overlap" if overlap else "the ranges of their seeds do not overlap"
