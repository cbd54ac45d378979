"""Flow runs in Prefect's database: which process owns one, and the truth about those whose process is dead.

A flow whose process was killed stays `Running` for ever in the server. Every flow run therefore carries a tag that names its
process beyond doubt, and the next run marks the orphans `Crashed`.
"""

from __future__ import annotations

import os
import re
import socket
from typing import Final

import psutil

from pipeline.server_process import is_alive

__all__ = ["mark_crashed", "owner_tag"]

_OWNER: Final = re.compile(r"owner:(?P<host>.+):(?P<pid>\d+):(?P<created>\d+)")
_PAGE: Final = 200  # the server's limit for one answer


def owner_tag() -> str:
    """The tag for the flow runs of this process, `with prefect.tags(owner_tag())`: host, pid and start time."""
    return f"owner:{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.0f}"


def mark_crashed() -> int:
    """Mark this host's flow runs that are `Running` without a living process `Crashed`, their task runs too.

    Uses the server that Prefect's client is configured for; call after `ensure_server`. Returns the number of flow runs.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
    from prefect.states import Crashed

    unfinished = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
    state = Crashed(message="The process of this run is gone; the same command continues from the store.")
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(unfinished), limit=_PAGE)
        dead = [run for run in runs if _owner_is_dead(run.tags)]
        for run in dead:
            of_run = {**unfinished, "flow_run_id": {"any_": [str(run.id)]}}
            tasks = client.read_task_runs(task_run_filter=TaskRunFilter.model_validate(of_run), limit=_PAGE)
            for task in tasks:
                client.set_task_run_state(task.id, state, force=True)
            client.set_flow_run_state(run.id, state, force=True)
    return len(dead)


def _owner_is_dead(tags: list[str]) -> bool:
    """Whether the tags name a process of this host that is gone; other hosts' runs are not ours to judge."""
    owner = next(filter(None, map(_OWNER.fullmatch, tags)), None)
    if owner is None or owner["host"] != socket.gethostname():
        return False
    return not is_alive(int(owner["pid"]), float(owner["created"]))
