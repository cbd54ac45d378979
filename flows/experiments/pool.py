"""Who serves a work pool of Prefect's, and which of its runs nobody answers for any more."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from uuid import UUID

from pipeline.config import ConfigError
from pipeline.orchestration.flow_runs import names_living_process

__all__ = ["crash_lost", "require_pool", "serving"]

_WORKER = "prefect.worker.name"  # the label that Prefect's workers leave on a run when they take it


def require_pool(pool: str) -> None:
    """Refuse a pool that is not there: runs would wait for ever for a worker that nobody starts under a mistyped name.

    Raises:
        ConfigError: with the pools that there are.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        names = [found.name for found in client.read_work_pools(limit=200)]
    if pool in names:
        return
    near = difflib.get_close_matches(pool, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names) or 'none'};"
    raise ConfigError(
        f"--workers {pool}: no such work pool; {hint} `cohort worker --pool {pool}` makes it and serves it"
    )


def serving(pool: str) -> list[str]:
    """Names of the workers that serve a pool: those that were heard of lately and, on this host, live."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        workers = client.read_workers_for_work_pool(pool)
    return [worker.name for worker in workers if _serves(worker.name, str(worker.status))]


def crash_lost(pool: str, runs: Sequence[UUID]) -> list[UUID]:
    """Mark those of some flow runs `Crashed` whose worker was not heard of for three of its heartbeats; returns which.

    For workers of other hosts, whose processes nobody here can look at. Should the run be alive after all, it and the one
    that takes its place compute nothing twice: a stage has one lock.
    """
    from prefect.client.orchestration import get_client
    from prefect.states import Crashed

    state = Crashed(message="Its worker was not heard of any more; the store has what it computed.")
    with get_client(sync_client=True) as client:
        heard = {worker.name: str(worker.status) for worker in client.read_workers_for_work_pool(pool)}
        lost = []
        for run in map(client.read_flow_run, runs):
            status = heard.get(str(run.labels.get(_WORKER, "")), "")
            if run.state and run.state.is_running() and status.endswith("OFFLINE"):
                client.set_flow_run_state(run.id, state, force=True)
                lost.append(UUID(str(run.id)))
    return lost


def _serves(name: str, status: str) -> bool:
    alive = names_living_process(name)  # of another host, or of another kind of worker: only its heartbeat tells
    return status.endswith("ONLINE") if alive is None else alive
