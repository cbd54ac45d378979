"""A work pool of Prefect's: made, its runs submitted, asked for and cancelled, and which workers serve it.

Everything here talks to the Prefect server of this process: the configured one, or the project's own after `ensure_server`.
The environment of a run carries what MLflow and the record take besides its configuration, and the deployer's packages. Other
versions may give other numbers: they are always noted with the run, and refused when the deployment asks for it.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from flows.config import IterativeRLConfig
from flows.config.resolve import Asked
from pipeline.config import ConfigError
from pipeline.config.text import without_password
from pipeline.orchestration.flow_runs import names_living_process
from pipeline.orchestration.server import ServerError, configured_url
from pipeline.store.context import package_versions

POOL: Final = "cohort-local"
"""The work pool that workers serve, and deployments go to, when none is named."""
_TYPE: Final = "process"
TAGS: Final = "COHORT_RUN_TAGS"
"""In the environment of one run: its tags in MLflow, as JSON."""
DIFFERENCE: Final = "COHORT_RUN_DIFFERENCE"
"""In the environment of one run: what differs from an experiment's baseline, as JSON."""
ASKED: Final = "COHORT_RUN_ASKED"
"""In the environment of runs: recipe and overrides that their configuration was made from, as JSON."""
VERSIONS: Final = "COHORT_DEPLOYER_VERSIONS"
"""In the environment of a deployment's runs: package -> version of whoever deployed, as JSON."""
REQUIRED: Final = "COHORT_REQUIRE_VERSIONS"
"""`1` there refuses a worker with other versions."""
_WORKER_LABEL: Final = "prefect.worker.name"
"""Label that Prefect's workers leave on a run when they take it."""


@contextlib.contextmanager
def connected() -> Iterator[Any]:
    """Open Prefect's client.

    Raises:
        ServerError: no server is configured, or it does not answer.
    """
    import httpx
    from prefect.client.orchestration import get_client

    url = os.environ.get("PREFECT_API_URL") or configured_url()
    if url is None:
        raise ServerError("no Prefect server is known; `cohort server up` starts one, or set PREFECT_API_URL")
    try:
        with get_client(sync_client=True) as client:
            yield client
    except httpx.TransportError as error:
        text = f"the Prefect server {url} does not answer ({error}); start it (`cohort server up`) or correct PREFECT_API_URL"
        raise ServerError(without_password(text)) from error


# ------------------------------------------------------------------------------------------------ pools


def ensure_pool(pool: str) -> None:
    """Make the work pool, of type process, unless it is there.

    Raises:
        ConfigError: it is there and of another type.
        ServerError: no server answers.
    """
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
    from prefect.workers.process import ProcessWorker

    wanted = WorkPoolCreate(name=pool, type=_TYPE, base_job_template=ProcessWorker.get_default_base_job_template())
    with connected() as client:
        try:
            found = client.read_work_pool(pool)
        except ObjectNotFound:
            with contextlib.suppress(ObjectAlreadyExists):  # another process made it in between
                client.create_work_pool(wanted)
            return
    if found.type != _TYPE:
        raise ConfigError(
            f"--pool {pool}: expected a work pool of type {_TYPE}, found {found.type}; choose another name, or deploy to "
            "this one with `prefect deploy` and prefect.yaml"
        )


def require_pool(pool: str) -> None:
    """Refuse a pool that is not there: under a mistyped name runs would wait for ever.

    Raises:
        ConfigError: with the pools that there are.
    """
    with connected() as client:
        names = [found.name for found in client.read_work_pools(limit=200)]
    if pool in names:
        return
    near = difflib.get_close_matches(pool, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names) or 'none'};"
    raise ConfigError(
        f"--workers {pool}: no such work pool; {hint} `cohort worker --pool {pool}` makes it and serves it"
    )


def serving(pool: str) -> list[str]:
    """Return the names of the workers that serve a pool: those heard of lately and, on this host, alive."""
    with connected() as client:
        workers = client.read_workers_for_work_pool(pool)
    return [worker.name for worker in workers if _serves(worker.name, str(worker.status))]


def crash_lost(pool: str, runs: Sequence[UUID]) -> list[UUID]:
    """Mark those of some flow runs `Crashed` whose worker was not heard of for three of its heartbeats; returns which.

    For workers of other hosts, whose processes cannot be seen from here. Should the run be alive after all, it and the one
    that takes its place compute nothing twice: a stage has one lock.
    """
    from prefect.states import Crashed

    state = Crashed(message="Its worker was not heard of any more; the store has what it computed.")
    with connected() as client:
        heard = {worker.name: str(worker.status) for worker in client.read_workers_for_work_pool(pool)}
        lost = []
        for run in map(client.read_flow_run, runs):
            status = heard.get(str(run.labels.get(_WORKER_LABEL, "")), "")
            if run.state and run.state.is_running() and status.endswith("OFFLINE"):
                client.set_flow_run_state(run.id, state, force=True)
                lost.append(UUID(str(run.id)))
    return lost


def _serves(name: str, status: str) -> bool:
    alive = names_living_process(name)  # of another host, or of another kind of worker: only its heartbeat tells
    return status.endswith("ONLINE") if alive is None else alive


# ------------------------------------------------------------------------------------------------ runs


def submit(
    deployed_name: str,
    config: IterativeRLConfig,
    *,
    tags: Mapping[str, str] | None = None,
    difference: Mapping[str, Any] | None = None,
    asked: Asked | None = None,
) -> UUID:
    """Ask for a flow run of a deployment, for any worker of its pool; returns its id.

    Args:
        tags: of the run in MLflow; Prefect shows them as `name:value`.
        difference: what differs from an experiment's baseline, by dotted key, for MLflow.
        asked: what the configuration was made from; by default what the deployment was made from.

    Raises:
        ConfigError: no such deployment.
        ServerError: no server answers.
    """
    from prefect.exceptions import ObjectNotFound

    environment = {TAGS: json.dumps(dict(tags))} if tags else {}
    environment |= {DIFFERENCE: json.dumps(dict(difference))} if difference else {}
    environment |= {ASKED: asked.model_dump_json()} if asked else {}
    with connected() as client:
        try:
            deployment = client.read_deployment_by_name(deployed_name)
        except ObjectNotFound:
            raise ConfigError(f"{deployed_name}: no such deployment; `cohort deploy RECIPE` makes one") from None
        run = client.create_flow_run_from_deployment(
            deployment.id,
            parameters={"config": config.model_dump(mode="json")},
            name=config.name,
            tags=[f"{name}:{value}" for name, value in (tags or {}).items()],
            job_variables={"env": environment} if environment else None,
        )
    return UUID(str(run.id))


def state_of(run_id: UUID) -> tuple[str, str]:
    """Return the state of a flow run, by type ("SCHEDULED", "RUNNING", "COMPLETED", "CRASHED", "FAILED" ...) and message."""
    with connected() as client:
        state = client.read_flow_run(run_id).state
    return (state.type.value, state.message or "") if state else ("SCHEDULED", "")


def cancel(run_id: UUID) -> None:
    """Ask for a flow run to be cancelled; its worker ends the process. A run that has ended stays as it is."""
    from prefect.states import Cancelling

    with connected() as client:
        client.set_flow_run_state(run_id, Cancelling())


# ------------------------------------------------------------------------------------------------ versions


class VersionsError(RuntimeError):
    """A worker has other packages than the deployer, and the deployment asks for the same; lists them."""


def versions_environment(*, required: bool) -> dict[str, str]:
    """Return what a deployment tells its runs about the packages of this process."""
    return {VERSIONS: json.dumps(package_versions()), REQUIRED: "1" if required else "0"}


def differing(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return `package: expected 1.0, found 2.0`, for every package of `expected`; what else a worker has is its own affair."""
    return [
        f"{name}: expected {version}, found {found.get(name, 'none')}"
        for name, version in expected.items()
        if found.get(name) != version
    ]


def check_versions(environment: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return what differs from the deployer's packages, as far as `environment` names them.

    Raises:
        VersionsError: something does, and the deployment requires the same.
    """
    differences = differing(json.loads(environment.get(VERSIONS, "{}")), found)
    if differences and environment.get(REQUIRED, "0") == "1":
        raise VersionsError(
            "this worker has other packages than the deployer, and the deployment requires the same "
            "(--require-versions); install them here, or deploy again from where they fit\n  "
            + "\n  ".join(differences)
        )
    return differences
