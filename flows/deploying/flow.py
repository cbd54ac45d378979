"""The flow of every deployment, `train`: its one parameter is a run's whole configuration, edited in Prefect's form.

A worker imports it by module path. The run goes where `cohort run` goes (record, ledger, summary, MLflow), under the root that
the worker's environment names; its stages are the tasks of the deployment's own flow run.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shlex
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any, Final

import prefect
from prefect.exceptions import TerminationSignal

from flows.config import IterativeRLConfig
from flows.config.resolve import Asked, choice_of
from flows.deploying.pool import ASKED, DIFFERENCE, TAGS, VERSIONS, check_versions
from flows.runs.paths import Places
from flows.runs.record import InterruptedRunError, read_record, run_folder, write_json
from flows.runs.session import run_flow
from flows.runs.summary import print_summary
from flows.wording import SafeConsole
from pipeline.orchestration.flow_runs import names_living_process, owner_tag
from pipeline.progress import failsafe
from pipeline.store.context import package_versions

WORKER: Final = "COHORT_WORKER"
"""In the environment of what a worker of ours started: the worker's process, without which its runs end."""
_WATCH_SECONDS: Final = 0.5
_WIDTH: Final = 140


def _run_name() -> str:
    """Return the name of a run in the user interface: that of its configuration."""
    config = prefect.runtime.flow_run.parameters.get("config")
    name = config.get("name") if isinstance(config, dict) else getattr(config, "name", None)
    return str(name or "train")


# The parameter's type makes the form; validation is below, so that all errors come at once, in the words of `cohort check`.
@prefect.flow(name="train", flow_run_name=_run_name, validate_parameters=False, persist_result=False)  # type: ignore[untyped-decorator]
def train(config: IterativeRLConfig) -> str:
    """Train as `config` says; returns the digest of the final policy.

    Raises:
        ConfigError: all that is wrong in what the form, or a file of parameters, says.
        VersionsError: other packages than the deployer's, where the deployment requires the same.
        TerminationSignal: stopped from outside, or with its worker; the same run again continues.
    """
    chosen = config if isinstance(config, IterativeRLConfig) else IterativeRLConfig.parse(config, source="parameters")
    places = Places.under(None)
    _sign()
    differences = check_versions(os.environ, package_versions())
    note_flow_run(places, chosen, differences)
    asked = Asked.parse(_of_environment(ASKED), source=ASKED)
    choice = choice_of(chosen, asked, "the run's parameters")  # those of the form, or of a submission
    command = shlex.join(["cohort", "run", str(run_folder(places, chosen) / "config.yaml"), "--root", str(places.root)])
    console = SafeConsole(file=_Log(), width=_WIDTH)
    try:
        with ending_with_worker():
            for line in differences:
                warnings.warn(f"another package than the deployer's: {line}", stacklevel=1)
            summary = run_flow(
                choice,
                places,
                engine="prefect",
                console=console,
                command=command,
                tags=_of_environment(TAGS) | _tags(differences),
                difference=_of_environment(DIFFERENCE) or None,
            )
    except InterruptedRunError as error:  # Prefect tells a cancelled run from one that was killed
        raise TerminationSignal(signal.SIGTERM) from error
    if summary:
        failsafe("the table of the summary")(print_summary)(
            summary, console, ui_command=shlex.join(["cohort", "ui", "--root", str(places.root)])
        )
    record = read_record(run_folder(places, chosen))
    return record.policy if record else ""


def note_flow_run(places: Places, config: IterativeRLConfig, differences: list[str]) -> None:
    """Note in the run's folder which flow run trains, and with whose packages: `flow_runs.json`."""
    folder = run_folder(places, config)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "flow_runs.json"
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        known = found if isinstance(found, dict) else {}
    known[str(prefect.runtime.flow_run.id)] = {
        "deployment": prefect.runtime.deployment.name,
        "worker": os.environ.get("PREFECT__WORKER_NAME", ""),
        "started": time.time(),
        "deployer_packages": _of_environment(VERSIONS),
        "worker_packages": package_versions(),
        "differences": differences,
    }
    write_json(file, known)


@contextlib.contextmanager
def ending_with_worker() -> Iterator[None]:
    """Stop this process when its worker is gone: then another worker continues the run, and none watches this one.

    For workers of ours (`cohort worker`) only, which name themselves in the environment.
    """
    worker, done = os.environ.get(WORKER, ""), threading.Event()

    def watch() -> None:
        while not done.wait(_WATCH_SECONDS):
            if names_living_process(worker) is False:
                _close_streams()
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watcher = threading.Thread(target=watch, name="worker-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join(timeout=5.0)


def _close_streams() -> None:
    """Point standard output and error away from the pipe that the worker read."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    os.close(null)


def _sign() -> None:
    """Name this process in the flow run's tags, in place of one that ran it before."""
    from prefect.client.orchestration import get_client

    context = prefect.context.FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    # One line per stage is worth keeping, and the run's own; a task's every state is in the graph.
    logging.getLogger("prefect.task_runs").setLevel(logging.WARNING)
    with get_client(sync_client=True) as client:
        tags = [tag for tag in client.read_flow_run(context.flow_run.id).tags if not tag.startswith("owner:")]
        client.update_flow_run(context.flow_run.id, tags=[*tags, owner_tag()])


def _of_environment(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(os.environ.get(name) or "{}")
    return found


def _tags(differences: list[str]) -> dict[str, str]:
    """Return tags of the flow run for MLflow."""
    tags = {
        "prefect.flow_run_id": str(prefect.runtime.flow_run.id),
        "prefect.deployment": str(prefect.runtime.deployment.name or ""),
    }
    return tags | ({"cohort.other_packages": "; ".join(differences)} if differences else {})


class _Log(io.StringIO):
    """A file for plain progress whose lines go to the flow run's log, and so to Prefect's user interface."""

    def write(self, text: str) -> int:
        logger = prefect.get_run_logger()
        for line in filter(str.strip, text.splitlines()):
            with contextlib.suppress(SystemExit):  # rich exits when a pipe breaks, as that to a killed worker does
                logger.info(line.rstrip())
        return len(text)
