"""Run a study with the store, live progress and a run in MLflow, and write its report on the screen and as markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from flows.experiments.tables import Grid, markdown_rows
from flows.reward_study.config import StudyChoice
from flows.reward_study.flow import Gauge, Study, reward_model_study
from flows.runs.display import displaying
from flows.runs.paths import Places
from flows.runs.record import ARTIFACTS, InterruptedRunError, write_json, write_text
from flows.runs.session import orchestration, starting_server
from flows.runs.state import RunState
from flows.tracking.delivery import tracked_study
from flows.wording import percent
from pipeline.orchestration.interruption import interruptible, is_interruption
from pipeline.progress import failsafe
from pipeline.store import canonical_json, sha256_of, use_store
from pipeline.store.context import Engine
from pipeline.tracking.records import Record, note, point, table, tags

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


@dataclass(frozen=True)
class StudyRun:
    """A study that ran, the stages computed and reused, and its report."""

    study: Study
    executed: int
    cached: int
    report: Path


def run_study(
    choice: StudyChoice, places: Places, *, engine: Engine, console: Console, command: str, debug: bool = False
) -> StudyRun:
    """Study as configured, showing progress; leaves a report in markdown, and an MLflow run.

    Args:
        command: what continues it.

    Raises:
        InterruptedRunError: stopped from outside; what was computed is in the store.
        Exception: whatever a stage raised.
    """
    config = choice.config
    file, state = report_file(places, choice), RunState(steps=config.seeds)
    parameters = config.model_dump(mode="json")
    try:
        with (
            interruptible(),
            starting_server(engine, places, state),
            displaying(state, console, all_warnings=debug),
            tracked_study(
                places.root, experiment=config.experiment, name=config.name, key=file.stem, config=parameters
            ) as log,
            use_store(places.open_store()) as store,
            store.pins.open(file.stem),
            orchestration(engine, places, warm=not file.exists()),
        ):
            study = reward_model_study(config)
            text = study_markdown(study, choice, command)
            failsafe("the study in MLflow")(_track)(log, study, text)
            file.parent.mkdir(parents=True, exist_ok=True)
            # Before the pins end: at no moment do they look unused.
            write_json(file.with_suffix(f".{ARTIFACTS}"), state.artifacts)
    except BaseException as error:
        if is_interruption(error):
            raise InterruptedRunError(command) from error
        raise
    write_text(file, text)
    return StudyRun(study, state.executed, state.cached, file)


def report_file(places: Places, choice: StudyChoice) -> Path:
    """Return where the report is written: another configuration has another file."""
    digest = sha256_of(canonical_json(choice.config.model_dump(mode="json")))
    return places.runs / f"{choice.config.name}-{digest[:8]}.md"


def _track(log: Callable[[Record], None], study: Study, text: str) -> None:
    """Log one point per seed, the first seed first; a table of all figures; the report as the run's description."""
    for step, (seed, gauges) in enumerate(study.models.items(), 1):
        measured = {f"rm/{name}": gauge.value for name, gauge in gauges.items()}
        trained = {key: value for key, value in study.training[seed].items() if key.startswith("rm/")}
        log(point(step, measured | trained))
    log(table("gauges", list(_table(study))))
    log(tags({f"cohort.reward_model.{seed}": model.digest for seed, model in study.trained.items()}))
    log(note(text))


def _table(study: Study) -> Iterator[Mapping[str, Any]]:
    found: dict[str, dict[str, Gauge]] = {f"baseline: {name}": gauges for name, gauges in study.shortcuts.items()}
    found |= {f"reward model, seed {seed}": gauges for seed, gauges in study.models.items()}
    for score, gauges in found.items():
        for name, gauge in gauges.items():
            yield {"score": score, "gauge": name, "value": gauge.value, "low": gauge.low, "high": gauge.high}


def print_study(study: Study, console: Console) -> None:
    """Print reward model and baselines, its lead over each, author by author, calibration, and what to make of it."""
    for grid in _tables(study):
        table = Table(title=grid.title, title_justify="left")
        for place, heading in enumerate(grid.headings):
            table.add_column(heading, justify="right" if place else "left")
        for row in grid.rows:
            table.add_row(*row)
        console.print(table)
    for line in verdicts(study):
        console.print(line, soft_wrap=True)


def study_markdown(study: Study, choice: StudyChoice, command: str) -> str:
    """Return the same as markdown, with the command, what was changed and how to read it."""
    lines = [f"# {choice.config.name}", "", f"`{command}`", "", *_facts(study), ""]
    differences = choice.differences()
    if differences:
        lines += ["| changed | recipe | here |", "|---|---|---|"]
        lines += [f"| `{key}` | {was} | {now} |" for key, (was, now) in differences.items()] + [""]
    for grid in _tables(study):
        lines += [f"## {grid.title}", "", *markdown_rows(grid), ""]
    lines += [f"- {line}" for line in verdicts(study)]
    models = ", ".join(f"`{model.digest}` (seed {seed})" for seed, model in study.trained.items())
    return "\n".join([*lines, "", _READING, "", f"Reward models: {models}.", ""])


_READING: Final = """\
Intervals are 95 % percentile bootstrap intervals over questions; they hold the model fixed, so that what another seed changes
comes on top. Baselines are logistic regressions fitted on the rows that the model learned from. `within authors` is the mean
over authors of the AUC among the solutions of one; `pairs in order` compares solutions of one question only."""


def verdicts(study: Study) -> list[str]:
    """Say what the intervals of all seeds show of the model, a line for chance and for each baseline."""
    sides = {"chance": [f"{label} {_side(study, gauge, CHANCE)}" for label, gauge in _GAUGES.items()]}
    for name in study.shortcuts:
        sides[f"the baseline {name!r}"] = [
            f"{label} {_side(study, f'{gain}/{name}', 0)}" for label, gain in _GAINS.items()
        ]
    return [f"against {other}: {', '.join(found)}" for other, found in sides.items()]


def _side(study: Study, gauge: str, border: float) -> str:
    """Say on which side of the border the intervals of every seed lie; between seeds that differ nothing is claimed."""
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
    return f"not separated{seeds}"


def _facts(study: Study) -> list[str]:
    """State rows, questions and labels, a line each."""
    lines = [
        f"{what}: {study.rows[part]:,} solutions of {study.questions[part]:,} questions, {study.right[part]:.1%} right."
        for part, what in (("learned", "Learned from"), ("measured", "Measured on"))
    ]
    if any(study.left_out.values()):
        lines.append(f"Left out for their length: {study.left_out['learned']} and {study.left_out['measured']}.")
    if study.disagreement is not None:
        lines.append(f"Labels of the file that the rules contradict: {study.disagreement:.2%}.")
    return ["  \n".join(lines)]


def _tables(study: Study) -> Iterator[Grid]:
    where = f"{study.rows['measured']:,} solutions of {study.questions['measured']:,} questions not learned from"
    every = {f"baseline: {name}": found for name, found in study.shortcuts.items()}
    every |= {f"reward model, seed {seed}": found for seed, found in study.models.items()}
    scores = _grid(f"{where}: AUC, and pairs within a question", every, _GAUGES, _bounded)
    if len(study.models) > 1:
        scores.rows.append(["reward model, mean of seeds", *_means(study)])
    yield scores
    leads = {
        f"over {name}, seed {seed}": {key: found.get(f"{gain}/{name}") for key, gain in _GAINS.items()}
        for name in study.shortcuts
        for seed, found in study.models.items()
    }
    yield _grid("lead of the reward model (paired)", leads, {key: key for key in _GAINS}, _signed)
    prefix = "auc_of/"
    authors = {key.removeprefix(prefix): key for found in every.values() for key in found if key.startswith(prefix)}
    if authors:
        yield _grid("AUC among the solutions of each author", every, authors, _bounded)
    # Metrics of the training have no interval.
    own = {
        f"seed {seed}": found | {key: Gauge(value, None, None) for key, value in study.training.get(seed, {}).items()}
        for seed, found in study.models.items()
    }
    yield _grid("reward model", own, _FIGURES, lambda gauge: percent(gauge.value))


def _means(study: Study) -> list[str]:
    values = [[found[gauge].value for found in study.models.values() if gauge in found] for gauge in _GAUGES.values()]
    return [percent(statistics.fmean(known)) if (known := [v for v in row if v is not None]) else "-" for row in values]


def _grid(
    title: str,
    every: Mapping[str, Mapping[str, Gauge | None]],
    columns: Mapping[str, str],
    write: Callable[[Gauge], str],
) -> Grid:
    rows = []
    for name, found in every.items():
        gauges = [found.get(key) for key in columns.values()]
        rows.append([name, *("-" if gauge is None or gauge.value is None else write(gauge) for gauge in gauges)])
    return Grid(title, ["", *columns], rows)


def _bounded(gauge: Gauge) -> str:
    return f"{percent(gauge.value)} ({percent(gauge.low)}-{percent(gauge.high)})"


def _signed(gauge: Gauge) -> str:
    low, high = ("-" if bound is None else f"{bound:+.3f}" for bound in (gauge.low, gauge.high))
    return f"{gauge.value:+.3f} ({low} to {high})"
