"""A project with a Prefect server of its own and process workers, for the tests of deployments; all of it on loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest

from flows.config import IterativeRLConfig
from flows.deploying.pool import state_of
from flows.runs.paths import Places
from flows.runs.record import RunRecord, read_record, run_folder
from pipeline.orchestration.server import ensure_server, stop_server
from tests.pipeline.processes import until
from tests.prefect_api import ask

__all__ = ["Project", "flow_run_processes", "listened_on", "opened"]

REPOSITORY = Path(__file__).parents[3]
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass(frozen=True)
class Project:
    """A root and its server."""

    places: Places
    url: str
    """Of the API."""

    def ask(self, path: str, **body: Any) -> Any:
        """What the server answers; a GET where nothing is given. A server whose database is busy (503) is asked again."""
        while True:
            try:
                return ask(f"{self.url}/{path}", body or None)
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
            time.sleep(1.0)

    def tasks(self, run: UUID, count: int) -> list[tuple[str, str]]:
        """Name and state of the tasks of a flow run, oldest first, once the server knows that all `count` ended.

        Task runs reach the server as events, a moment after the flow run has ended, and each of their states by itself.
        """
        wanted = {"flow_runs": {"id": {"any_": [str(run)]}}, "limit": 200}

        def ended() -> list[dict[str, Any]] | None:
            found: list[dict[str, Any]] = self.ask("task_runs/filter", **wanted)
            return found if len(found) >= count and all(row["state_type"] in ENDED for row in found) else None

        rows = sorted(until(ended, 60), key=lambda row: row["start_time"] or "")
        return [(row["name"].rsplit("-", 1)[0], row["state_name"]) for row in rows]

    def states(self, run: UUID) -> list[str]:
        """The types of all states that a flow run was in, in order."""
        found = self.ask(f"flow_run_states/?flow_run_id={run}")
        return [state["type"] for state in sorted(found, key=lambda state: state["timestamp"])]

    def ended(self, run: UUID, seconds: float = 480.0) -> tuple[str, str]:
        """How a flow run ended."""
        return until(lambda: state if (state := state_of(run))[0] in ENDED else None, seconds)

    def record(self, config: IterativeRLConfig) -> RunRecord:
        """The record of a run."""
        found = read_record(run_folder(self.places, config))
        assert found is not None
        return found

    @contextlib.contextmanager
    def worker(self, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """`cohort worker`, in a process group of its own that is killed at the end."""
        command = [sys.executable, "-m", "flows.cli", "worker", "--root", str(self.places.root)]
        with log.open("ab") as sink:
            process = subprocess.Popen(command, cwd=REPOSITORY, stdout=sink, stderr=sink, start_new_session=True)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)


def flow_run_processes(run: UUID) -> list[psutil.Process]:
    """Processes that run a flow run; what sends its metrics to MLflow may end a moment later."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            of_run = process.environ().get("PREFECT__FLOW_RUN_ID") == str(run)
            if of_run and "flows.tracking.sender" not in process.cmdline():
                found.append(process)
    return found


def listened_on() -> set[str]:
    """Addresses on which processes of this interpreter listen: servers, workers, runs and what they start."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.cmdline()[:1] == [sys.executable]:
                listening = (one for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN)
                found |= {one.laddr.ip for one in listening}
    return found


@contextlib.contextmanager
def opened(root: Path) -> Iterator[Project]:
    """Start the server of a new project, for this process and its children; stopped at the end."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("PREFECT_", "COHORT_"))]:
            patch.delenv(name)
        patch.setenv("PREFECT_HOME", str(root / "no-profiles"))
        for name in (
            "PREFECT_API_URL",
            "PREFECT_API_AUTH_STRING",
            "PREFECT_PROFILES_PATH",
            "COHORT_PREFECT_URL",
            "PREFECT_SERVER_EPHEMERAL_ENABLED",
        ):
            patch.setenv(name, "")  # so that what ensure_server writes is undone
            patch.delenv(name)
        places = Places.under(root)
        try:
            yield Project(places, ensure_server(places.prefect))
        finally:
            stop_server(places.prefect)
    if "prefect.context" in sys.modules:
        sys.modules["prefect.context"].refresh_global_settings_context()
