"""Everything around a flow: the store, live progress, the log of the run and its sending, and on request Prefect."""

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
from flows.inspection.groups import completion_rows
from flows.runs.curve import draw_learning_curve
from flows.runs.display import displaying
from flows.runs.ledger import Ledger
from flows.runs.paths import Places
from flows.runs.record import InterruptedRunError, RunRecord, write_json, write_text
from flows.runs.state import RunState
from flows.runs.summary import Summary, summarise, summary_markdown
from flows.runs.upkeep import upkeep
from flows.tracking.delivery import as_params, delivered
from flows.tracking.fold import COMPLETIONS, CURVE, NOTE
from pipeline.config import ConfigError, flatten
from pipeline.config.text import without_password
from pipeline.events import recording
from pipeline.orchestration.interruption import interruptible, is_interruption, shielded
from pipeline.progress import failsafe, report
from pipeline.stage import joining, running_deployment
from pipeline.store import PrunedArtifactError, StoreError, use_store
from pipeline.store.context import Engine, use_engine
from pipeline.tracking.records import table
from pipeline.workers.gpu_locks import exclusive_devices
from stages.environment import environment_of
from stages.models import Checkpoint
from stages.rollout import require_backend


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
        tags: what MLflow gets with the configuration.
        difference: what differs from an experiment's baseline, by dotted key: MLflow's parameters `diff.*`.

    Raises:
        ConfigError: a function, an engine for rollouts or a sandbox that is not there, or no room to run `side_by_side`.
        InterruptedRunError: stopped from outside; what was computed is in the store.
        Exception: whatever a stage raised.
    """
    from flows.algorithm.side_by_side import runs_side_by_side

    config = choice.config
    config.reward.key()  # a reward function that is not there stops the run now, not after its first outputs
    for backend in (config.rollout.backend, config.evaluation.backend or config.rollout.backend):
        require_backend(backend)
    if config.environment is not None:
        environment_of(config.environment)
    runs_side_by_side(config)
    command = without_password(command or shlex.join(["cohort", *sys.argv[1:]]))
    state = RunState(steps=config.iterations * config.steps, iterations=config.iterations)
    parameters = config.identity() | {f"diff.{name}": value for name, value in (difference or {}).items()}
    record = RunRecord.begin(
        places, config, command=command, engine=engine, asked=choice.asked, params=as_params(parameters), tags=tags
    )
    try:
        with (
            interruptible(),
            starting_server(engine, places, state),
            recording(record.log.take),
            displaying(state, console, all_warnings=debug),
            delivered(record.folder, lambda status, error: record.end(status, state, error)) as delivery,
            recording(delivery.take),
        ):
            summary = _train_and_summarise(choice, places, engine, record, state, command)
    except BaseException as error:
        stopped = is_interruption(error)
        if record.is_running:  # it failed outside `delivered`
            with shielded():
                text = without_password(f"{type(error).__name__}: {error}")[:2000]
                record.end("interrupted" if stopped else "failed", state, text)
        if stopped:
            raise InterruptedRunError(command) from error
        raise
    finally:  # an interrupt may come between an error and its note
        if record.is_running and sys.exc_info()[0] is not None:
            with shielded():
                record.end("interrupted", state)
    return summary


def _train_and_summarise(
    choice: Choice, places: Places, engine: Engine, record: RunRecord, state: RunState, command: str
) -> Summary | None:
    """Train, then write what the run came to into its folder, from where MLflow gets it."""
    config, ledger = choice.config, Ledger()
    with _devices(config, cached=record.finished_before), recording(ledger.take):
        policy = _train(config, places, engine, record)
    record.policy = policy.digest
    summary: Summary | None = None
    with failsafe("the summary of the run"):
        summary = summarise(config, state.points.by_step, state, policy, _paths(record, places))
        record.accuracy = {"before": summary.before, "best": summary.best, "final": summary.after}
    if summary:
        _conclude(summary, record, choice, command)
    failsafe("the table of completions")(_write_completions)(ledger, places, record.folder)
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
    paths = {"run": record.folder, "learning curve": record.folder / CURVE}
    policy = places.payload(record.policy)
    # Where all was found in a remote store, nothing of it was fetched.
    return {**paths, "final policy": policy} if policy.exists() else paths


def _conclude(summary: Summary, record: RunRecord, choice: Choice, command: str) -> None:
    """Leave the outcome in the run's folder; what cannot be left must not make a trained policy a failed run."""
    with failsafe(f"the learning curve of {record.folder}"):
        _draw(summary, record)
    with failsafe(f"summary.json of {record.folder}"):
        write_json(record.folder / "summary.json", summary.as_json())
    with failsafe(f"{NOTE} of {record.folder}"):
        write_text(record.folder / NOTE, summary_markdown(summary, command, choice.differences()))


def _write_completions(ledger: Ledger, places: Places, folder: Path) -> None:
    """Write the table that MLflow's comparison shows side by side: the same questions in every run."""
    try:
        rows = completion_rows(places.open_store(), ledger)
    except PrunedArtifactError:
        return  # the table stays that was written when the outputs were there
    except StoreError as error:
        warnings.warn(f"MLflow gets no table of completions: {error}", stacklevel=2)
        return
    if rows:
        made = table("completions", rows)
        write_json(folder / COMPLETIONS, {"columns": made["columns"], "data": made["data"]})


def _draw(summary: Summary, record: RunRecord) -> None:
    picture = record.folder / CURVE
    if not (picture.exists() and _same_curve(record.folder / "summary.json", summary)):  # matplotlib takes a second
        draw_learning_curve(summary.curve, picture, title=summary.name)


def _same_curve(file: Path, summary: Summary) -> bool:
    try:
        before = json.loads(file.read_text(encoding="utf-8"))["curve"]
    except (OSError, ValueError, KeyError):
        return False
    return bool(before == json.loads(json.dumps(summary.curve)))
