"""A PostgreSQL for tests: the machine's own programs, a folder of its own, on loopback, ended with the block."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

PASSWORD: Final = "s3cret-Pa55"
"""Of the one user; a text that nothing else holds, so that a file or a message that has it gave it away."""


def programs() -> Path:
    """The folder of the newest PostgreSQL on this machine; skips the test where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3].split(".")[0]))
    on_path = shutil.which("initdb")
    if not found and not on_path:
        pytest.skip("no PostgreSQL: neither /usr/lib/postgresql/*/bin nor initdb on the PATH (Debian: postgresql)")
    if os.geteuid() == 0 and not _account():
        pytest.skip("PostgreSQL refuses to run as root, and there is no user `postgres`")
    return found[-1].parent if found else Path(str(on_path)).parent


@dataclass
class Postgres:
    """A server with one user, `cohort`, and any number of databases."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    def url(self, database: str, *, driver: str = "postgresql", password: str = PASSWORD) -> str:
        """The address of a database."""
        return f"{driver}://cohort:{password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        where = ["-D", str(self.folder / "data"), "-p", str(self.port), "-h", "127.0.0.1", "-k", ""]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [programs() / "postgres", *where, "-F"], stdout=log, stderr=log, start_new_session=True, **_not_root()
            )
        ready = [programs() / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port), "-t", "60"]
        for _ in range(600):
            if subprocess.run(ready, stdout=subprocess.DEVNULL).returncode == 0:
                return
            assert self.process.poll() is None, (self.folder / "log").read_text()
        raise AssertionError("PostgreSQL does not answer")

    def stop(self) -> None:
        """End it at once, as a crash does: every connection breaks."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGQUIT)
            self.process.wait(timeout=30)

    def create(self, database: str) -> None:
        """Make an empty database."""
        self.run(f"CREATE DATABASE {database}", "postgres")

    def run(self, statement: str, database: str) -> list[tuple[Any, ...]]:
        """The rows of one statement."""
        import psycopg2

        with contextlib.closing(psycopg2.connect(self.url(database))) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """A running server; nothing of it is left behind."""
    folder = Path(tempfile.mkdtemp(prefix="cohort-postgres-"))
    secret = folder / "password"
    secret.write_text(PASSWORD)
    if os.geteuid() == 0:
        for path in (folder, secret):
            os.chown(path, _account().pw_uid, -1)
    server = Postgres(folder, free_port())
    try:
        rights = ["-U", "cohort", "-A", "scram-sha-256", f"--pwfile={secret}", "--no-sync", "-E", "UTF8"]
        subprocess.run(
            [programs() / "initdb", "-D", folder / "data", *rights],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=folder,
            **_not_root(),
        )
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def gives_away(root: Path) -> list[Path]:
    """The files under a folder that hold the password."""
    files = (path for path in root.rglob("*") if path.is_file())
    return [path for path in files if re.search(re.escape(PASSWORD).encode(), path.read_bytes())]


def _account() -> Any:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres")
    return None


def _not_root() -> dict[str, Any]:
    return {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}


def free_port() -> int:
    """Return a port of the loopback interface that is free right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
