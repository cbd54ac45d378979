"""The local Prefect server, real: started, shared, killed, started again, stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.flow_runs import mark_crashed, owner_tag
from pipeline.server import (
    ServerError,
    configured_url,
    ensure_server,
    keep_server,
    server_status,
    start_server_soon,
    stop_server,
)
from pipeline.server_process import own_processes, recorded

ROOT = Path(__file__).parents[2]


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
        "PREFECT_PROFILES_PATH",
        "COHORT_PREFECT_URL",
        "PREFECT_SERVER_EPHEMERAL_ENABLED",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def get(url: str) -> object:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.loads(answer.read())


@pytest.mark.slow
def test_runs_started_together_share_one_server(home: Path) -> None:
    code = f"from pathlib import Path; from pipeline.server import ensure_server; print(ensure_server(Path({str(home)!r})))"
    others = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    started = time.perf_counter()
    start_server_soon(home)
    assert time.perf_counter() - started < 2.0
    url = ensure_server(home)
    assert {other.communicate()[0].decode().strip() for other in others} == {url}
    assert len(own_processes(home)) == 1
    assert get(f"{url}/health") is True
    assert os.environ["PREFECT_API_URL"] == url
    assert (home / "prefect.db").exists()


@pytest.mark.slow
def test_a_standing_server_is_found_in_a_tenth_of_a_second_and_the_ui_knows_its_api(home: Path) -> None:
    ensure_server(home)
    durations = []
    for _ in range(5):
        started = time.perf_counter()
        url = ensure_server(home)
        durations.append(time.perf_counter() - started)
    assert min(durations) < 0.1
    assert get(f"{url.removesuffix('/api')}/ui-settings")["api_url"] == url  # type: ignore[index]
    status = server_status(home)
    assert (status.url, status.healthy, status.configured) == (url, True, False)


@pytest.mark.slow
def test_a_flow_run_whose_process_was_killed_is_marked_crashed(home: Path) -> None:
    url = ensure_server(home)
    code = f"""
        import os, time; from pathlib import Path; from pipeline.flow_runs import owner_tag
        from pipeline.server import ensure_server; ensure_server(Path({str(home)!r})); import prefect
        @prefect.flow(name="doomed")
        def doomed(): print(prefect.runtime.flow_run.id, flush=True); time.sleep(120)
        with prefect.tags(owner_tag()): doomed()
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE)
    assert child.stdout is not None
    run = child.stdout.readline().decode().strip()
    assert get(f"{url}/flow_runs/{run}")["state_type"] == "RUNNING"  # type: ignore[index]
    assert mark_crashed() == 0, "its process lives"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert get(f"{url}/flow_runs/{run}")["state_type"] == "RUNNING"  # type: ignore[index]
    assert mark_crashed() == 1
    assert get(f"{url}/flow_runs/{run}")["state_type"] == "CRASHED"  # type: ignore[index]
    assert mark_crashed() == 0


@pytest.mark.slow
def test_a_killed_server_is_started_again_at_its_address_with_its_database(home: Path) -> None:
    url = ensure_server(home)
    runs = get(f"{url}/flow_runs/{_flow_run(url)}")
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
    assert get(f"{url}/flow_runs/{_flow_run(url)}") == runs


def _flow_run(url: str) -> str:
    request = urllib.request.Request(f"{url}/flow_runs/filter", b"{}", {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(json.loads(answer.read())[0]["id"])


@pytest.mark.slow
def test_stopping_ends_the_process_group_and_only_ours(home: Path) -> None:
    ensure_server(home)
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    process = recorded(home)
    assert process is not None
    (home / "server.json").write_text(json.dumps({"pid": stranger.pid, "created": 0.0, "port": process.port}))
    assert server_status(home).pid is None, "a pid used again is not our server"
    assert stop_server(home), "found by its mark although its record was lost"
    assert not psutil.pid_exists(process.pid)
    assert stranger.poll() is None
    assert not stop_server(home)
    stranger.kill()
    stranger.wait()


def test_a_configured_server_is_used_and_a_dead_one_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(ServerError, match=r"http://127.0.0.1:9/api does not answer.*unset it"):
        ensure_server(tmp_path)
    start_server_soon(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert server_status(tmp_path).configured


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
    host, pid, created = owner_tag().removeprefix("owner:").rsplit(":", 2)
    assert host
    assert int(pid) == os.getpid()
    assert abs(int(created) - psutil.Process().create_time()) <= 1.0
