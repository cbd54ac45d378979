"""The local Prefect server, real: started, shared, killed, started again, stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.orchestration.flow_runs import mark_crashed, owner_tag
from pipeline.orchestration.server import (
    ServerError,
    configured_url,
    ensure_server,
    keep_server,
    server_status,
    start_server_soon,
    stop_server,
)
from pipeline.orchestration.server_process import (
    environment_of,
    is_alive,
    own_processes,
    password_of,
    recorded,
    running_servers,
    start_of,
)
from tests.prefect_api import ask

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One server folder for the module: a new database costs seconds."""
    folder = tmp_path_factory.mktemp("artifacts") / "prefect"
    yield folder
    stop_server(folder)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "COHORT_PREFECT"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "no-profiles"))
    for name in (  # what ensure_server writes is undone after the test
        "PREFECT_API_URL",
        "PREFECT_API_AUTH_STRING",
        "PREFECT_PROFILES_PATH",
        "COHORT_PREFECT_URL",
        "PREFECT_SERVER_EPHEMERAL_ENABLED",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.slow
def test_runs_started_together_share_one_server(home: Path) -> None:
    code = (
        "from pathlib import Path; from pipeline.orchestration.server import ensure_server; "
        f"print(ensure_server(Path({str(home)!r})))"
    )
    others = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    start_server_soon(home)
    url = ensure_server(home)
    assert {other.communicate()[0].decode().strip() for other in others} == {url}
    assert len(own_processes(home)) == 1
    assert ask(f"{url}/health") is True
    assert os.environ["PREFECT_API_URL"] == url
    assert (home / "prefect.db").exists()


@pytest.mark.slow
def test_a_running_server_is_found_again_and_the_ui_knows_its_api(home: Path) -> None:
    ensure_server(home)
    url = ensure_server(home)
    assert ask(f"{url.removesuffix('/api')}/ui-settings")["api_url"] == url
    status = server_status(home)
    assert (status.url, status.healthy, status.configured) == (url, True, False)


@pytest.mark.slow
def test_a_flow_run_whose_process_was_killed_is_marked_crashed(home: Path) -> None:
    url = ensure_server(home)
    code = f"""
        import os, time; from pathlib import Path; from pipeline.orchestration.flow_runs import owner_tag
        from pipeline.orchestration.server import ensure_server; ensure_server(Path({str(home)!r})); import prefect
        @prefect.flow(name="doomed")
        def doomed(): print(prefect.runtime.flow_run.id, flush=True); time.sleep(120)
        with prefect.tags(owner_tag()): doomed()
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout is not None
    run = child.stdout.readline().decode().strip()
    assert ask(f"{url}/flow_runs/{run}")["state_type"] == "RUNNING"
    assert mark_crashed() == 0, "its process lives"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert ask(f"{url}/flow_runs/{run}")["state_type"] == "RUNNING"
    assert mark_crashed() == 1
    assert ask(f"{url}/flow_runs/{run}")["state_type"] == "CRASHED"
    assert mark_crashed() == 0


@pytest.mark.slow
def test_a_killed_server_is_started_again_at_its_address_with_its_database(home: Path) -> None:
    url = ensure_server(home)
    runs = ask(f"{url}/flow_runs/{_flow_run(url)}")
    pid = server_status(home).pid
    assert pid is not None

    def kill_it_while_it_is_kept() -> None:
        with keep_server(home, every=0.1):
            os.kill(pid, signal.SIGKILL)
            while server_status(home).pid in (pid, None):
                time.sleep(0.05)

    with pytest.warns(UserWarning, match="died and was started again"):
        kill_it_while_it_is_kept()
    assert ensure_server(home) == url
    assert server_status(home).pid != pid
    assert ask(f"{url}/flow_runs/{_flow_run(url)}") == runs


def _flow_run(url: str) -> str:
    return str(ask(f"{url}/flow_runs/filter", {})[0]["id"])


@pytest.mark.slow
def test_stopping_ends_the_process_group_and_only_ours(home: Path) -> None:
    ensure_server(home)
    foreign = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    process = recorded(home)
    assert process is not None
    used_again = dataclasses.asdict(process) | {"pid": foreign.pid}
    (home / "server.json").write_text(json.dumps(used_again))
    assert server_status(home).pid is None, "a pid used again is not our server"
    assert stop_server(home), "found by its mark although its record was lost"
    assert not psutil.pid_exists(process.pid)
    assert foreign.poll() is None
    assert not stop_server(home)
    foreign.kill()
    foreign.wait()


def test_a_configured_server_that_is_dead_is_an_error_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(ServerError, match=r"http://127.0.0.1:9/api does not answer.*unset it"):
        ensure_server(tmp_path)
    start_server_soon(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert server_status(tmp_path).configured


def test_a_password_in_the_configured_address_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://ann:hunter2@127.0.0.1:9/api")
    with pytest.raises(ServerError, match=r"ann:\*\*\*@127") as caught:
        ensure_server(tmp_path)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in server_status(tmp_path).shown


def test_a_profile_of_the_user_counts_as_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configured_url() is None
    (tmp_path / "profiles.toml").write_text(
        'active = "team"\n[profiles.team]\nPREFECT_API_URL = "https://prefect.example/api"\n[profiles.local]\n'
    )
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    assert configured_url() == "https://prefect.example/api"
    monkeypatch.setenv("PREFECT_PROFILE", "local")
    assert configured_url() is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServerError, match=r"cannot be started in .*file/prefect.*--engine inline"):
        ensure_server(tmp_path / "file" / "prefect")


def test_a_client_error_after_the_server_was_lost_becomes_a_server_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ConnectError(Exception):
        """Named like httpx's."""

    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(ServerError, match="same command continues"), keep_server(tmp_path):
        raise ConnectError("refused")
    with pytest.raises(ValueError, match="a stage failed"), keep_server(tmp_path):
        raise ValueError("a stage failed")


def test_the_owner_tag_names_host_pid_and_start_time() -> None:
    host, pid, start = owner_tag().removeprefix("owner:").rsplit(":", 2)
    assert host
    assert int(pid) == os.getpid()
    assert start == start_of(os.getpid())


PROCESS = {"pid": 1, "start": "1-ab", "port": 4200}


@pytest.mark.parametrize(
    "damage",
    [
        {"pid": "1"},
        {"pid": True},
        {"pid": -1},
        {"pid": 1e3},
        {"pid": None},
        {"port": "4200"},
        {"port": 0},
        {"port": 65536},
        {"port": 4200.0},
        {"port": [4200]},
        {"start": 0.0},
        {"start": None},
        {"home": None},
        {"home": "/another/prefect"},
        *("", "[]", "1", "null", '{"pid": 1}', "[" * 100_000, "\x00"),
    ],
)
def test_a_record_of_wrong_types_is_no_record(tmp_path: Path, damage: dict[str, object] | str) -> None:
    sound = PROCESS | {"home": str(tmp_path)}
    (tmp_path / "server.json").write_text(json.dumps(sound))
    assert recorded(tmp_path) is not None
    (tmp_path / "server.json").write_text(damage if isinstance(damage, str) else json.dumps(sound | damage))
    assert recorded(tmp_path) is None
    assert server_status(tmp_path).pid is None


def test_a_copied_folder_has_not_the_originals_server_nor_password(tmp_path: Path) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.mkdir()
    living = {"pid": os.getpid(), "start": start_of(os.getpid()), "port": 9, "home": str(original)}
    (original / "server.json").write_text(json.dumps(living))
    password = password_of(original, renew=True)
    shutil.copytree(original, copy)
    assert server_status(original).pid == os.getpid()
    assert server_status(copy).pid is None
    assert password_of(original) == password
    assert password_of(copy, renew=not recorded(copy)) != password


def test_the_password_is_for_its_owner_alone_and_another_each_time(tmp_path: Path) -> None:
    assert password_of(tmp_path) == ""
    first = password_of(tmp_path, renew=True)
    assert (tmp_path / "password").stat().st_mode & 0o777 == 0o600
    assert first == password_of(tmp_path)
    assert len(first) > 30
    assert password_of(tmp_path, renew=True) != first


def test_a_server_whose_folder_was_deleted_is_listed_and_stopped(tmp_path: Path) -> None:
    home = tmp_path / "gone" / "prefect"
    environment = os.environ | {"COHORT_PREFECT_HOME": str(home), "PREFECT_SERVER_API_PORT": "4321"}
    server = subprocess.Popen(["sleep", "60"], env=environment, start_new_session=True)
    try:
        (found,) = (one for one in running_servers() if one.home == home)
        assert (found.pid, found.port) == (server.pid, 4321)
        assert stop_server(home)
        assert server.poll() is not None
        assert not (tmp_path / "gone").exists(), "nothing is made in its place"
        assert not stop_server(home)
    finally:
        server.kill()
        server.wait()


class Young:
    """A process in the moment after `exec`: Linux shows the environment of one in fifty only when it is asked again."""

    def __init__(self, empty: int) -> None:
        self.empty = empty

    def environ(self) -> dict[str, str]:
        self.empty -= 1
        return {} if self.empty >= 0 else {"COHORT_PREFECT_HOME": "/home"}


@pytest.mark.parametrize("empty", [0, 1, 3])
def test_the_mark_of_a_process_that_has_just_started_is_waited_for(empty: int) -> None:
    assert environment_of(Young(empty)) == {"COHORT_PREFECT_HOME": "/home"}


def test_a_process_without_an_environment_has_none() -> None:
    assert environment_of(Young(10**6)) == {}


@pytest.mark.claim("a server that outlives its use")
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_the_start_of_a_process_does_not_depend_on_the_clock() -> None:
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]  # field 22: clock ticks since the boot
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert start_of(os.getpid()).split("-") == [ticks, boot[:8]]
    assert is_alive(os.getpid(), f"{ticks}-{boot[:8]}")
    assert not is_alive(os.getpid(), f"{ticks}-00000000"), "another boot"
    assert not is_alive(2**22 + 1, f"{ticks}-{boot[:8]}")


@pytest.mark.parametrize("minutes", ["soon", "-1", "nan", "inf"])
def test_an_idle_time_that_is_none_is_refused(tmp_path: Path, minutes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COHORT_SERVER_IDLE_MINUTES", minutes)
    with pytest.raises(ServerError, match="COHORT_SERVER_IDLE_MINUTES"):
        start_server_soon(tmp_path)
    assert own_processes(tmp_path) == []


@pytest.mark.parametrize("damage", ["head", "page", "text"])
def test_a_damaged_database_is_named_with_what_to_do_before_a_server_starts(tmp_path: Path, damage: str) -> None:
    home = tmp_path / "a b"
    home.mkdir()
    file = home / "prefect.db"
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE flow (name TEXT)")
        connection.executemany("INSERT INTO flow VALUES (?)", [("x" * 100,)] * 500)
        connection.commit()
    content = bytearray(file.read_bytes())
    match damage:
        case "head":
            content[:16] = b"\0" * 16
        case "page":
            content[2 * 4096 : 3 * 4096] = b"\xff" * 4096
        case _:
            content = bytearray(b"no database" * 400)
    file.write_bytes(content)
    with pytest.raises(ServerError, match="is damaged") as caught:
        start_server_soon(home)
    (command,) = re.findall(r"`(mv .*?)`", str(caught.value))
    assert shlex.split(command) == ["mv", str(file), f"{file}.damaged"]
    assert own_processes(home) == []
