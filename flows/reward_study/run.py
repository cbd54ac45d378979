"""Around a study: the store, live progress, the tracker, and the report beside the records of runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from flows.display import displaying
from flows.places import Places
from flows.records import ARTIFACTS, write_json
from flows.reward_study.config import StudyChoice
from flows.reward_study.flow import Gauge, Study
from flows.reward_study.report import study_markdown
from flows.run_state import RunState
from flows.session import InterruptedRunError, orchestration, starting_server
from pipeline.orchestration.engine import Engine
from pipeline.orchestration.interruption import interruptible, is_interruption
from pipeline.progress import failsafe
from pipeline.store import canonical_json, sha256_of, use_store
from pipeline.tracking import Tracker, track

__all__ = ["StudyRun", "report_file", "run_study"]


@dataclass(frozen=True)
class StudyRun:
    """A study that ran, what was computed for it and what was not, and where its report lies."""

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
    from flows.reward_study.flow import reward_model_study

    config = choice.config
    file, state = report_file(places, choice), RunState(steps=config.seeds)
    parameters = config.model_dump(mode="json")
    try:
        with (
            interruptible(),
            starting_server(engine, places, state),
            displaying(state, console, all_warnings=debug),
            track(
                places.root, experiment=config.experiment, run_name=config.name, run_key=file.stem, config=parameters
            ) as tracker,
            use_store(places.open_store()) as store,
            store.pins.open(file.stem),
            orchestration(engine, places, warm=not file.exists()),
        ):
            study = reward_model_study(config)
            text = study_markdown(study, choice, command)
            failsafe("the tracker")(_track)(tracker, study, text)
            file.parent.mkdir(parents=True, exist_ok=True)
            # Before the lease ends: at no moment does it look as if nobody used them.
            write_json(file.with_suffix(f".{ARTIFACTS}"), state.artifacts)
    except BaseException as error:
        if is_interruption(error):
            raise InterruptedRunError(command) from error
        raise
    file.write_text(text, encoding="utf-8")
    return StudyRun(study, state.executed, state.cached, file)


def report_file(places: Places, choice: StudyChoice) -> Path:
    """Where the report is written: another configuration has another file."""
    digest = sha256_of(canonical_json(choice.config.model_dump(mode="json")))
    return places.runs / f"{choice.config.name}-{digest[:8]}.md"


def _track(tracker: Tracker, study: Study, text: str) -> None:
    """One point per seed, the first seed first; a table of all figures; the report as the run's description."""
    for step, (seed, gauges) in enumerate(study.models.items(), 1):
        measured = {f"rm/{name}": gauge.value for name, gauge in gauges.items()}
        tracker.log_step(
            step, measured | {key: value for key, value in study.training[seed].items() if key.startswith("rm/")}
        )
    tracker.log_table("gauges", list(_table(study)))
    tracker.set_tags({f"cohort.reward_model.{seed}": model.digest for seed, model in study.trained.items()})
    tracker.set_note(text)


def _table(study: Study) -> Iterator[Mapping[str, Any]]:
    found: dict[str, dict[str, Gauge]] = {f"baseline: {name}": gauges for name, gauges in study.shortcuts.items()}
    found |= {f"reward model, seed {seed}": gauges for seed, gauges in study.models.items()}
    for score, gauges in found.items():
        for name, gauge in gauges.items():
            yield {"score": score, "gauge": name, "value": gauge.value, "low": gauge.low, "high": gauge.high}
