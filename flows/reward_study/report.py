"""What a study of a reward model came to, for people: tables on the screen and as markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from flows.reward_study.config import StudyChoice
from flows.reward_study.flow import Gauge, Study
from flows.wording import percent

__all__ = ["CHANCE", "print_study", "study_markdown"]

CHANCE: Final = 0.5
"""AUC, and share of pairs in order, of a score that knows nothing."""
_GAUGES: Final = {"AUC": "auc", "within authors": "auc_within_authors", "pairs in order": "pair_accuracy"}
_GAINS: Final = {"AUC": "auc_gain", "within authors": "auc_within_authors_gain"}
_FIGURES: Final = {
    "calibration error": "ece",
    "share on the right side": "accuracy",
    "rank correlation with length": "score_length",
    "of the verdict with length": "rule_length",
    "right side in the last pass": "rm/train_accuracy",
}

Columns = tuple[list[str], list[list[str]]]
"""Headings and rows."""


def print_study(study: Study, console: Console) -> None:
    """Reward model beside baselines, its lead over each, author by author, calibration, and what to make of it."""
    for title, (headings, rows) in _tables(study):
        table = Table(title=title, title_justify="left")
        for place, heading in enumerate(headings):
            table.add_column(heading, justify="right" if place else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in verdicts(study):
        console.print(line, soft_wrap=True)


def study_markdown(study: Study, choice: StudyChoice, command: str) -> str:
    """The same as markdown, with the command, what was changed and how to read it."""
    lines = [f"# {choice.config.name}", "", f"`{command}`", "", *_facts(study), ""]
    differences = choice.differences()
    if differences:
        lines += ["| changed | recipe | here |", "|---|---|---|"]
        lines += [f"| `{key}` | {was} | {now} |" for key, (was, now) in differences.items()] + [""]
    for title, (headings, rows) in _tables(study):
        lines += [f"## {title}", "", f"| {' | '.join(headings)} |", f"|---|{'---:|' * (len(headings) - 1)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    lines += [f"- {line}" for line in verdicts(study)]
    models = ", ".join(f"`{model.digest}` (seed {seed})" for seed, model in study.trained.items())
    return "\n".join([*lines, "", _READING, "", f"Reward models: {models}.", ""])


_READING: Final = """\
Intervals are 95 % percentile bootstrap intervals over questions; they hold the model fixed, so that what another seed changes
comes on top. Baselines are logistic regressions fitted on the rows that the model learned from. `within authors` is the mean
over authors of the AUC among the solutions of one; `pairs in order` compares solutions of one question only."""


def verdicts(study: Study) -> list[str]:
    """What the intervals of all seeds say of the model, a line for chance and for each baseline."""
    sides = {"chance": [f"{label} {_side(study, gauge, CHANCE)}" for label, gauge in _GAUGES.items()]}
    for name in study.shortcuts:
        sides[f"the baseline {name!r}"] = [
            f"{label} {_side(study, f'{gain}/{name}', 0)}" for label, gain in _GAINS.items()
        ]
    return [f"against {other}: {', '.join(found)}" for other, found in sides.items()]


def _side(study: Study, gauge: str, border: float) -> str:
    """On which side of the border the intervals of every seed lie; between seeds that differ nothing is claimed."""
    intervals = [found[gauge] for found in study.models.values() if gauge in found]
    known = [(each.low, each.high) for each in intervals if each.low is not None and each.high is not None]
    if not known or len(known) < len(study.models):
        return "undefined"
    above, below = sum(low > border for low, _ in known), sum(high < border for _, high in known)
    if above == len(known):
        return "above"
    if below == len(known):
        return "below"
    seeds = f" (above in {above}, below in {below} of {len(known)} seeds)" if above or below else ""
    return f"not told apart{seeds}"


def _facts(study: Study) -> list[str]:
    """Rows, questions and labels, a line each."""
    lines = [
        f"{what}: {study.rows[part]:,} solutions of {study.questions[part]:,} questions, {study.right[part]:.1%} right."
        for part, what in (("learned", "Learned from"), ("judged", "Judged on"))
    ]
    if any(study.left_out.values()):
        lines.append(f"Left out for their length: {study.left_out['learned']} and {study.left_out['judged']}.")
    if study.disagreement is not None:
        lines.append(f"Labels of the file that the rules contradict: {study.disagreement:.2%}.")
    return ["  \n".join(lines)]


def _tables(study: Study) -> list[tuple[str, Columns]]:
    where = f"{study.rows['judged']:,} solutions of {study.questions['judged']:,} questions not learned from"
    every = {f"baseline: {name}": found for name, found in study.shortcuts.items()}
    every |= {f"reward model, seed {seed}": found for seed, found in study.models.items()}
    tables = [(f"{where}: AUC, and pairs within a question", _scores(every, _GAUGES))]
    if len(study.models) > 1:
        tables[0][1][1].append(["reward model, mean of seeds", *_means(study)])
    leads = {
        f"over {name}, seed {seed}": {key: found.get(f"{gain}/{name}") for key, gain in _GAINS.items()}
        for name in study.shortcuts
        for seed, found in study.models.items()
    }
    tables.append(("lead of the reward model (paired)", _rows(leads, {key: key for key in _GAINS}, _signed)))
    prefix = "auc_of/"
    authors = {key.removeprefix(prefix): key for found in every.values() for key in found if key.startswith(prefix)}
    if authors:
        tables.append(("AUC among the solutions of each author", _scores(every, authors)))
    own = {f"seed {seed}": found | _learning(study, seed) for seed, found in study.models.items()}
    tables.append(("reward model", _rows(own, _FIGURES, lambda gauge: percent(gauge.value))))
    return tables


def _learning(study: Study, seed: int) -> dict[str, Gauge]:
    """Metrics of the training as figures without an interval."""
    return {key: Gauge(value, None, None) for key, value in study.training.get(seed, {}).items()}


def _means(study: Study) -> list[str]:
    values = [[found[gauge].value for found in study.models.values() if gauge in found] for gauge in _GAUGES.values()]
    return [percent(statistics.fmean(known)) if (known := [v for v in row if v is not None]) else "-" for row in values]


def _scores(every: Mapping[str, Mapping[str, Gauge | None]], columns: Mapping[str, str]) -> Columns:
    return _rows(every, columns, lambda gauge: f"{percent(gauge.value)} ({percent(gauge.low)}-{percent(gauge.high)})")


def _rows(every: Mapping[str, Mapping[str, Gauge | None]], columns: Mapping[str, str], write: Any) -> Columns:
    headings = ["", *columns]
    rows = []
    for name, found in every.items():
        gauges = [found.get(key) for key in columns.values()]
        rows.append([name, *("-" if gauge is None or gauge.value is None else write(gauge) for gauge in gauges)])
    return headings, rows


def _signed(gauge: Gauge) -> str:
    low, high = ("-" if bound is None else f"{bound:+.3f}" for bound in (gauge.low, gauge.high))
    return f"{gauge.value:+.3f} ({low} to {high})"
