"""A recipe as a deployment of the flow `train`: made, run, asked for its state, cancelled.

Everything here talks to the Prefect server of this process: the configured one, or the project's own after `ensure_server`
(`deploy` sees to that).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from flows.config import IterativeRLConfig
from flows.config.resolve import Asked, Choice, descriptions
from flows.deploying.schedule import cron_schedule
from flows.deploying.versions import versions_environment
from flows.places import Places
from pipeline.config import ConfigError
from pipeline.orchestration.flow_runs import RESTARTS
from pipeline.orchestration.server import ServerError, configured_url, ensure_server
from pipeline.passwords import without_password
from pipeline.store.context import package_versions

__all__ = [
    "DEPLOYED_PLACES",
    "ENTRYPOINT",
    "POOL",
    "Deployed",
    "cancel",
    "deploy",
    "ensure_pool",
    "places_passed_on",
    "state_of",
    "submit",
]

POOL: Final = "cohort-local"
"""The work pool that workers serve, and deployments go to, when none is named."""
_TYPE: Final = "process"
ENTRYPOINT: Final = "flows.deploying.flow.train"
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_PASSED_ON: Final = ("COHORT_STORE", "MLFLOW_TRACKING_URI")
"""Places that the deployer's environment may name."""
DEPLOYED_PLACES: Final = ("COHORT_ROOT", *_PASSED_ON)
"""Places that a deployment names for its runs."""


@dataclass(frozen=True)
class Deployed:
    """A deployment as Prefect has it."""

    id: UUID
    name: str
    """`train/NAME`."""
    pool: str
    url: str
    """Its page in Prefect's user interface."""


def deploy(
    choice: Choice,
    places: Places,
    *,
    name: str,
    pool: str = POOL,
    schedule: str | None = None,
    timezone: str | None = None,
    restarts: int = 3,
    require_versions: bool = False,
    env: Mapping[str, str] | None = None,
) -> Deployed:
    """Make the deployment `train/NAME`, or renew it; runs that are there stay as they were.

    Args:
        schedule: cron expression of five fields; None takes away a schedule that was there.
        restarts: how often a run whose process died is started again by a worker.
        require_versions: refuse workers with other package versions than this process.
        env: on top of what every run is told: root, store, versions.

    Raises:
        ConfigError: the name, the schedule, or a pool of another type.
        ServerError: no server answers.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name {name!r}: expected a lower-case letter or digit, then at most 63 of a-z 0-9 . _ -")
    if schedule is None and timezone is not None:
        raise ConfigError(f"--timezone {timezone}: says what the hours of --schedule mean; give one, or leave it out")
    schedules = [] if schedule is None else [{"schedule": cron_schedule(schedule, timezone), "active": True}]
    ensure_server(places.prefect)
    ensure_pool(pool)
    from flows.deploying.flow import ASKED, train
    from flows.deploying.form import form_schema

    environment = {"COHORT_ROOT": str(places.root), RESTARTS: str(restarts), ASKED: choice.asked.model_dump_json()}
    environment |= places_passed_on(os.environ)
    environment |= versions_environment(required=require_versions) | dict(env or {})
    with _client() as client:
        made = client.create_deployment(
            client.create_flow(train),
            name,
            version=package_versions().get("cohort-rl"),
            schedules=_schedules(schedules),
            parameters={"config": choice.config.model_dump(mode="json")},
            description=_description(choice, require_versions=require_versions),
            work_pool_name=pool,
            entrypoint=ENTRYPOINT,
            parameter_openapi_schema=form_schema(train.fn),
            enforce_parameter_schema=True,
            # Relative paths in a configuration mean what they mean to `cohort run` here.
            pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(Path.cwd())}}],
            job_variables={"env": environment},
        )
    return Deployed(made, f"{train.name}/{name}", pool, f"{_ui()}/deployments/deployment/{made}")


def places_passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """Of the deployer's environment, the places that its runs are told; one with a password is the worker's affair."""
    named = {key: environment[key] for key in _PASSED_ON if environment.get(key)}
    return {key: place for key, place in named.items() if without_password(place) == place}


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
    with _client() as client:
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


def submit(
    deployed_name: str,
    config: IterativeRLConfig,
    *,
    tags: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
    difference: Mapping[str, Any] | None = None,
    asked: Asked | None = None,
) -> UUID:
    """A new flow run of a deployment, for any worker of its pool; returns its id.

    Args:
        tags: what MLflow is told beside the configuration; Prefect shows them as `name:value`.
        env: on top of the deployment's.
        difference: what differs from an experiment's baseline, by dotted key, for MLflow.
        asked: what the configuration was made from; by default what the deployment was made from.

    Raises:
        ConfigError: no such deployment.
        ServerError: no server answers.
    """
    from flows.deploying.flow import ASKED, DIFFERENCE, TAGS

    environment = dict(env or {})
    environment |= {TAGS: json.dumps(dict(tags))} if tags else {}
    environment |= {DIFFERENCE: json.dumps(dict(difference))} if difference else {}
    environment |= {ASKED: asked.model_dump_json()} if asked else {}
    with _client() as client:
        run = client.create_flow_run_from_deployment(
            _deployment(client, deployed_name).id,
            parameters={"config": config.model_dump(mode="json")},
            name=config.name,
            tags=[f"{name}:{value}" for name, value in (tags or {}).items()],
            job_variables={"env": environment} if environment else None,
        )
    return UUID(str(run.id))


def state_of(run_id: UUID) -> tuple[str, str]:
    """Type of the state of a flow run ("SCHEDULED", "RUNNING", "COMPLETED", "CRASHED", "FAILED" ...), and its message."""
    with _client() as client:
        state = client.read_flow_run(run_id).state
    return (state.type.value, state.message or "") if state else ("SCHEDULED", "")


def cancel(run_id: UUID) -> None:
    """Ask for a flow run to be cancelled; its worker ends the process. A run that has ended stays as it is."""
    from prefect.states import Cancelling

    with _client() as client:
        client.set_flow_run_state(run_id, Cancelling())


@contextlib.contextmanager
def _client() -> Iterator[Any]:
    """Prefect's client.

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


def _deployment(client: Any, name: str) -> Any:
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        raise ConfigError(f"{name}: no such deployment; `cohort deploy RECIPE` makes one") from None


def _schedules(schedules: list[dict[str, Any]]) -> list[Any]:
    from prefect.client.schemas.actions import DeploymentScheduleCreate

    return [DeploymentScheduleCreate(**schedule) for schedule in schedules]


def _ui() -> str:
    from prefect.settings import PREFECT_UI_URL

    return without_password(str(PREFECT_UI_URL.value() or os.environ["PREFECT_API_URL"].removesuffix("/api")))


def _description(choice: Choice, *, require_versions: bool) -> str:
    """Markdown for the deployment's page: the recipe, what differs from it, and the packages of the deployer."""
    config, lines = choice.config, [descriptions().get(choice.config.name, choice.config.name), ""]
    lines += [
        f"{config.iterations} x {config.steps} steps, {config.questions_per_step} questions x {config.rollout.G} outputs",
        "",
    ]
    if differences := choice.differences():
        lines += ["| changed | recipe | here |", "| --- | --- | --- |"]
        lines += [f"| {key} | {was} | {now} |" for key, (was, now) in differences.items()]
        lines.append("")
    rule = "required of workers" if require_versions else "noted with each run"
    lines += [f"Packages of the deployer ({rule}):", ""]
    lines += [f"* {name} {version}" for name, version in package_versions().items()]
    return "\n".join(lines)
