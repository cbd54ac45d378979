"""`cohort deploy`, `worker`: a recipe on Prefect's schedules, and the process that runs what is due."""

from __future__ import annotations

import shlex
from typing import Annotated, Final

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.markup import escape

from flows.commands.options import UNCHANGED, Flag, MethodChanges, Root, console
from flows.deploying.deployment import deploy as make_deployment
from flows.deploying.pool import POOL, submit
from flows.runs.paths import Places

_SERVER_ROOT: Final = "Folder of the project's Prefect server; a run's own root is that of its deployment."


def deploy(
    recipe: str,
    *,
    changes: MethodChanges = UNCHANGED,
    name: str | None = None,
    pool: str = POOL,
    schedule: str | None = None,
    timezone: str | None = None,
    restarts: Annotated[int, Parameter(validator=Number(gte=0))] = 3,
    require_versions: Flag = False,
    now: Flag = False,
    root: Root = None,
) -> None:
    """Make a recipe a deployment of Prefect's, or renew it; its runs wait for a worker.

    Parameters
    ----------
    recipe
        Name of a recipe (`cohort recipes`) or a YAML file.
    name
        Name of the deployment; default: the recipe's.
    pool
        Work pool of type process; made unless it is there.
    schedule
        Five fields of cron, for example `--schedule "30 6 * * mon-fri"`.
    timezone
        What the schedule's hours mean, for example `Europe/Berlin`; default: UTC. Only with a schedule.
    restarts
        How often a run whose process died is started again; it repeats only the stage in flight.
    require_versions
        Refuse workers with other package versions than here.
    now
        Also run it once, now.
    """
    choice, places, out = changes.choose(recipe), Places.under(root), console()
    made = make_deployment(
        choice,
        places,
        name=choice.config.name.replace("_", "-") if name is None else name,
        pool=pool,
        schedule=schedule,
        timezone=timezone,
        restarts=restarts,
        require_versions=require_versions,
    )
    out.print(f"deployed [bold]{made.name}[/] to the pool {made.pool}" + (f", schedule {schedule}" if schedule else ""))
    out.print(f"  page    {made.url}", soft_wrap=True)
    out.print(f"  worker  cohort worker --pool {shlex.quote(made.pool)}{escape(places.option())}", soft_wrap=True)
    if now:
        out.print(f"  run     {submit(made.name, choice.config)}")
    else:
        out.print(f"  run     prefect deployment run {made.name}, or the button Run on its page", soft_wrap=True)


def worker(
    *,
    pool: str = POOL,
    limit: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    root: Annotated[Root, Parameter(help=_SERVER_ROOT)] = None,
) -> None:
    """Run what deployments have due, in this terminal until Ctrl-C.

    Parameters
    ----------
    pool
        Work pool of type process; made unless it is there.
    limit
        Runs at a time; default: all that are due.
    """
    from flows.deploying.worker import work

    out = console()
    work(Places.under(root), pool, limit=limit, say=lambda text: out.print(text, soft_wrap=True))
