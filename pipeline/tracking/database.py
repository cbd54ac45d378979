"""The database behind MLflow: which one, its tables, and the place of its artifacts.

A sqlite file below the root, unless MLFLOW_TRACKING_URI names another one, PostgreSQL or MySQL, or a server. MLflow tries for
minutes to reach a database that is not there, and two clients that find an empty one both make its tables.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pipeline.config.text import without_password
from pipeline.store.locks import lock_file

_SERVERS: Final = ("postgresql", "mysql", "mssql")
"""Databases other than sqlite that MLflow writes to itself."""
_LOCK: Final = 0x636F686F7274
"""Number of the advisory lock under which tables are made: `cohort` in ASCII."""
_QUIET: Final = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "GIT_PYTHON_REFRESH": "quiet",
    # A dead tracking server is noticed at once and a hung one in a minute; MLflow's defaults try for many minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "PGCONNECT_TIMEOUT": "10",  # a PostgreSQL that does not answer; without it a connection waits for minutes
}
"""What the user has set wins."""


def tracking_uri(home: Path) -> str:
    """Where runs are tracked: MLFLOW_TRACKING_URI when the user set it, else the project's own sqlite database."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"
    database = local_database(uri)
    return uri if database is None else f"sqlite:///{database.resolve()}"


def local_database(uri: str) -> Path | None:
    """The file of a sqlite database; None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def artifact_folder(uri: str, home: Path) -> str | None:
    """Where a new experiment keeps its tables and figures; None: where MLflow's server says.

    A database keeps none: they are in `mlruns` next to the store, or where MLFLOW_DEFAULT_ARTIFACT_ROOT says (`s3://...`).
    """
    if local_database(uri) is None and not is_database(uri):
        return None
    return os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT") or (home / "mlruns").resolve().as_uri()


def connect(uri: str) -> Any:
    """An MLflow client for `uri`; a local database, and the tables of another, are made first. Imports mlflow (seconds).

    Raises:
        Exception: whatever the database says to being reached.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    database = local_database(uri)
    if database is not None:
        _create(database, MlflowClient)
    uri = with_driver(uri)
    if is_database(uri):
        with making_tables(uri):
            MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    return MlflowClient(tracking_uri=uri)


def _create(database: Path, client: Any) -> None:
    """Create the tables in a draft and rename it: a kill half-way leaves no half database."""
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(database.with_suffix(".lock"), "w") as lock:
        lock_file(lock)
        if database.exists():
            return
        for leftover in database.parent.glob(f"{database.stem}.*.draft"):
            leftover.unlink()
        # A name of its own: MLflow keeps one store per URI for the life of a process, deleted file or not.
        draft = database.with_suffix(f".{uuid.uuid4().hex}.draft")
        client(tracking_uri=f"sqlite:///{draft}").search_experiments(max_results=1)
        os.replace(draft, database)


def adopt(database: Path, home: Path) -> int:
    """Let the runs of a database that was copied, or moved, with its project keep their artifacts here; how many did.

    MLflow stores absolute places: those of a copy would be the original's, to read and to write.
    """
    if os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT") or database != home / "mlflow.db" or not database.exists():
        return 0
    here, count = (home / "mlruns").resolve().as_uri(), 0
    with contextlib.closing(sqlite3.connect(database, timeout=30.0)) as connection, connection:
        found = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        for (there,) in found:
            if there == here or not str(there).startswith("file:") or not str(there).endswith("/mlruns"):
                continue
            inside = (f"{there}/", len(there) + 1)
            runs = connection.execute("SELECT run_uuid FROM runs WHERE substr(artifact_uri, 1, ?2) = ?1", inside)
            if not any((home / "mlruns" / run).is_dir() for (run,) in runs.fetchall()):
                continue  # a place of its own, not the folder that came along
            connection.execute(
                "UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (here, there)
            )
            for table, column in (("runs", "artifact_uri"), ("logged_models", "artifact_location")):
                moved = connection.execute(
                    f"UPDATE {table} SET {column} = ?3 || substr({column}, ?2) WHERE substr({column}, 1, ?2) = ?1",
                    (*inside, here),
                )
                count += moved.rowcount if table == "runs" else 0
    return count


def is_database(uri: str) -> bool:
    """Whether a tracking URI is that of a database server; a sqlite file and an HTTP server are none."""
    return uri.partition(":")[0].partition("+")[0] in _SERVERS


def with_driver(uri: str) -> str:
    """A plain `postgresql://` with a driver that is installed: SQLAlchemy takes one by its own version, there or not."""
    scheme, _, rest = uri.partition("://")
    drivers = [name for name in ("psycopg", "psycopg2") if importlib.util.find_spec(name)]
    return f"postgresql+{drivers[0]}://{rest}" if scheme == "postgresql" and drivers else uri


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
