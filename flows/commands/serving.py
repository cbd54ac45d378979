"""`cohort ui`, `server`, `mlflow`: the user interfaces and their servers."""

from __future__ import annotations

import contextlib
import http.client
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.markup import escape

from flows.commands.options import Root, console
from flows.runs.paths import Places
from flows.tracking.sender import sync
from flows.wording import duration, size
from pipeline.config.text import unspoken, without_password
from pipeline.orchestration import guarded_server
from pipeline.orchestration.interruption import settle
from pipeline.orchestration.server import configured_url, ensure_server, start_server_soon, stop_server
from pipeline.orchestration.server import server_status as status_of
from pipeline.orchestration.server_process import free_port, running_servers
from pipeline.tracking.database import artifact_folder, is_database, making_tables, tracking_uri, with_driver

_START_SECONDS = 120.0


def ui(*, port: int = 5000, root: Root = None) -> int:
    """Serve MLflow's user interface on this machine until Ctrl-C, and say where Prefect's is.

    Parameters
    ----------
    port
        Of MLflow; 0 = any.
    """
    places, out = Places.under(root), console()
    start_server_soon(places.prefect)
    uri = tracking_uri(places.root)
    files = artifact_folder(uri, places.root)
    if files is None:
        out.print(f"MLflow   {without_password(uri)} (configured by MLFLOW_TRACKING_URI)")
        _say_where_prefect_is(places)
        return 0
    out.print("starting ...", style="dim")
    _reach(uri)
    sync(places.root)
    chosen = free_port(port)
    log = places.root / "mlflow-ui.log"
    process = _start_mlflow(places, uri, files, chosen, log)
    try:
        _await_answer(process, chosen, log)
        out.print(f"MLflow   [bold]http://127.0.0.1:{chosen}[/]")
        _say_where_prefect_is(places)
        out.print("Ctrl-C stops MLflow's; Prefect's server ends when it is no longer used", style="dim")
        return process.wait()
    except KeyboardInterrupt:
        settle()
        return 0
    finally:
        _stop(process)


def server_up(*, root: Root = None) -> None:
    """Start the local Prefect server, or find the one that runs."""
    _say_where_prefect_is(Places.under(root))


def server_down(*, root: Root = None) -> None:
    """Stop the local Prefect server, also that of a root that was deleted; its database stays."""
    console().print("stopped" if stop_server(Places.under(root).prefect) else "no server was running")


def server_status(
    *,
    every: Annotated[bool, Parameter(name="--all", negative="", help="every server of yours on this machine")] = False,
    root: Root = None,
) -> int:
    """Say whether the Prefect server runs; exit code 1 when it does not answer."""
    if every:
        _list_servers()
        return 0
    status, out = status_of(Places.under(root).prefect), console()
    whose = "configured by you" if status.configured else f"process {status.pid}"
    page = escape(without_password(status.ui or ""))
    if status.healthy:
        out.print(f"Prefect  [bold]{page}[/] ({whose})", soft_wrap=True)
    elif status.pid or status.configured:
        out.print(f"Prefect  {page} ({whose}) does not answer; log: {escape(str(status.log))}", soft_wrap=True)
    else:
        out.print("no server is running; `cohort run` and `cohort server up` start one")
    return 0 if status.healthy else 1


def _list_servers() -> None:
    """Print a line for each server, with the command that stops it."""
    out, found = console(), running_servers()
    for server in sorted(found, key=lambda server: str(server.home)):
        root = server.home.parent
        gone = "" if server.home.is_dir() else "  [yellow]its root is gone[/]"
        about = f"process {server.pid}, {duration(server.seconds)}, {size(server.memory)}"
        out.print(f"{escape(str(root))}  http://127.0.0.1:{server.port}  [dim]{about}[/]{gone}", soft_wrap=True)
        out.print(f"  cohort server down --root {escape(shlex.quote(str(root)))}", style="dim", soft_wrap=True)
    if not found:
        out.print("no server is running on this machine")


def mlflow_sync(*, rebuild: bool = False, root: Root = None) -> int:
    """Send what MLflow does not have yet from the logs of all runs.

    Parameters
    ----------
    rebuild
        Delete the runs in MLflow first and make them again.
    """
    report, out = sync(Places.under(root).root, rebuild=rebuild), console()
    out.print(f"{report.sent} runs complete in MLflow" + (f", {report.living} still running" if report.living else ""))
    for log, error in report.errors.items():
        out.print(f"[red]{escape(log)}[/]: {escape(error)}", soft_wrap=True)
    return 1 if report.errors else 0


def _say_where_prefect_is(places: Places) -> None:
    """Start or find the server, and name its page and what the page asks for."""
    url, out = ensure_server(places.prefect), console()
    out.print(f"Prefect  [bold]{escape(without_password(url).removesuffix('/api'))}[/]", soft_wrap=True)
    if configured_url() is None:
        out.print(f"  it asks for the line in {escape(str(places.prefect / 'password'))}", style="dim", soft_wrap=True)


def _reach(uri: str) -> None:
    """Find out at once that a database cannot be had: MLflow's server would try for two minutes.

    Raises:
        RuntimeError: it cannot, and why.
    """
    if not is_database(uri):
        return
    os.environ.setdefault("PGCONNECT_TIMEOUT", "10")
    try:
        with making_tables(with_driver(uri)):
            return
    except Exception as error:  # whatever the driver of the database raises
        first = unspoken((str(error).strip().splitlines() or [""])[0], uri)
        raise RuntimeError(
            f"MLflow's database {without_password(uri)} cannot be used: {first}; start it, or correct MLFLOW_TRACKING_URI"
        ) from None


def _start_mlflow(places: Places, uri: str, files: str, port: int, log: Path) -> subprocess.Popen[bytes]:
    """Start MLflow's server in a process group of its own, so that all of its workers can be stopped."""
    command = [sys.executable, "-P", guarded_server.__file__, "mlflow", str(port)]
    # Not among the arguments: those are for all to see, and a database's URL has a password.
    given = {"MLFLOW_BACKEND_STORE_URI": with_driver(uri), "MLFLOW_DEFAULT_ARTIFACT_ROOT": files}
    given |= {"MLFLOW_SERVER_ALLOWED_HOSTS": "127.0.0.1:*,localhost:*,127.0.0.1,localhost,[[]::1]:*"}
    given |= {"MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port}"}
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | os.environ | given
    places.root.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        return subprocess.Popen(
            command,
            cwd=places.root,
            env=settings,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )


def _await_answer(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2.0)
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        connection.close()
        time.sleep(0.2)
    raise RuntimeError(f"MLflow's user interface did not start; its log: {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(timeout=10.0)
