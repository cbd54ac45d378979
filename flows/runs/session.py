"""Everything around a flow: the store, live progress, the tracker, the record of the run, and on request Prefect."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from flows.config import IterativeRLConfig
from flows.config.resolve import Choice
from flows.runs.completions import completion_rows
from flows.runs.curve import draw_learning_curve
from flows.runs.display import displaying
from flows.runs.ledger import Ledger
from flows.runs.paths import Places
from flows.runs.record import RunRecord, write_json
from flows.runs.registry import Registrar
from flows.runs.state import RunState
from flows.runs.summary import Summary, summarise, summary_markdown
from flows.runs.upkeep import upkeep
from pipeline.config import ConfigError, flatten
from pipeline.config.passwords import without_password
from pipeline.events import recording
from pipeline.orchestration.engine import Engine, joining, running_deployment, use_engine
from pipeline.orchestration.interruption import check, interruptible, is_interruption, shielded
from pipeline.progress import failsafe, report
from pipeline.store import PrunedArtifactError, StoreError, use_store
from pipeline.tracking import Tracker, track
from pipeline.workers.gpu_locks import exclusive_devices
from stages.models import Checkpoint
from stages.rollout import require_backend

__all__ = ["InterruptedRunError", "orchestration", "run_flow", "starting_server"]


class InterruptedRunError(Exception):
    """A run that was stopped from outside (a signal, a closed terminal); its text is the command that continues it."""


def run_flow(
    choice: Choice,
    places: Places,
    *,
    engine: Engine,
    console: Console,
    command: str = "",
    debug: bool = False,
    tags: Mapping[str, str] | None = None,
    difference: Mapping[str, Any] | None = None,
) -> Summary | None:
    """Train as configured, showing progress; leaves log, summary and learning curve in the run's folder.

    Returns the summary; None where it could not be drawn up, which a warning explains. The run has finished either way.

    Args:
        command: what continues the run; that of this process by default.
        tags: what MLflow gets beside the configuration.
        difference: what differs from an experiment's baseline, by dotted key: MLflow's parameters `diff.*`.

    Raises:
        ConfigError: a reward function, or an engine for rollouts, that is not there.
        InterruptedRunError: stopped from outside; what was computed is in the store.
        Exception: whatever a stage raised.
    """
    config = choice.config
    config.reward.key()  # a reward function that is not there stops the run now, not after its first outputs
    for backend in (config.rollout.backend, config.evaluation.backend or config.rollout.backend):
        require_backend(backend)
    command = without_password(command or shlex.join(["cohort", *sys.argv[1:]]))
    state = RunState(steps=config.iterations * config.steps, iterations=config.iterations)
    parameters = config.identity() | {f"diff.{name}": value for name, value in (difference or {}).items()}
    params = {
        name: value if isinstance(value, str) else json.dumps(value) for name, value in flatten(parameters).items()
    }
    record = RunRecord.begin(
        places, config, command=command, engine=engine, asked=choice.asked, params=params, tags=tags
    )
    try:
        with (
            interruptible(),
            starting_server(engine, places, state),
            recording(record.log.take),
            displaying(state, console, all_warnings=debug),
            track(
                places.root,
                experiment=config.experiment,
                run_name=config.name,
                run_key=record.folder.name,
                config=parameters,
                tags=tags,
            ) as tracker,
        ):
            summary = _train_and_summarise(choice, places, engine, record, state, tracker, command, tags or {})
            check()
    except BaseException as error:
        interrupted = is_interruption(error)
        with shielded():
            text = without_password(f"{type(error).__name__}: {error}")[:2000]
            record.end("interrupted" if interrupted else "failed", state, text)
        if interrupted:
            raise InterruptedRunError(command) from error
        raise
    finally:  # an interrupt may come between an error and its note
        if record.is_running and sys.exc_info()[0] is not None:
            with shielded():
                record.end("interrupted", state)
    with shielded():
        record.end("finished", state)
    return summary


def _train_and_summarise(
    choice: Choice,
    places: Places,
    engine: Engine,
    record: RunRecord,
    state: RunState,
    tracker: Tracker,
    command: str,
    tags: Mapping[str, str],
) -> Summary | None:
    """Train, then write what the run came to into its folder and to MLflow."""
    config, ledger = choice.config, Ledger()
    registrar = Registrar(tracker, config, tags)
    state.points.log = tracker
    with _devices(config, cached=record.finished_before), recording(ledger.take, registrar.take):
        policy = _train(config, places, engine, record)
    record.policy = policy.digest
    summary: Summary | None = None
    with failsafe("the summary of the run"):
        summary = summarise(config, state.points.by_step, state, policy, _paths(record, places))
        record.accuracy = {"before": summary.before, "best": summary.best, "final": summary.after}
    if summary:
        _conclude(summary, record, tracker, choice, command)
        failsafe("the registry of models")(registrar.conclude)(summary, ledger)
    failsafe("the table of completions")(_log_completions)(ledger, places, tracker)
    return summary


def _train(config: IterativeRLConfig, places: Places, engine: Engine, record: RunRecord) -> Checkpoint:
    from flows.iterative_rl import iterative_rl

    with (
        use_store(places.open_store()) as store,
        upkeep(store, config, places, record.folder.name),
        orchestration(engine, places, warm=not record.finished_before),
    ):
        return iterative_rl(config)


@contextlib.contextmanager
def _devices(config: IterativeRLConfig, *, cached: bool) -> Iterator[None]:
    """Have the CUDA devices that the run computes on: one, or as many as its ranks or its rollouts share a model over.

    Before any stage: who waited for a device inside one would keep its lock from the run that has the device. A run that
    finished before is read again, for which there is nothing to wait.
    """
    wanted = [
        value
        for name, value in flatten(config.model_dump(mode="json")).items()
        if name.endswith((".ranks", ".tensor_parallel_size"))
    ]
    if cached:
        yield
        return
    with exclusive_devices(max([1, *wanted]), holder=config.name):
        yield


@contextlib.contextmanager
def starting_server(engine: Engine, places: Places, state: RunState) -> Iterator[None]:
    """Let the Prefect server start while whatever comes before the first task runs: it needs seconds.

    A run that is refused leaves none behind that it started.
    """
    if engine == "inline" or running_deployment():
        yield
        return
    from pipeline.orchestration.server import start_server_soon, stop_server

    started = start_server_soon(places.prefect)
    try:
        yield
    except Exception as error:
        refused = isinstance(error, ConfigError | StoreError) or not state.stages
        if started and refused and not is_interruption(error):
            stop_server(places.prefect)
        raise


@contextlib.contextmanager
def orchestration(engine: Engine, places: Places, *, warm: bool) -> Iterator[None]:
    """The engine that flows run on inside the block: plain calls, or Prefect with a server that is kept alive.

    Args:
        warm: import what training needs while the server starts; a run that reuses everything needs none of it.
    """
    if engine == "inline":
        yield
        return
    if running_deployment():  # the worker looks after the server, and its flow run shows the stages
        with joining():
            yield
        return
    from pipeline.orchestration.server import ensure_server, keep_server, server_status

    started = time.monotonic()
    if not server_status(places.prefect).healthy:
        first = "" if (places.prefect / "prefect.db").exists() else "; it creates its database, once"
        report("server", note=f"log: {places.prefect / 'server.log'}{first}")
    warming = threading.Thread(target=_import_heavy if warm else int, name="imports", daemon=True)
    warming.start()
    ensure_server(places.prefect)
    warming.join()
    report("server", seconds=time.monotonic() - started)
    import prefect

    from pipeline.orchestration.flow_runs import mark_crashed, owner_tag

    try:
        mark_crashed()
    except Exception as error:  # tidying up after others must not stop this run
        warnings.warn(f"runs that were killed still show as Running in Prefect: {error}", stacklevel=2)
    with keep_server(places.prefect), prefect.tags(owner_tag()), use_engine("prefect"):
        yield


def _import_heavy() -> None:
    """Import torch and transformers. Only a head start: whatever fails here fails again, clearly, where it is needed."""
    with contextlib.suppress(Exception):
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401


def _paths(record: RunRecord, places: Places) -> dict[str, Path]:
    paths = {"run": record.folder, "learning curve": record.folder / "learning_curve.png"}
    policy = places.payload(record.policy)
    # Where all was found in a remote store, nothing of it was fetched.
    return {**paths, "final policy": policy} if policy.exists() else paths


def _conclude(summary: Summary, record: RunRecord, tracker: Tracker, choice: Choice, command: str) -> None:
    """Leave the outcome in the run's folder and in MLflow; what cannot be left must not make a trained policy a failed run."""
    with failsafe(f"the learning curve of {record.folder}"):
        _draw(summary, record, tracker)
    with failsafe(f"summary.json of {record.folder}"):
        write_json(record.folder / "summary.json", summary.as_json())
    with failsafe("the outcome in MLflow"):
        _track_outcome(summary, tracker, choice, command)


def _track_outcome(summary: Summary, tracker: Tracker, choice: Choice, command: str) -> None:
    finals = {f"final/{name}/{key}": value for name, part in summary.after.items() for key, value in part.items()}
    bests = {f"best/{name}/accuracy": accuracy for name, (_, accuracy) in summary.best.items()}
    tracker.log_summary({key: value for key, value in finals.items() if key.endswith("accuracy")} | bests)
    tracker.set_tags({"cohort.policy": summary.policy})
    tracker.set_note(summary_markdown(summary, command, choice.differences()))


def _log_completions(ledger: Ledger, places: Places, tracker: Tracker) -> None:
    """Under one name in every run, so that MLflow's comparison shows the same questions side by side."""
    try:
        rows = completion_rows(places.open_store(), ledger)
    except PrunedArtifactError:
        return  # MLflow keeps the table that it was given when the outputs were there
    except StoreError as error:
        warnings.warn(f"MLflow gets no table of completions: {error}", stacklevel=2)
        return
    if rows:
        tracker.log_table("completions", rows)


def _draw(summary: Summary, record: RunRecord, tracker: Tracker) -> None:
    picture = record.folder / "learning_curve.png"
    if not (picture.exists() and _same_curve(record.folder / "summary.json", summary)):  # matplotlib takes a second
        draw_learning_curve(summary.curve, picture, title=summary.name)
    tracker.log_figure(picture)


def _same_curve(file: Path, summary: Summary) -> bool:
    try:
        before = json.loads(file.read_text(encoding="utf-8"))["curve"]
    except (OSError, ValueError, KeyError):
        return False
    return bool(before == json.loads(json.dumps(summary.curve)))
