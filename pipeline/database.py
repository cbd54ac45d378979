"""A tracking database behind a URL (PostgreSQL, MySQL): reached at once or not at all, and named without its password.

MLflow tries for minutes to reach a database that is not there, and two clients that find an empty one both make its tables.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from typing import Any, Final

__all__ = ["is_database", "making_tables", "unspoken", "with_driver", "without_password"]

_SERVERS: Final = ("postgresql", "mysql", "mssql")
"""Databases that MLflow writes to itself, beside sqlite."""
_SECRETS: Final = "passw(?:or)?d|pwd|secret|token|api_?key|access_?key|signature|credential"
_PASSWORDS: Final = (
    re.compile(r"([A-Za-z][\w+.-]*://[^:/@\s]*:)(\S+)(?=@)"),
    re.compile(r"(https?://)([^:/@?#\s]+)(?=@)"),
    re.compile(rf"(?i)([?&;][\w-]*(?:{_SECRETS})[\w-]*=)([^&;\s]+)"),
)
"""Where a URL may have one: before the host (of HTTP a token alone), and among the options."""
_LOCK: Final = 0x636F686F7274
"""Number of the advisory lock under which tables are made: `cohort` in ASCII."""


def is_database(uri: str) -> bool:
    """Whether a tracking URI is that of a database server; a sqlite file and an HTTP server are none."""
    return uri.partition(":")[0].partition("+")[0] in _SERVERS


def with_driver(uri: str) -> str:
    """A plain `postgresql://` with a driver that is installed: SQLAlchemy takes one by its own version, there or not."""
    scheme, _, rest = uri.partition("://")
    drivers = [name for name in ("psycopg", "psycopg2") if importlib.util.find_spec(name)]
    return f"postgresql+{drivers[0]}://{rest}" if scheme == "postgresql" and drivers else uri


def without_password(text: str) -> str:
    """A URI, or a text with some in it, as it may be stored and printed. One with another password is the same place."""
    for place in _PASSWORDS:
        text = place.sub(r"\1***", text)
    return text


def unspoken(text: str, uri: str) -> str:
    """A text, an error for instance, without the password that the URI has."""
    for found in (place.search(uri) for place in _PASSWORDS):
        text = text.replace(found[2], "***") if found else text
    return text


@contextlib.contextmanager
def making_tables(uri: str) -> Iterator[None]:
    """Hold the database for whoever makes its tables inside the block; the others wait. PostgreSQL only: others take no turn.

    Raises:
        ModuleNotFoundError: the package that speaks to such a database is missing.
        sqlalchemy.exc.OperationalError: it cannot be reached, or refuses the login.
    """
    with _connected(uri) as connection:
        if connection.dialect.name == "postgresql":
            # Freed by the database when the connection ends, however it ends.
            connection.exec_driver_sql(f"SELECT pg_advisory_lock({_LOCK})")
        yield


def _connected(uri: str) -> Any:
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    try:
        return create_engine(uri, poolclass=NullPool).connect()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{without_password(uri)} needs the package of {error.name}: pip install 'cohort-rl[postgres]' for PostgreSQL"
        ) from None
