"""A recipe as a deployment of the flow `train`, with its schedule and the form of Prefect's user interface."""

from __future__ import annotations

import asyncio
import difflib
import os
import re
import zoneinfo
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from flows.config.resolve import Choice, descriptions
from flows.deploying.pool import ASKED, POOL, connected, ensure_pool, versions_environment
from flows.runs.paths import Places
from pipeline.config import ConfigError
from pipeline.config.text import without_password
from pipeline.orchestration.flow_runs import RESTARTS
from pipeline.orchestration.server import ensure_server
from pipeline.store.context import package_versions

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
        env: on top of what every run gets: root, store, versions.

    Raises:
        ConfigError: the name, the schedule, or a pool of another type.
        ServerError: no server answers.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--name {name!r}: expected a lower-case letter or digit, then at most 63 of a-z 0-9 . _ -")
    if schedule is None and timezone is not None:
        raise ConfigError(f"--timezone {timezone}: says what the hours of --schedule mean; give one, or leave it out")
    cron = None if schedule is None else cron_schedule(schedule, timezone)
    ensure_server(places.prefect)
    ensure_pool(pool)
    from prefect.client.schemas.actions import DeploymentScheduleCreate

    from flows.deploying.flow import train

    environment = {"COHORT_ROOT": str(places.root), RESTARTS: str(restarts), ASKED: choice.asked.model_dump_json()}
    environment |= places_passed_on(os.environ) | versions_environment(required=require_versions) | dict(env or {})
    with connected() as client:
        made = client.create_deployment(
            client.create_flow(train),
            name,
            version=package_versions().get("cohort-rl"),
            schedules=[] if cron is None else [DeploymentScheduleCreate(schedule=cron, active=True)],
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
    """Return the places of the deployer's environment that its runs use; one with a password is the worker's affair."""
    named = {key: environment[key] for key in _PASSED_ON if environment.get(key)}
    return {key: place for key, place in named.items() if without_password(place) == place}


def _ui() -> str:
    from prefect.settings import PREFECT_UI_URL

    return without_password(str(PREFECT_UI_URL.value() or os.environ["PREFECT_API_URL"].removesuffix("/api")))


def _description(choice: Choice, *, require_versions: bool) -> str:
    """Write Markdown for the deployment's page: the recipe, what differs from it, and the packages of the deployer."""
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


# ------------------------------------------------------------------------------------------------ schedule

_FIELDS: Final = {
    "minute": "0 to 59",
    "hour": "0 to 23",
    "day of the month": "1 to 31",
    "month": "1 to 12 or jan to dec",
    "day of the week": "0 to 6 or sun to sat",
}
_EXAMPLE: Final = "for example '30 6 * * mon-fri' (06:30 on working days) or '0 */4 * * *' (every four hours)"


def cron_schedule(text: str, timezone: str | None = None) -> Any:
    """Return Prefect's schedule for a cron expression of five fields, in `timezone` (UTC by default).

    Raises:
        ConfigError: names each field that cannot be read, or the time zone; or the schedule never fires.
    """
    from prefect.client.schemas.schedules import CronSchedule

    parts = text.split()
    if text.startswith("@"):
        parts = ["*"] * len(_FIELDS)  # a name such as @daily stands for all of them
    if len(parts) != len(_FIELDS):
        raise ConfigError(
            f"--schedule {text!r}: expected {len(_FIELDS)} fields ({', '.join(_FIELDS)}), found {len(parts)}; {_EXAMPLE}"
        )
    wrong = [
        f"{name}: {part!r} is not {allowed}, *, a range or a list"
        for place, (part, (name, allowed)) in enumerate(zip(parts, _FIELDS.items(), strict=True))
        if not _reads(" ".join(part if field == place else "*" for field in range(len(_FIELDS))))
    ]
    # Prefect reads a range from a number to itself as every number.
    wrong += [
        f"{name}: {part!r} is a range of one; write {found[1]}"
        for part, name in zip(parts, _FIELDS, strict=True)
        if (found := re.search(r"\b(\w+)-\1\b", part))
    ]
    if wrong or not _reads(text):
        raise ConfigError("\n  ".join([f"--schedule {text!r} cannot be read; {_EXAMPLE}", *wrong]))
    try:
        if timezone == "":  # Prefect would take UTC
            raise ValueError
        schedule = CronSchedule(cron=text, timezone="UTC" if timezone is None else timezone)
    except ValueError:
        raise ConfigError(f"--timezone {timezone!r}: {_nearest(str(timezone))}") from None
    if not _fires(schedule):
        raise ConfigError(f"--schedule {text!r} never fires: no day of any year has this date; {_EXAMPLE}")
    return schedule


def _nearest(timezone: str) -> str:
    zones = {zone.casefold(): zone for zone in zoneinfo.available_timezones()}
    near = difflib.get_close_matches(timezone.casefold(), zones, n=1)
    return f"did you mean {zones[near[0]]!r}?" if near else "expected a name such as Europe/Berlin or UTC"


def _fires(schedule: Any) -> bool:
    """Return whether the server, which makes the runs, finds a next date."""
    from prefect.server.schemas.schedules import CronSchedule

    try:
        return bool(asyncio.run(CronSchedule(cron=schedule.cron, timezone=schedule.timezone).get_dates(n=1)))
    except ValueError:
        return False


def _reads(text: str) -> bool:
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=text, timezone="UTC")
    except ValueError:
        return False
    return True


# ------------------------------------------------------------------------------------------------ form


def form_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the OpenAPI schema of a flow's parameters, as Prefect makes it, made ready for the form."""
    from prefect.utilities.callables import parameter_schema

    schema: dict[str, Any] = ready_for_form(parameter_schema(function).model_dump_for_openapi())
    return schema


def ready_for_form(part: Any) -> Any:
    """Return a schema in which unions are choices.

    Prefect's form shows sections for `anyOf`, and a box of JSON for the `oneOf` that pydantic writes. The `kind`s exclude one
    another either way.
    """
    if isinstance(part, list):
        return [ready_for_form(item) for item in part]
    if not isinstance(part, dict):
        return part
    kept = {
        name: ready_for_form(value) for name, value in part.items() if name != "discriminator" or "oneOf" not in part
    }
    if "oneOf" in kept:
        kept["anyOf"] = kept.pop("oneOf")
    if "anyOf" in kept:  # a union or nothing is one choice, not a choice within a choice
        kept["anyOf"] = [option for inner in kept["anyOf"] for option in inner.get("anyOf", [inner])]
    return kept
