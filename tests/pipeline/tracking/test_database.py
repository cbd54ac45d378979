"""MLflow in a real PostgreSQL: runs side by side, a wrong password, a database that goes away, and a password never shown."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.tracking.delivery import tracked_study
from flows.tracking.sender import sync
from pipeline.config.text import unspoken, without_password
from pipeline.event_log import LOG
from pipeline.tracking.database import artifact_folder, connect, is_database
from pipeline.tracking.records import Record, Sent, point, table
from tests.pipeline.postgres import PASSWORD, Postgres, gives_away, postgres
from tests.pipeline.processes import until


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.fixture
def database(sender: None, server: Postgres, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty database, where runs of this test are tracked."""
    name = f"t{abs(hash(request.node.name)):x}"
    server.create(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url(name))
    return server.url(name)


def tracked(home: Path, key: str) -> Any:
    return tracked_study(home, experiment="study", name=key, key=key, config={"lr": 0.5})


def steps(log: Callable[[Record], None], *numbers: int) -> None:
    for number in numbers:
        log(point(number, {"reward/mean": number / 10}))


def runs(url: str) -> dict[str, Any]:
    """The runs of the study by key, each there once."""
    client = connect(url)
    found = client.search_runs([client.get_experiment_by_name("study").experiment_id])
    keys = [run.data.tags["cohort.run_key"] for run in found]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, found, strict=True))


def points(url: str, key: str) -> list[tuple[int, float]]:
    history = connect(url).get_metric_history(runs(url)[key].info.run_id, "reward/mean")
    return sorted((point.step, point.value) for point in history)


def sent(home: Path, key: str) -> Sent:
    return Sent.read(home / "tracking" / key)


# ------------------------------------------------------------------------------------------------ without a server


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://ann:pw@db:5432/mlflow", "postgresql://ann:***@db:5432/mlflow"),
        ("postgresql+psycopg2://ann:p:w@x@db/mlflow", "postgresql+psycopg2://ann:***@db/mlflow"),
        ("postgresql://db/mlflow?user=ann&password=pw&sslmode=require", None),
        ("https://ann:pw@mlflow.example", "https://ann:***@mlflow.example"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("https://ghp_token@prefect.example/api", "https://***@prefect.example/api"),
        ("https://:pw@prefect.example/api", "https://:***@prefect.example/api"),
        ("postgresql://ann@db/mlflow", "postgresql://ann@db/mlflow"),
        ("https://h/api?key=1&api_key=pw&x=2", "https://h/api?key=1&api_key=***&x=2"),
        ("s3://bucket/store?token=pw", "s3://bucket/store?token=***"),
        ("cannot reach http://ann:pw@h:4200/api (refused)", "cannot reach http://ann:***@h:4200/api (refused)"),
        ("write to ann@example.org, see http://h:1/p", "write to ann@example.org, see http://h:1/p"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
    ],
)
def test_a_uri_is_shown_without_its_password(uri: str, shown: str | None) -> None:
    assert without_password(uri) == (shown or "postgresql://db/mlflow?user=ann&password=***&sslmode=require")


def test_an_error_is_shown_without_the_password_that_was_tried() -> None:
    assert unspoken("login ann/pw refused", "postgresql://ann:pw@db/x") == "login ann/*** refused"
    assert unspoken("login ann refused", "sqlite:////x.db") == "login ann refused"


def test_files_lie_next_to_the_store_unless_a_server_has_its_own_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", raising=False)
    local = (tmp_path / "mlruns").as_uri()
    assert [artifact_folder(uri, tmp_path) for uri in ("sqlite:////x.db", "postgresql://h/d", "http://h:1")] == [
        local,
        local,
        None,
    ]
    monkeypatch.setenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", "s3://bucket/mlflow")
    assert artifact_folder("postgresql://h/d", tmp_path) == "s3://bucket/mlflow"
    assert [is_database(uri) for uri in ("mysql+pymysql://h/d", "mssql://h/d", "sqlite:///x", "https://h")] == [
        True,
        True,
        False,
        False,
    ]


# ------------------------------------------------------------------------------------------------ with one


@pytest.mark.scale
def test_two_runs_that_find_an_empty_database_have_all_their_points(database: str, tmp_path: Path) -> None:
    """Each has a home of its own, as on two hosts: two senders make the tables at the same time."""
    with tracked(tmp_path / "a", "one") as first, tracked(tmp_path / "b", "two") as second:
        for number in range(1, 6):
            steps(first, number)
            steps(second, number)
            first(table("completions", [{"question": "1+1", "reward": 1.0}]))
    expected = [(number, number / 10) for number in range(1, 6)]
    assert [points(database, key) for key in ("one", "two")] == [expected, expected]
    found = runs(database)
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert [sent(tmp_path / home, key).error for home, key in (("a", "one"), ("b", "two"))] == ["", ""]
    # The folder of the experiment is that of the run which made it: either of the two.
    assert len(list(tmp_path.glob("*/mlruns/*/artifacts/completions.json"))) == 1
    assert gives_away(tmp_path) == []


@pytest.mark.scale
def test_a_wrong_password_is_one_warning_and_sync_sends_all_with_the_right(
    database: str, server: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, wrong = database.rpartition("/")[2], "Wr0ng-Pa55"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url(name, password=wrong))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with tracked(tmp_path, "run") as log:
            started = time.perf_counter()
            steps(log, *range(1, 50))
            assert time.perf_counter() - started < 1.0
    (warning,) = [str(one.message) for one in caught if "MLflow" in str(one.message)]
    assert "password authentication failed" in warning
    assert f"postgresql://cohort:***@127.0.0.1:{server.port}/{name}" in warning
    assert wrong not in warning
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    assert sync(tmp_path).errors == {}
    assert points(database, "run") == [(number, number / 10) for number in range(1, 50)]
    held = [path for path in tmp_path.rglob("*") if path.is_file() and wrong.encode() in path.read_bytes()]
    assert held == gives_away(tmp_path) == []


@pytest.mark.scale
def test_a_database_that_went_away_gets_every_point_once_when_it_is_back(
    database: str, server: Postgres, tmp_path: Path
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with tracked(tmp_path, "run") as log:
            steps(log, 1, 2)
            await_sent(tmp_path, "run")
            server.stop()
            steps(log, 3, 4)
    server.start()
    (warning,) = [str(one.message) for one in caught if "MLflow" in str(one.message)]
    assert "Nothing is lost" in warning
    assert "cohort mlflow sync" in warning
    assert sync(tmp_path).errors == {}
    assert points(database, "run") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert runs(database)["run"].info.status == "FINISHED"


@pytest.mark.scale
def test_no_process_carries_the_password_among_its_arguments(database: str, tmp_path: Path) -> None:
    with tracked(tmp_path, "run") as log:
        steps(log, 1)
        await_sent(tmp_path, "run")
        ours = [process.info for process in psutil.process_iter(["cmdline", "uids"]) if process.info["cmdline"]]
        senders = [info for info in ours if str(tmp_path) in info["cmdline"]]
        assert senders
        assert [info for info in ours if PASSWORD in " ".join(info["cmdline"])] == []
    assert os.environ["MLFLOW_TRACKING_URI"] == database


def await_sent(home: Path, key: str) -> None:
    """Until everything in a run's log is in the database."""
    log = home / "tracking" / key / LOG
    until(lambda: sent(home, key).size >= log.stat().st_size, 90)
