"""The guard of Prefect's server: which requests it lets in, and when it ends."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.orchestration.guarded_server import ALIVE, Guard, Message, Receive, Send, foreign_place, refusal

ROOT = Path(__file__).parents[3]
OWN = {"host": "127.0.0.1:4200"}
JSON = {"content-length": "2", "content-type": "application/json"}


def scope(headers: Mapping[str, str], path: str = "/api/flow_runs/filter", kind: str = "http") -> dict[str, Any]:
    return {
        "type": kind,
        "method": "POST",
        "path": path,
        "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
    }


@pytest.mark.claim("a web page that reaches Prefect")
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (OWN, None),
        (OWN | JSON, None),
        (OWN | JSON | {"content-type": "application/json; charset=utf-8"}, None),
        (OWN | JSON | {"origin": "http://127.0.0.1:4200"}, None),
        ({"host": "localhost:9000", "origin": "http://localhost:9000"} | JSON, None),  # through an SSH tunnel
        ({"host": "[::1]:4200"}, None),
        ({"host": "127.0.0.1"}, None),
        ({"host": "evil.example:4200"}, 403),
        ({"host": "127.0.0.1.evil.example:4200"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "evil.example@127.0.0.1:4200"}, 403),
        ({"host": "0.0.0.0:4200"}, 403),
        ({"host": ""}, 403),
        ({}, 403),
        (OWN | {"origin": "http://evil.example"}, 403),
        (OWN | {"origin": "http://evil.example:4200"}, 403),
        (OWN | {"origin": "https://127.0.0.1:4200"}, 403),
        (OWN | {"origin": "http://127.0.0.1:8888"}, 403),  # another server of this machine
        (OWN | {"origin": "http://localhost:4200"}, 403),
        (OWN | {"origin": "null"}, 403),  # a sandboxed frame, a file
        (OWN | {"origin": ""}, 403),
        (OWN | JSON | {"content-type": "text/plain"}, 415),
        (OWN | JSON | {"content-type": "application/x-www-form-urlencoded"}, 415),
        (OWN | JSON | {"content-type": "multipart/form-data; boundary=application/json"}, 415),
        (OWN | {"content-length": "2"}, 415),  # Prefect takes a body without a type for JSON
        (OWN | {"transfer-encoding": "chunked"}, 415),
        (OWN | {"content-length": "0"}, None),
    ],
)
def test_a_request_is_let_in_only_from_a_page_or_a_client_of_this_machine(
    headers: Mapping[str, str], status: int | None
) -> None:
    found = refusal(scope(headers))
    assert (found and found[0]) == status


def test_two_hosts_are_refused() -> None:
    asked = scope(OWN)
    asked["headers"].append((b"Host", b"evil.example"))
    assert refusal(asked) is not None


def answered(guard: Guard, asked: Message) -> list[Message]:
    """What is sent back to one request."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(guard(asked, receive, send))
    return sent


class Served:
    """An application that counts its requests and answers 200."""

    def __init__(self) -> None:
        self.count = 0
        self.idle_inside = -1.0
        self.guard = Guard(self)

    async def __call__(self, asked: Message, receive: Receive, send: Send) -> None:
        self.count += 1
        self.idle_inside = self.guard.idle
        await send({"type": "http.response.start", "status": 200, "headers": []})


def test_what_is_refused_does_not_reach_the_server_and_a_web_socket_is_closed() -> None:
    served = Served()
    evil = {"host": "evil.example"}
    assert answered(served.guard, scope(evil))[0]["status"] == 403
    assert answered(served.guard, scope(OWN | {"origin": "http://evil.example"}, kind="websocket"))[0]["type"] == (
        "websocket.close"
    )
    assert served.count == 0
    assert answered(served.guard, scope(OWN))[0]["status"] == 200
    assert served.count == 1


def test_requests_of_runs_and_pages_keep_a_server_and_health_checks_do_not() -> None:
    served = Served()
    for path, kept in (("/api/health", False), ("/api/flows/filter", True), (ALIVE, True), ("/runs", True)):
        time.sleep(0.05)
        before = served.guard.idle
        answered(served.guard, scope(OWN, path))
        assert (served.guard.idle < before) == kept, path
    assert served.idle_inside == 0.0  # while a request is answered, a web socket for hours, nothing is idle
    before = served.guard.idle
    answered(served.guard, scope({"host": "evil.example"}))
    assert served.guard.idle >= before


@pytest.mark.claim("a server that outlives its use")
@pytest.mark.parametrize(("limit", "folder_goes"), [(0.3, False), (0.0, True)])
def test_a_server_ends_when_it_is_idle_or_its_folder_is_gone(tmp_path: Path, limit: float, folder_goes: bool) -> None:
    home = tmp_path / "prefect"
    home.mkdir()
    code = (
        "import pathlib, sys; from pipeline.orchestration.guarded_server import Guard, _watch;"
        "print(flush=True); _watch(Guard(None), pathlib.Path(sys.argv[1]), float(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(home), str(limit)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert server.stdout is not None
    server.stdout.readline()
    if folder_goes:
        time.sleep(0.2)
        assert server.poll() is None
        home.rmdir()
    assert server.wait(timeout=30) == -15
    assert (b"folder is gone" in server.stdout.read()) == folder_goes


@pytest.mark.claim("MLflow's server that reads any folder")
@pytest.mark.parametrize(
    ("body", "artifacts", "foreign"),
    [
        ({"name": "x"}, "file:///data/mlruns", False),
        ({"name": "x", "artifact_location": ""}, "file:///data/mlruns", False),
        ({"name": "x", "artifact_location": "file:///data/mlruns"}, "file:///data/mlruns", False),
        ({"name": "x", "artifact_location": "/data/mlruns/7"}, "file:///data/mlruns", False),
        ({"name": "x", "artifact_location": "file:///data/mlruns%2Fa b"}, "file:///data/mlruns", False),
        ({"name": "x", "artifact_location": "file:///etc"}, "file:///data/mlruns", True),
        (
            {"name": "x", "artifactLocation": "/etc"},
            "file:///data/mlruns",
            True,
        ),  # protobuf's JSON takes both spellings
        ({"name": "x", "artifact_location": "/data/mlruns/../../etc"}, "file:///data/mlruns", True),
        ({"name": "x", "artifact_location": "file:///data/mlruns%2F..%2F..%2Fetc"}, "file:///data/mlruns", True),
        ({"name": "x", "artifact_location": "/data/mlruns2"}, "file:///data/mlruns", True),
        ({"name": "x", "artifact_location": "file://host/data/mlruns"}, "file:///data/mlruns", True),
        ({"name": "x", "artifact_location": "mlruns"}, "file:///data/mlruns", True),
        ({"name": "x", "artifact_location": "s3://theirs/x"}, "file:///data/mlruns", True),
        ({"name": "x", "artifact_location": "s3://ours/mlflow/7"}, "s3://ours/mlflow", False),
        ({"name": "x", "artifact_location": "s3://ours/mlflow/../x"}, "s3://ours/mlflow", True),
        ({"name": "x", "artifact_location": "s3://ours/mlflow2"}, "s3://ours/mlflow", True),
        ({"name": "x", "source": "cohort:///objects/ab/abcd"}, "file:///data/mlruns", False),
        ({"name": "x", "source": "/etc"}, "file:///data/mlruns", True),
        ({"tags": [{"key": "mlflow.artifactLocation", "value": "/etc"}]}, "file:///data/mlruns", True),
        ({"tags": [{"key": "note", "value": "/etc"}]}, "file:///data/mlruns", False),
    ],
)
def test_mlflow_is_named_no_place_of_artifacts_but_the_projects(
    body: dict[str, Any], artifacts: str, foreign: bool
) -> None:
    assert (foreign_place(json.dumps(body).encode(), artifacts) is not None) == foreign


def test_a_body_is_handed_on_whole() -> None:
    seen: list[bytes] = []

    async def app(asked: Message, receive: Receive, send: Send) -> None:
        seen.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    parts = [{"type": "http.request", "body": b"world"}, {"type": "http.request", "body": b"hello ", "more_body": True}]

    async def receive() -> Message:
        return parts.pop()

    async def send(message: Message) -> None:
        seen.append(str(message["status"]).encode())

    guard = Guard(app, artifacts="file:///data")
    asyncio.run(guard(scope(OWN | JSON, "/api/2.0/mlflow/experiments/create"), receive, send))
    assert seen == [b"hello world", b"200"]
