"""A worker of this project: Prefect's process worker, which also continues what died and leaves no process behind.

Command, environment and working directory of a run are this host's own: whoever may write to Prefect's API may start runs of
the flow `train`, and nothing else. Of job variables the places that a deployment names are read, and data for the record.

A thread of its own marks the runs of killed workers of this host and schedules them again (`--restarts` of their
deployment). What the worker starts carries its name in the environment: runs end when it is gone, and what is left of
them when the worker ends is ended with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import psutil

from flows.deploying.deployment import DEPLOYED_PLACES, ENTRYPOINT
from flows.deploying.pool import ASKED, DIFFERENCE, REQUIRED, TAGS, VERSIONS, ensure_pool
from flows.runs.paths import Places
from pipeline.config import ConfigError
from pipeline.config.text import without_password
from pipeline.orchestration.flow_runs import RESTARTS, mark_crashed, process_name, restart_crashed
from pipeline.orchestration.server import ensure_server, keep_server

_PULL_STEP: Final = "prefect.deployments.steps.set_working_directory"
_OF_A_RUN: Final = (TAGS, DIFFERENCE, ASKED)
"""Variables that a flow run may bring: what `flows/deploying/flow.py` only writes down."""
_OF_A_DEPLOYMENT: Final = (*DEPLOYED_PLACES, RESTARTS, VERSIONS, REQUIRED, *_OF_A_RUN)
"""Variables that a deployment may bring; a place that this host's environment names is this host's."""

_SETTINGS: Final = {
    "PREFECT_LOGGING_TO_API_ENABLED": "true",  # the log of a run, in its page
    "PREFECT_WORKER_QUERY_SECONDS": "2",  # Prefect's 10 are meant for a server far away
}
"""Defaults of a worker and of the runs that it starts; what the user has set wins."""
_SWEEP_SECONDS: Final = 5.0
_RUN_SECONDS: Final = 20.0
_GRACE_SECONDS: Final = 10.0
"""What runs, and then whatever is left, have to end by themselves when the worker ends."""


def work(places: Places, pool: str, *, limit: int | None, say: Callable[[str], None]) -> None:
    """Serve a work pool until Ctrl-C or SIGTERM; then end what runs, each at a point from which it continues.

    Args:
        limit: runs at a time; None: as many as are due.

    Raises:
        ConfigError: a pool of another type.
        ServerError: no server answers.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if os.environ.get("PREFECT_LOGGING_LEVEL", "CRITICAL") == "CRITICAL":  # the command line's default
        os.environ["PREFECT_LOGGING_LEVEL"] = "INFO"
    url = ensure_server(places.prefect)
    ensure_pool(pool)
    name = process_name()
    os.environ["COHORT_WORKER"] = name
    say(f"worker {name} serves the pool {pool} of {without_password(url).removesuffix('/api')}; Ctrl-C ends it")
    from prefect.workers.process import ProcessWorker

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it takes the place of Prefect's own type is meant

        class CohortWorker(ProcessWorker):  # type: ignore[misc]
            """Prefect's, with our configuration of what is started."""

            type = "process"
            job_configuration = job_configuration()

    with keep_server(places.prefect), _sweeping(pool, say) as swept, _leaving_nothing(name):
        worker = CohortWorker(work_pool_name=pool, name=name, limit=limit, create_pool_if_not_found=False)
        asyncio.run(_serve(worker, name, swept))


def job_configuration() -> Any:
    """Return a `ProcessJobConfiguration` of Prefect's that takes from the API only what `work` may take from it."""
    from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

    class JobConfiguration(ProcessJobConfiguration):  # type: ignore[misc]
        """What a worker of ours starts for a flow run."""

        @classmethod
        async def resolve_for_flow_run(cls, flow_run: Any, *, deployment: Any = None, **others: Any) -> Any:
            """Return the configuration of one flow run.

            Raises:
                ConfigError: it is not one of `cohort deploy`'s, or its deployment asks for other steps.
            """
            if deployment is None and flow_run.deployment_id:
                deployment = await others["client"].read_deployment(flow_run.deployment_id)
            _require_ours(deployment)
            deployment.job_variables = {"env": _brought(deployment.job_variables, _OF_A_DEPLOYMENT)}
            flow_run.job_variables = {"env": _brought(flow_run.job_variables, _OF_A_RUN)}
            # The template of a work pool has defaults for all three, and can be written to as well.
            template = {"base_job_template": ProcessWorker.get_default_base_job_template()}
            pool = others.pop("work_pool").model_copy(update=template)
            return await super().resolve_for_flow_run(flow_run, deployment=deployment, work_pool=pool, **others)

    return JobConfiguration


def _require_ours(deployment: Any) -> None:
    """Refuse what would run other code than the flow `train` of the package that is installed here.

    Raises:
        ConfigError: it would.
    """
    expected = f"a deployment of {ENTRYPOINT} (`cohort deploy`), with no step but {_PULL_STEP}"
    steps = [name for step in (deployment and deployment.pull_steps) or [] for name in step]
    if deployment is None or deployment.entrypoint != ENTRYPOINT or set(steps) - {_PULL_STEP}:
        found = f"{deployment.entrypoint}, steps {steps}" if deployment else "a flow run without a deployment"
        raise ConfigError(
            f"a worker of Cohort: expected {expected}; found {found}; use Prefect's own worker for others"
        )


def _brought(variables: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, str]:
    """Return what a job may bring of its environment; what this host's environment says wins."""
    given = (variables or {}).get("env")
    given = given if isinstance(given, dict) else {}
    places = [name for name in DEPLOYED_PLACES if os.environ.get(name)]
    found = {name: value for name, value in given.items() if name in names and isinstance(value, str)}
    # Prefect fills in blocks and variables of its server where a value has braces.
    return {name: value for name, value in found.items() if name not in places and "{{" not in value}


async def _serve(worker: Any, name: str, swept: threading.Event) -> None:
    """Run Prefect's worker until a signal; its runs are asked to end first, since Prefect, stopped, kills them."""
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    serving = asyncio.create_task(worker.start(printer=lambda *_: None))
    await asyncio.wait({serving, asyncio.create_task(stopping.wait())}, return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        swept.set()  # what ends now is for the next worker
        deadline = time.monotonic() + _RUN_SECONDS
        for process in _runs(name):
            process.terminate()
        while _runs(name) and time.monotonic() < deadline:
            await asyncio.sleep(0.2)
        serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving


@contextlib.contextmanager
def _sweeping(pool: str, say: Callable[[str], None]) -> Iterator[threading.Event]:
    """Continue what died on this host, now and again and again inside the block, until the event is set."""
    done = threading.Event()

    def sweep() -> None:
        while True:
            try:
                mark_crashed()
                for run in restart_crashed(pool):
                    say(f"flow run {run} died; it is started again and continues from the store")
            except Exception as error:  # the server may be on its way; the next round tries again
                warnings.warn(f"runs that died are not continued yet: {error}", stacklevel=1)
            if done.wait(_SWEEP_SECONDS):
                return

    sweeper = threading.Thread(target=sweep, name="crashed-runs", daemon=True)
    sweeper.start()
    try:
        yield done
    finally:
        done.set()
        sweeper.join(timeout=5.0)


@contextlib.contextmanager
def _leaving_nothing(name: str) -> Iterator[None]:
    """End whatever still carries the worker's name when the block ends: asked first, killed after a while."""
    try:
        yield
    finally:
        for ask in (psutil.Process.terminate, psutil.Process.kill):
            left = list(_marked(name))
            for process in left:
                with contextlib.suppress(psutil.Error):
                    ask(process)
            psutil.wait_procs(left, timeout=_GRACE_SECONDS)


def _marked(name: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get("COHORT_WORKER") == name:
                yield process


def _runs(name: str) -> list[psutil.Process]:
    """Return the processes of flow runs, without what those started."""
    found = []
    for process in _marked(name):
        with contextlib.suppress(psutil.Error):
            if "prefect.engine" in process.cmdline():
                found.append(process)
    return found
