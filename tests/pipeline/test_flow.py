"""Flows: inline and through a real Prefect server they give the same artifacts; a hit shows as a state named `Cached`."""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from pipeline.artifact import Table
from pipeline.events import StageDone, StageStarted, recording
from pipeline.orchestration.server import ensure_server, stop_server
from pipeline.stage import flow, record_metrics, stage
from pipeline.store import Store, current_store, use_store
from pipeline.store.context import use_engine
from tests.prefect_api import ask


class Numbers(Table):
    schema = pa.schema([pa.field("x", pa.int64(), nullable=False)])


@stage(version="1")
def start(value: int) -> Numbers:
    record_metrics({"value": value})
    return Numbers.write({"x": [value]})


@stage(version="1")
def double(numbers: Numbers) -> Numbers:
    if numbers.rows()[0]["x"] > 1000:
        raise ArithmeticError("too large")
    return Numbers.write({"x": [2 * row["x"] for row in numbers.rows()]})


@flow
def chain(value: int, steps: int) -> Numbers:
    numbers = start(value)
    for _ in range(steps):
        numbers = double(numbers)
    return numbers


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    before, home = dict(os.environ), tmp_path_factory.mktemp("prefect")
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        del os.environ[name]
    os.environ["PREFECT_HOME"] = str(home)
    try:
        yield ensure_server(home)
    finally:
        stop_server(home)
        os.environ.clear()
        os.environ.update(before)
        if "prefect.context" in sys.modules:
            sys.modules["prefect.context"].refresh_global_settings_context()


def task_states(server: str, *, count: int) -> list[tuple[str, str, str]]:
    """Task name, state type and state name of every task run, oldest first, as the server itself tells."""
    rows: list[dict[str, Any]] = []
    for _ in range(600):  # task runs reach the server as events, a moment after the flow has ended
        body = {"sort": "EXPECTED_START_TIME_DESC", "limit": 200}
        rows = ask(f"{server}/task_runs/filter", body)
        if len(rows) == count and all(row["state_type"] in ("COMPLETED", "FAILED") for row in rows):
            break
        time.sleep(0.1)
    rows.sort(key=lambda row: row["start_time"])
    return [(row["name"].rsplit("-", 1)[0], row["state_type"], row["state_name"]) for row in rows]


def test_inline_flows_import_no_prefect(store: Store) -> None:
    code = (
        "import sys, pipeline.stage, pipeline.store, pipeline.artifact;"
        "print([m for m in ('prefect', 'torch', 'mlflow', 'transformers') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
    assert chain(1, 3).rows() == [{"x": 8}]


def test_both_engines_give_the_same_digests_and_a_hit_is_a_state_named_cached(store: Store, server: str) -> None:
    inline = chain(3, 2)
    with use_store(Store(store.root.parent / "other")) as other:
        with use_engine("prefect"):
            through = chain(3, 2)
        assert through.action == inline.action
        assert through.metrics == {}
        assert set(other.digests()) == set(store.digests())
        assert len(list(other.actions())) == 3
        assert task_states(server, count=3) == [
            (name, "COMPLETED", "Completed") for name in ("start", "double", "double")
        ]
        with use_engine("prefect"):
            assert chain(3, 3).rows() == [{"x": 24}]
    assert through == inline
    assert task_states(server, count=7)[3:] == [
        ("start", "COMPLETED", "Cached"),
        ("double", "COMPLETED", "Cached"),
        ("double", "COMPLETED", "Cached"),
        ("double", "COMPLETED", "Completed"),
    ]


@pytest.mark.usefixtures("server")
def test_the_current_store_and_listeners_are_seen_inside_tasks(store: Store) -> None:
    heard: list[tuple[str, str]] = []
    stores: list[Store] = []

    @stage(version="1")
    def look(value: int) -> Numbers:
        stores.append(current_store())
        return start(value)

    @flow
    def looking(value: int) -> Numbers:
        stores.append(current_store())
        return look(value)

    with use_engine("prefect"), recording(heard.append):
        looking(7)
    assert stores == [store, store]
    assert [(type(event), event.values()["stage"]) for event in heard] == [
        (StageStarted, "look"),
        (StageStarted, "start"),
        (StageDone, "start"),
        (StageDone, "look"),
    ]


@pytest.mark.usefixtures("server")
def test_a_failing_stage_fails_the_flow_with_its_own_error(store: Store) -> None:
    with use_engine("prefect"), pytest.raises(ArithmeticError, match="too large"):
        chain(600, 2)
    assert [record["stage"] for record in store.actions()] == ["start", "double"]
    assert list((store.root / "locks").iterdir()) == []


@pytest.mark.usefixtures("server")
def test_a_flow_inside_a_flow_runs(store: Store) -> None:
    @flow
    def outer(value: int) -> Numbers:
        return double(chain(value, 1))

    with use_engine("prefect"):
        assert outer(5).rows() == [{"x": 20}]


@pytest.mark.usefixtures("store")
def test_the_engine_is_inline_again_after_the_block() -> None:
    with use_engine("prefect"):
        pass
    assert chain(2, 1).rows() == [{"x": 4}]


def status(server: str, path: str, **headers: str) -> int:
    """What the real server answers to a POST of an empty filter."""
    parts = urllib.parse.urlsplit(server)
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", parts.port, timeout=60)) as connection:
        given = {"Host": parts.netloc, "Content-Type": "application/json"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", f"/api/{path}", b"{}", given)
        return connection.getresponse().status


@pytest.mark.claim("a web page that reaches Prefect")
def test_the_real_server_asks_for_password_and_token_and_refuses_pages(server: str) -> None:
    password = base64.b64encode(os.environ["PREFECT_API_AUTH_STRING"].encode()).decode()
    token = ask(f"{server}/csrf-token?client=page")["token"]
    own = {"Authorization": f"Basic {password}", "Prefect_Csrf_Client": "page", "Prefect_Csrf_Token": token}
    assert status(server, "flow_runs/filter", **own) == 200
    assert status(server, "flow_runs/filter", **own, Host="evil.example") == 403
    assert status(server, "flow_runs/filter", **own, Origin="http://evil.example") == 403
    assert status(server, "flow_runs/filter", **own, Content_Type="text/plain") == 415
    for missing, expected in (("Authorization", 401), ("Prefect_Csrf_Token", 403)):
        assert status(server, "flow_runs/filter", **{k: v for k, v in own.items() if k != missing}) == expected
    wrong = base64.b64encode(b"cohort:guess").decode()
    assert status(server, "flow_runs/filter", **own | {"Authorization": f"Basic {wrong}"}) == 401
