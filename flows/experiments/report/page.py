"""The report as a page: sections from results, put into the template, written in one piece.

What models wrote is in the page as text: every value is escaped, and the page forbids scripts and other files itself.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from flows.config import IterativeRLConfig
from flows.experiments.report.arms import chosen_seed, descent, side_by_side
from flows.experiments.results import ExperimentResult, RunResult, experiment_folder
from flows.experiments.tables import (
    Grid,
    accuracy_tables,
    findings,
    reward_model_table,
    setting,
    setting_pair,
)
from flows.inspection.faithful import deviations
from flows.runs.paths import Places
from flows.runs.record import write_text
from flows.wording import duration, number
from pipeline.store import StoreError

if TYPE_CHECKING:
    from flows.experiments.figures import Figure

_TEMPLATE: Final = "report.html.j2"
_FILE: Final = "report.html"


class _Picture(NamedTuple):
    """A figure in the page."""

    title: str
    caption: str
    source: str
    """`data:` address that holds it; empty where its files are gone."""


def write_report(result: ExperimentResult, places: Places, figures: Sequence[Figure]) -> Path:
    """Write runs/<experiment>/report.html; returns its path. Whatever is missing is said in its place.

    Raises:
        StoreError: the folder cannot be written; the report that was there stays.
    """
    file = report_file(places, result.experiment.name)
    page = _render(result, places, figures)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, page)
    except OSError as error:
        raise StoreError(
            f"{file} cannot be written ({error.strerror or error}): free space or correct permissions, then "
            f"`cohort report {result.experiment.name}`; results and runs are kept"
        ) from None
    return file


def report_file(places: Places, name: str) -> Path:
    """Return where the report of an experiment lies."""
    return experiment_folder(places, name) / _FILE


def _render(result: ExperimentResult, places: Places, figures: Sequence[Figure]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(**_sections(result, places, figures))


def _sections(result: ExperimentResult, places: Places, figures: Sequence[Figure]) -> dict[str, Any]:
    return {
        "experiment": result.experiment,
        "command": result.command,
        "arms": [arm.name for arm in result.arms],
        "findings": list(findings(result)),
        "pictures": [_picture(figure) for figure in figures],
        "accuracies": list(accuracy_tables(result)),
        "differences": _differences(result),
        "runs": _runs(result),
        "unfinished": [_unfinished(run) for run in result.runs if run.status != "finished"],
        "sharing": list(_sharing(result)),
        "seed": chosen_seed(result),
        "comparisons": side_by_side(result, places),
        "descent": descent(result, places),
        "deviations": list(_deviations(result, places)),
        "reward_models": reward_model_table(result, places),
    }


def _picture(figure: Figure) -> _Picture:
    """Embed a figure as an image, which runs nothing, whatever is in the file."""
    for file, kind in ((figure.svg, "svg+xml"), (figure.png, "png")):
        try:
            content = base64.b64encode(file.read_bytes()).decode()
        except OSError:
            continue
        return _Picture(figure.title, figure.caption, f"data:image/{kind};base64,{content}")
    return _Picture(figure.title, figure.caption, "")


def _differences(result: ExperimentResult) -> Grid:
    """Make a row for each setting in which any arm differs from the baseline, a column for each arm."""
    rows = []
    for key in dict.fromkeys(key for arm in result.arms for key in arm.differences):
        was, now = next(arm.differences[key] for arm in result.arms if key in arm.differences)
        # The baseline's value, written as next to the first arm that has something else.
        baseline = "-" if was is None else setting_pair(was, now)[0]
        here = (setting_pair(*arm.differences[key])[1] if key in arm.differences else "" for arm in result.arms)
        rows.append([key, *(shown or baseline for shown in here)])
    title = f"Settings that are not those of {result.experiment.baseline}"
    return Grid(title, ["setting", *(arm.label for arm in result.arms)], rows, numbers=False)


def _runs(result: ExperimentResult) -> Grid:
    rows = [
        [run.name, str(run.seed), run.status, number(run.steps), run.policy[:12] or "-", run.folder]
        for run in result.runs
    ]
    headings = ["run", "seed", "status", "steps", "final policy", "folder"]
    return Grid("Every arm with every seed", headings, rows, numbers=False)


def _unfinished(run: RunResult) -> str:
    reason = f": {run.error}" if run.error else ""
    return f"{run.name}: {run.status}{reason}"


def _sharing(result: ExperimentResult) -> Iterator[tuple[str, str]]:
    """Yield what the runs that finished ask for apart, what was executed for all of them, and what that saves."""
    sharing = result.sharing
    yield "runs that finished", number(sharing.runs)
    yield "stage calls asked for", number(sharing.asked)
    yield "executed", number(sharing.distinct)
    yield "reused", number(sharing.asked - sharing.distinct)
    yield "time apart", duration(sharing.seconds_apart)
    yield "time together", f"{duration(sharing.seconds_together)} ({sharing.ratio:.2f} of it)"
    yield "saved", duration(sharing.seconds_apart - sharing.seconds_together)


def _deviations(result: ExperimentResult, places: Places) -> Iterator[Grid]:
    """Make tables of what deviates from the paper: in all arms, then in some, with the arms."""
    configs = _arm_configs(result, places)
    found: dict[tuple[str, ...], list[str]] = {}
    for arm, config in configs.items():
        for part in deviations(config):
            found.setdefault((part.key, part.paper, part.where, setting(part.here)), []).append(arm)
    headings = ["field", "paper", "section", "here"]
    everywhere = [list(row) for row, arms in found.items() if len(arms) == len(configs)]
    some = [[*row, ", ".join(arms)] for row, arms in sorted(found.items()) if len(arms) < len(configs)]
    missing = [arm.name for arm in result.arms if arm.name not in configs]
    notes = [f"not looked at, since no run of it is there: {', '.join(missing)}"] if missing else []
    if everywhere or notes:
        yield Grid("In every arm", headings, everywhere, notes, numbers=False)
    if some:
        yield Grid("In some arms", [*headings, "arms"], some, numbers=False)


def _arm_configs(result: ExperimentResult, places: Places) -> dict[str, IterativeRLConfig]:
    """Read the configuration of every arm with the first of its seeds that ran; arms that never ran are left out."""
    configs: dict[str, IterativeRLConfig] = {}
    for run in result.runs:
        file = places.runs / run.folder / "config.yaml"
        if run.arm not in configs:
            with contextlib.suppress(OSError, ValueError):
                configs[run.arm] = IterativeRLConfig.from_yaml(file.read_text(encoding="utf-8"), source=str(file))
    return configs
