"""Schedules: a cron expression checked field by field, so that an error names the one to correct."""

from __future__ import annotations

import asyncio
import difflib
import re
import zoneinfo
from typing import Any, Final

from pipeline.config import ConfigError

__all__ = ["cron_schedule"]

_FIELDS: Final = {
    "minute": "0 to 59",
    "hour": "0 to 23",
    "day of the month": "1 to 31",
    "month": "1 to 12 or jan to dec",
    "day of the week": "0 to 6 or sun to sat",
}
_EXAMPLE: Final = "for example '30 6 * * mon-fri' (06:30 on working days) or '0 */4 * * *' (every four hours)"


def cron_schedule(text: str, timezone: str | None = None) -> Any:
    """Prefect's schedule for a cron expression of five fields, in `timezone` (UTC by default).

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
        schedule = CronSchedule(cron=text, timezone="UTC" if timezone is None else _known(timezone))
    except ValueError:
        raise ConfigError(f"--timezone {timezone!r}: {_nearest(str(timezone))}") from None
    if not _fires(schedule):
        raise ConfigError(f"--schedule {text!r} never fires: no day of any year has this date; {_EXAMPLE}")
    return schedule


def _known(timezone: str) -> str:
    if not timezone:  # Prefect would take UTC
        raise ValueError
    return timezone


def _nearest(timezone: str) -> str:
    zones = {zone.casefold(): zone for zone in zoneinfo.available_timezones()}
    near = difflib.get_close_matches(timezone.casefold(), zones, n=1)
    return f"did you mean {zones[near[0]]!r}?" if near else "expected a name such as Europe/Berlin or UTC"


def _fires(schedule: Any) -> bool:
    """Whether the server, which makes the runs, finds a next date."""
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
