"""Checks of what runs talk to: Prefect's server, MLflow's database or server, the loopback interface, proxies."""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import socket
import sqlite3
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from flows.doctor.examination import Finding, Severity, Subject
from flows.wording import size
from pipeline.orchestration.server import server_status
from pipeline.orchestration.server_process import own_processes, recorded
from pipeline.tracking.database import local_database, tracking_uri

_SECONDS: Final = 5.0
_PORTS: Final = {"http": 80, "https": 443, "postgresql": 5432, "postgres": 5432, "mysql": 3306, "mssql": 1433}
_PREFECT_DATABASE: Final = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")


def prefect(subject: Subject) -> Iterator[Finding]:
    """Check the server that a run would use: the configured one, the running one, or one that it starts."""
    home = subject.places.prefect
    status = server_status(home)
    values = {"url": status.shown, "pid": status.pid, "healthy": status.healthy, "configured": status.configured}
    down = f"cohort server down{subject.places.option()}"
    if status.healthy:
        who = "configured by you" if status.configured else f"process {status.pid}"
        yield Finding("prefect", "ok", f"{status.shown} answers ({who})", values=values)
    elif status.configured:
        advice = "start it or correct PREFECT_API_URL; unset, a local server is started; `--engine inline` needs none"
        yield Finding("prefect", "problem", f"the configured {status.shown} does not answer", advice, values)
    elif status.pid is not None:
        found = f"process {status.pid} runs and {status.shown} does not answer"
        advice = f"if it has just started, wait; else `{down}`. Its log: {status.log}"
        yield Finding("prefect", "warning", found, advice, values)
    elif lost := [process.pid for process in own_processes(home)]:
        found = f"process {lost[0]} serves {home}, and server.json does not know it"
        yield Finding("prefect", "warning", found, f"{down} ends it; so does the next start of a server", values)
    else:
        record = home / "server.json"
        found = "no server runs; the next run starts one"
        if record.exists():
            found = "no server runs; the last one ended, and the next run starts one"
            if recorded(home) is None:
                found = f"{record} is damaged; the next run writes it anew"
        yield Finding("prefect", "ok", found, values=values)


def prefect_database(subject: Subject) -> Iterator[Finding]:
    """Check the database of the project's own server."""
    url = next((subject.environment[name] for name in _PREFECT_DATABASE if subject.environment.get(name)), None)
    if url:
        yield from _reachable("prefect.database", url, "problem")
        return
    file = subject.places.prefect / "prefect.db"
    migrations = "prefect/server/database/_migrations/versions/sqlite"
    yield from _database("prefect.database", file, "prefect", migrations, "problem")


def mlflow(subject: Subject) -> Iterator[Finding]:
    """Check where runs are tracked, which never stops training: `cohort mlflow sync` sends the rest later."""
    uri = tracking_uri(subject.places.root)
    file = local_database(uri)
    if file is not None:
        yield from _database("mlflow", file, "mlflow", "mlflow/store/db_migrations/versions", "warning")
        return
    scheme = urllib.parse.urlsplit(uri).scheme
    if scheme in ("http", "https"):
        absent = status_of(uri, "/health") is None
        found = f"{uri} does not answer" if absent else f"{uri} answers"
        advice = "start it or correct MLFLOW_TRACKING_URI; runs go on without it, `cohort mlflow sync` sends them later"
        yield Finding("mlflow", "warning" if absent else "ok", found, advice, {"uri": uri})
    elif scheme in ("", "file"):
        found = f"{uri} is a folder, which MLflow no longer keeps runs in"
        advice = "MLFLOW_TRACKING_URI=sqlite:////path/mlflow.db, a server's URL, or unset it"
        yield Finding("mlflow", "warning", found, advice, {"uri": uri})
    else:
        yield from _reachable("mlflow", uri, "warning")


def loopback(subject: Subject) -> Iterator[Finding]:
    """Check that a port on 127.0.0.1 can be had and reached: servers and workers bind to it alone."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5.0) as client,
        ):
            accepted, _ = server.accept()
            with accepted:
                accepted.sendall(b"here")
                heard = client.recv(4)
    except OSError as error:
        advice = "bring up the interface `lo`, and let no firewall filter it"
        yield Finding("loopback", "problem", f"127.0.0.1 cannot be used: {error}", advice)
        return
    assert heard == b"here"
    yield Finding("loopback", "ok", "a port on 127.0.0.1 can be had and reached")


def proxies(subject: Subject) -> Iterator[Finding]:
    """Report a proxy that would also be asked for 127.0.0.1: Prefect's client then never reaches the local server."""
    names = [name for name in subject.environment if name.lower() in ("http_proxy", "all_proxy", "no_proxy")]
    given = {name: subject.environment[name] for name in names if subject.environment[name]}
    known = {name.lower().removesuffix("_proxy"): value for name, value in given.items()}
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    if not known.keys() & {"http", "all"}:
        yield Finding("proxies", "ok", "none for http")
    elif {"127.0.0.1", "*"} & {name.strip() for name in known.get("no", "").split(",")}:  # httpx knows no ranges
        yield Finding("proxies", "ok", f"{shown}: not asked for 127.0.0.1", values=given)
    else:
        advice = "NO_PROXY=127.0.0.1,localhost (httpx understands no ranges such as 127.0.0.0/8), or `--engine inline`"
        yield Finding("proxies", "problem", f"{shown}: asked for 127.0.0.1 too, where the server is", advice, given)


def _database(check: str, file: Path, package: str, migrations: str, severity: Severity) -> Iterator[Finding]:
    """Check a sqlite file, and whether the installed package knows the revision of its schema."""
    if not file.exists():
        yield Finding(check, "ok", f"{file} is not there yet; the next run makes it", values={"file": str(file)})
        return
    aside = f"move {file} aside: a new one is made (MLflow's is filled again by `cohort mlflow sync --rebuild`)"
    try:
        revision = revision_of(file)
    except sqlite3.Error as error:
        yield Finding(check, severity, f"{file}: {error}", aside, {"file": str(file)})
        return
    values = {"file": str(file), "revision": revision, "bytes": file.stat().st_size}
    if revision is None or _knows(package, migrations, revision):
        yield Finding(check, "ok", f"{file}, {size(file.stat().st_size)}", values=values)
    else:
        text = f"{file} has revision {revision}, which the installed {package} does not know: a newer one made it"
        yield Finding(check, severity, text, f"pip install --upgrade {package}, or {aside}", values)


def revision_of(file: Path) -> str | None:
    """Return the revision of a database's schema from alembic's table, or None.

    Raises:
        sqlite3.Error: it is no database, damaged, or locked for more than two seconds.
    """
    with contextlib.closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=2.0)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "alembic_version" not in tables:
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return str(row[0]) if row else None


def _knows(package: str, migrations: str, revision: str) -> bool:
    """Return whether a package has the migration of this name; true where its migrations are not found."""
    try:
        folder = Path(str(importlib.metadata.distribution(package).locate_file(migrations)))
    except importlib.metadata.PackageNotFoundError:
        return True
    return not folder.is_dir() or any(folder.glob(f"*{revision}*.py"))


def _reachable(check: str, url: str, severity: Severity) -> Iterator[Finding]:
    """Check whether something listens at the address of a database server, without a login."""
    there = accepts(url)
    how = {True: ": something listens there", False: " cannot be reached", None: " (not asked)"}[there]
    yield Finding(
        check, severity if there is False else "ok", f"{url}{how}", "start it, or correct the URL", {"url": url}
    )


def status_of(url: str, path: str) -> int | None:
    """Return the HTTP status of `path` below an address: no proxy, no redirect, one attempt; None: no answer."""
    parts = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    with (
        contextlib.suppress(OSError, ValueError, http.client.HTTPException),
        contextlib.closing(kind(parts.hostname or "", parts.port, timeout=_SECONDS)) as connection,
    ):
        connection.request("GET", f"{parts.path.rstrip('/')}{path}")
        return connection.getresponse().status
    return None


def accepts(url: str) -> bool | None:
    """Return whether something listens at the host and port of a URL; None where it has no known port."""
    parts = urllib.parse.urlsplit(url)
    with contextlib.suppress(ValueError):
        port = parts.port or _PORTS.get(parts.scheme.split("+")[0])
        if not parts.hostname or port is None:
            return None
        with contextlib.suppress(OSError), socket.create_connection((parts.hostname, port), timeout=_SECONDS):
            return True
    return False
