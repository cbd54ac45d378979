"""Mark flow runs in Prefect's database whose process is dead, and restart them.

A flow whose process was killed stays `Running` for ever in the server. Every flow run therefore identifies a process: its
own, in a tag, or its worker, in the label that Prefect's workers leave. The next run, or a worker that watches, marks the
orphans `Crashed`; those of a deployment that allows it are scheduled again.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import psutil

from pipeline.orchestration.server_process import is_alive, start_of
from pipeline.store.locks import locked, private_folder

RESTARTS: Final = "COHORT_RESTARTS"
"""In the environment that a deployment gives its runs: how often a run whose process died is started again."""
_PROCESS: Final = re.compile(r"(?:owner:)?(?P<host>.+):(?P<pid>\d+):(?P<start>\d+(?:-\w+)?)")
_WORKER: Final = "prefect.worker.name"  # the label that Prefect's workers leave on a run when they take it
_PAGE: Final = 200  # the server's limit for one answer
_SETTLING_SECONDS: Final = 30.0
"""A run that is `Pending` for less may just be changing hands; its label is a moment behind its state."""
_settled: set[UUID] = set()  # crashed runs without a restart left: not asked about again


def process_name() -> str:
    """Return host, pid and start of this process; also the name of a worker of ours."""
    return f"{socket.gethostname()}:{os.getpid()}:{start_of(os.getpid())}"


def owner_tag() -> str:
    """Return the tag for the flow runs of this process, `with prefect.tags(owner_tag())`."""
    return f"owner:{process_name()}"


def names_living_process(name: str) -> bool | None:
    """Return whether the process of a `process_name` still runs; None for another host's, or another text."""
    owner = _PROCESS.fullmatch(name)
    if owner is None or owner["host"] != socket.gethostname():
        return None
    return is_alive(int(owner["pid"]), owner["start"])


def mark_crashed() -> int:
    """Mark this host's unfinished flow runs without a living process `Crashed`, their task runs too; return how many.

    Uses the server that Prefect's client is configured for; call after `ensure_server`.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
    from prefect.states import Cancelled, Crashed

    unfinished = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
    state = Crashed(message="The process of this run is gone; the same command continues from the store.")
    with _one_at_a_time(), get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(unfinished), limit=_PAGE)
        dead = [run for run in runs if _is_dead(run)]
        for run in dead:
            of_run = {**unfinished, "flow_run_id": {"any_": [str(run.id)]}}
            tasks = client.read_task_runs(task_run_filter=TaskRunFilter.model_validate(of_run), limit=_PAGE)
            for task in tasks:
                client.set_task_run_state(task.id, state, force=True)
            cancelled = run.state.type.value == "CANCELLING"
            client.set_flow_run_state(run.id, Cancelled() if cancelled else state, force=True)
    return len(dead)


def restart_crashed(pool: str) -> list[UUID]:
    """Schedule this host's crashed runs of a work pool again where their deployment allows it (`RESTARTS`); return which.

    Started again, a run repeats the stage that was in flight and reuses all others.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.states import AwaitingRetry

    crashed = FlowRunFilter.model_validate({"state": {"type": {"any_": ["CRASHED"]}}})
    of_pool = WorkPoolFilter.model_validate({"name": {"any_": [pool]}})
    restarted = []
    with _one_at_a_time(), get_client(sync_client=True) as client:
        for run in client.read_flow_runs(
            flow_run_filter=crashed, work_pool_filter=of_pool, sort=FlowRunSort.START_TIME_DESC, limit=_PAGE
        ):
            if run.id in _settled or names_living_process(_owner(run)) is None:
                continue
            if _may_restart(client.read_flow_run_states(run.id), _restarts(client, run)):
                client.set_flow_run_state(run.id, AwaitingRetry(message="Its process died; started again."), force=True)
                restarted.append(run.id)
            else:
                _settled.add(run.id)
    return restarted


def _may_restart(states: Sequence[Any], restarts: int) -> bool:
    """Return whether a crashed run has restarts left, and was not cancelled."""
    types = [state.type.value for state in sorted(states, key=lambda state: state.timestamp)]
    return types.count("CRASHED") <= restarts and types[-2:] != ["CANCELLING", "CRASHED"]


def _restarts(client: Any, run: Any) -> int:
    from prefect.exceptions import ObjectNotFound

    try:
        deployment = client.read_deployment(run.deployment_id)
    except ObjectNotFound:
        return 0
    environment: Mapping[str, Any] = (deployment.job_variables or {}).get("env") or {}
    given = str(environment.get(RESTARTS, "0"))
    return int(given) if given.isdecimal() else 0


def _is_dead(run: Any) -> bool:
    """Return whether the owner of a run is a process of this host that is gone; runs of other hosts are left out."""
    if run.state.type.value == "PENDING":
        since = datetime.datetime.now(datetime.UTC) - run.state.timestamp
        if since.total_seconds() < _SETTLING_SECONDS:
            return False
        if run.deployment_id and _WORKER not in run.labels:
            return True  # its worker died between taking the run and signing for it
    return names_living_process(_owner(run)) is False and not _runs_here(run)


def _owner(run: Any) -> str:
    """Return the worker that took the run, where it is one of ours, else the process in the run's tag."""
    worker = str(run.labels.get(_WORKER, ""))
    tags = (tag for tag in run.tags if tag.startswith("owner:"))
    return worker if _PROCESS.fullmatch(worker) else next(tags, "")


def _runs_here(run: Any) -> bool:
    """Return whether the process that the run's worker started still runs: for a moment it outlives a killed worker."""
    with contextlib.suppress(psutil.Error, OSError, ValueError, TypeError):
        process = psutil.Process(int(run.infrastructure_pid))
        return process.environ().get("PREFECT__FLOW_RUN_ID") == str(run.id)
    return False


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Let one process of this user and host mark runs at a time: two would start a run twice."""
    folder = private_folder(Path(tempfile.gettempdir()) / f"cohort-{os.getuid()}")
    with locked(folder / "flow-runs.lock"):
        yield
