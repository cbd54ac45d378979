"""Servers, databases, the loopback interface and proxies."""

from __future__ import annotations

import http.server
import json
import os
import sqlite3
import subprocess
import threading
from pathlib import Path

import pytest

from flows.doctor import imports, servers
from flows.doctor.examination import Check, Subject, examine
from flows.runs.paths import Places
from tests.flows.doctor.subjects import only, subject, with_only


def test_a_configured_server_that_refuses_is_a_problem_for_prefect_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://me:hunter2@127.0.0.1:9/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    report = examine(subject(tmp_path), [Check("servers", servers.prefect), Check("servers", servers.mlflow)])
    prefect, mlflow = (finding for _, finding in report.findings)
    assert prefect.severity == "problem"
    assert "http://***@127.0.0.1:9/api does not answer" in prefect.found
    assert "PREFECT_API_URL" in prefect.advice
    assert "hunter2" not in report.json()
    assert (mlflow.severity, "cohort mlflow sync" in mlflow.advice) == ("warning", True)


class Healthy(http.server.BaseHTTPRequestHandler):
    """Answers 200 to everything."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_server_that_answers_is_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        monkeypatch.setenv("PREFECT_API_URL", f"{url}/api")
        assert only(servers.mlflow(subject(tmp_path))).severity == "ok"
        assert only(servers.prefect(subject(tmp_path))).severity == "ok"
        asked = Subject(Places(tmp_path), {}, vllm_servers=(url,))
        assert only(imports.vllm_servers(asked)).severity == "ok"
        server.shutdown()


def test_the_record_of_a_dead_server_is_fine_and_a_lost_server_is_named(tmp_path: Path) -> None:
    home = Places(tmp_path).prefect
    home.mkdir()
    record = {"pid": 2**22 + 1, "start": "1-gone", "port": 9, "home": str(home)}
    (home / "server.json").write_text(json.dumps(record))
    found = only(servers.prefect(subject(tmp_path)))
    assert (found.severity, "the last one ended" in found.found) == ("ok", True)
    (home / "server.json").unlink()
    lost = subprocess.Popen(
        ["sh", "-c", "echo started; read line"],
        env=os.environ | {"COHORT_PREFECT_HOME": str(home)},
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert lost.stdout is not None
        lost.stdout.readline()  # while a program is being loaded, Linux shows it without an environment
        found = only(servers.prefect(subject(tmp_path)))
        assert (found.severity, f"process {lost.pid} serves" in found.found) == ("warning", True)
    finally:
        lost.kill()
        lost.communicate()


def test_a_database_that_is_none_or_that_a_newer_version_made_is_named(tmp_path: Path) -> None:
    places_ = Places(tmp_path)
    places_.prefect.mkdir()
    (places_.prefect / "prefect.db").write_bytes(b"no database" * 100)
    assert only(servers.prefect_database(subject(tmp_path))).severity == "problem"
    for revision, severity in (("451aebb31d03", "ok"), ("ffffffffffff", "warning")):
        with sqlite3.connect(places_.mlflow) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS alembic_version (version_num TEXT)")
            connection.execute("DELETE FROM alembic_version")
            connection.execute("INSERT INTO alembic_version VALUES (?)", (revision,))
        connection.close()
        found = only(servers.mlflow(subject(tmp_path)))
        assert (found.severity, found.values["revision"]) == (severity, revision)


def test_the_loopback_interface_is_reached() -> None:
    assert only(servers.loopback(with_only())).severity == "ok"


@pytest.mark.parametrize(
    ("environment", "severity"),
    [
        ({}, "ok"),
        ({"HTTPS_PROXY": "http://proxy:1"}, "ok"),
        ({"HTTP_PROXY": "http://proxy:1"}, "problem"),
        ({"all_proxy": "socks5://proxy:1"}, "problem"),
        # As httpx 0.28 was seen to treat each of these.
        ({"http_proxy": "http://proxy:1", "NO_PROXY": "localhost"}, "problem"),
        ({"http_proxy": "http://proxy:1", "NO_PROXY": "localhost, 127.0.0.1"}, "ok"),
        ({"http_proxy": "http://proxy:1", "no_proxy": "127.0.0.0/8"}, "problem"),
        ({"http_proxy": "http://proxy:1", "no_proxy": "*"}, "ok"),
    ],
)
def test_a_proxy_that_would_be_asked_for_the_local_server_is_a_problem(
    environment: dict[str, str], severity: str
) -> None:
    assert only(servers.proxies(with_only(**environment))).severity == severity
