"""Checks of what runs talk to: Prefect's server, MLflow's database or server, the loopback interface, proxies."""

from __future__ import annotations

import contextlib
import importlib.metadata
import socket
import sqlite3
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from flows.doctor.finding import Finding, Severity
from flows.doctor.reaching import accepts, status_of
from flows.doctor.subject import Subject
from flows.wording import size
from pipeline.mlflow_run import local_database, tracking_uri
from pipeline.orchestration.server import server_status
from pipeline.orchestration.server_process import own_processes, recorded

__all__ = ["loopback", "mlflow", "prefect", "prefect_database", "proxies"]

_PREFECT_DATABASE: Final = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")


def prefect(subject: Subject) -> Iterator[Finding]:
    """The server that a run would use: the configured one, the standing one, or one that it starts."""
    home = subject.places.prefect
    status = server_status(home)
    values = {"url": status.shown, "pid": status.pid, "healthy": status.healthy, "configured": status.configured}
    if status.configured:
        if status.healthy:
            yield Finding("prefect", "ok", f"{status.shown} answers (configured by you)", values=values)
            return
        advice = "start it or correct PREFECT_API_URL; unset, a local server is started; `--engine inline` needs none"
        yield Finding("prefect", "problem", f"the configured {status.shown} does not answer", advice, values)
    elif status.healthy:
        yield Finding("prefect", "ok", f"{status.shown} answers (process {status.pid})", values=values)
    elif status.pid is not None:
        advice = (
            f"if it has just started, wait; else `cohort server down{subject.places.option()}`. Its log: {status.log}"
        )
        yield Finding(
            "prefect", "warning", f"process {status.pid} runs and {status.shown} does not answer", advice, values
        )
    else:
        yield from _not_running(subject, values)


def _not_running(subject: Subject, values: Mapping[str, object]) -> Iterator[Finding]:
    home = subject.places.prefect
    lost = [process.pid for process in own_processes(home)]
    if lost:
        advice = f"cohort server down{subject.places.option()} ends it; so does the next start of a server"
        yield Finding(
            "prefect", "warning", f"process {lost[0]} serves {home}, and server.json does not know it", advice, values
        )
    elif (home / "server.json").exists() and recorded(home) is None:
        yield Finding("prefect", "ok", f"{home / 'server.json'} is damaged; the next run writes it anew", values=values)
    else:
        stale = "the last one ended, and " if (home / "server.json").exists() else ""
        yield Finding("prefect", "ok", f"no server runs; {stale}the next run starts one", values=values)


def prefect_database(subject: Subject) -> Iterator[Finding]:
    """The database of the project's own server."""
    url = next((subject.environment[name] for name in _PREFECT_DATABASE if subject.environment.get(name)), None)
    if url:
        yield from _reachable("prefect.database", url, "problem")
        return
    file = subject.places.prefect / "prefect.db"
    migrations = "prefect/server/database/_migrations/versions/sqlite"
    yield from _database("prefect.database", file, "prefect", migrations, "problem")


def mlflow(subject: Subject) -> Iterator[Finding]:
    """Where runs are tracked. It never stops training: what MLflow lacks, `cohort mlflow sync` sends later."""
    uri = tracking_uri(subject.places.root)
    file = local_database(uri)
    if file is not None:
        yield from _database("mlflow", file, "mlflow", "mlflow/store/db_migrations/versions", "warning")
        return
    scheme = urllib.parse.urlsplit(uri).scheme
    if scheme in ("http", "https"):
        status = status_of(uri, "/health")
        if status is None:
            advice = (
                "start it or correct MLFLOW_TRACKING_URI; runs go on without it, `cohort mlflow sync` sends them later"
            )
            yield Finding("mlflow", "warning", f"{uri} does not answer", advice, {"uri": uri})
        else:
            yield Finding("mlflow", "ok", f"{uri} answers", values={"uri": uri})
    elif scheme in ("", "file"):
        advice = "MLFLOW_TRACKING_URI=sqlite:////path/mlflow.db, a server's URL, or unset it"
        yield Finding(
            "mlflow", "warning", f"{uri} is a folder, which MLflow no longer keeps runs in", advice, {"uri": uri}
        )
    else:
        yield from _reachable("mlflow", uri, "warning")


def loopback(subject: Subject) -> Iterator[Finding]:
    """Whether a port on 127.0.0.1 can be had and reached: servers and workers are there and nowhere else."""
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
    """A proxy that would also be asked for 127.0.0.1: Prefect's client then never reaches the local server."""
    names = [name for name in subject.environment if name.lower() in ("http_proxy", "all_proxy", "no_proxy")]
    given = {name: subject.environment[name] for name in names if subject.environment[name]}
    known = {name.lower().removesuffix("_proxy"): value for name, value in given.items()}
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    if not known.keys() & {"http", "all"}:
        yield Finding("proxies", "ok", "none for http")
    elif _bypasses(known.get("no", "")):
        yield Finding("proxies", "ok", f"{shown}: not asked for 127.0.0.1", values=given)
    else:
        advice = (
            "NO_PROXY=127.0.0.1,localhost (httpx does not understand ranges such as 127.0.0.0/8), or `--engine inline`"
        )
        yield Finding("proxies", "problem", f"{shown}: asked for 127.0.0.1 too, where the server is", advice, given)


def _bypasses(no_proxy: str) -> bool:
    """Whether clients go to 127.0.0.1 directly: httpx does by the address itself, or by a star, and knows no ranges."""
    return bool({"127.0.0.1", "*"} & {name.strip() for name in no_proxy.split(",")})


def _database(check: str, file: Path, package: str, migrations: str, severity: Severity) -> Iterator[Finding]:
    """A sqlite file: whether it is one, and whether the installed package knows the revision that it has."""
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
    if revision is not None and not _knows(package, migrations, revision):
        text = f"{file} has revision {revision}, which the installed {package} does not know: a newer one made it"
        yield Finding(check, severity, text, f"pip install --upgrade {package}, or {aside}", values)
    else:
        yield Finding(check, "ok", f"{file}, {size(file.stat().st_size)}", values=values)


def revision_of(file: Path) -> str | None:
    """The revision of a database's schema, as alembic notes it; None where it notes none.

    Raises:
        sqlite3.Error: it is no database, damaged, or locked for more than two seconds.
    """
    with contextlib.closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=2.0)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        rows = (
            connection.execute("SELECT version_num FROM alembic_version").fetchall()
            if "alembic_version" in tables
            else []
        )
    return str(rows[0][0]) if rows else None


def _knows(package: str, migrations: str, revision: str) -> bool:
    """Whether a package has the migration of this name; one that keeps them elsewhere is not accused."""
    try:
        folder = Path(str(importlib.metadata.distribution(package).locate_file(migrations)))
    except importlib.metadata.PackageNotFoundError:
        return True
    return not folder.is_dir() or any(folder.glob(f"*{revision}*.py"))


def _reachable(check: str, url: str, severity: Severity) -> Iterator[Finding]:
    """A database server, by whether something listens there; nobody logs in."""
    match accepts(url):
        case True:
            yield Finding(check, "ok", f"{url}: something listens there", values={"url": url})
        case False:
            yield Finding(check, severity, f"{url} cannot be reached", "start it, or correct the URL", {"url": url})
        case None:
            yield Finding(check, "ok", f"{url} (not asked)", values={"url": url})
