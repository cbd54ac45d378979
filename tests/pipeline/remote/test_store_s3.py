"""A store behind a real S3 API, with what networks, clouds and people do to it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.progress import listen
from pipeline.remote.store import RemoteStore
from pipeline.store import Store, StoreError
from tests.pipeline.calls import call
from tests.pipeline.s3 import Cloud, Fault, serving, use

pytestmark = pytest.mark.scale

KEY, OTHER = "a" * 64, "b" * 64
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def server() -> Iterator[Cloud]:
    with serving() as cloud:
        yield cloud


@pytest.fixture
def cloud(server: Cloud, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    use(monkeypatch, server)
    server.faults.clear()
    server.requests.clear()
    return server


def content(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "part").mkdir()
    (folder / "part" / "note.txt").write_text("note")


def commit(store: Store, key: str = KEY) -> str:
    with store.lock(key):
        digest = store.publish(content, about={"type": "Folder"})
        store.record(key, call(digest))
    return digest


def opened(folder: Path, url: str, *, patience: float = 5.0, lease_seconds: float = 60.0) -> Store:
    return Store(folder, RemoteStore(url, patience=patience, lease_seconds=lease_seconds))


def names(url: str) -> list[str]:
    """Everything below the URL, asked of the API itself."""
    import fsspec

    fs = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
    return sorted(path.removeprefix(url.removeprefix("s3://") + "/") for path in fs.find(url))


# ---------------------------------------------------------------- two machines


def test_another_machine_reads_only_the_manifest_until_it_needs_the_payload(cloud: Cloud, tmp_path: Path) -> None:
    url = cloud.url()
    digest = commit(opened(tmp_path / "a", url))
    other = opened(tmp_path / "b", url)
    cloud.requests.clear()
    found = other.find(KEY)
    assert found is not None
    assert found["result"] == digest
    assert cloud.asked("GET", "weights.bin") == 0
    assert other.manifest(digest)["type"] == "Folder"
    assert (other.path(digest) / "weights.bin").read_bytes() == bytes(range(256)) * 40
    assert (other.path(digest) / "part" / "note.txt").stat().st_mode & 0o777 == 0o444
    assert cloud.asked("GET", "weights.bin") == 1
    again = Store(tmp_path / "b")  # a worker gets the folder only, which records its store
    cloud.requests.clear()
    assert again.find(KEY) is not None
    assert again.path(digest).exists()
    assert cloud.requests == []


def test_the_manifest_goes_up_after_the_payload_and_the_record_last(cloud: Cloud, tmp_path: Path) -> None:
    digest = commit(opened(tmp_path / "a", cloud.url()))
    puts = [path.split("?")[0] for method, path in cloud.requests if method == "PUT"]
    assert cloud.asked("HEAD") == 0  # refused without a reason, they could not be distinguished
    order = [path.rsplit("/", 1)[1] for path in puts if "/objects/" in path or "/actions/" in path]
    assert sorted(order[:2]) == ["note.txt", "weights.bin"]
    assert order[2:] == ["manifest.json", f"{KEY}.json"]
    assert f"/objects/{digest[:2]}/{digest}/part/note.txt" in "".join(puts)


def test_a_commit_leaves_neither_locks_nor_probes_nor_owed_uploads(cloud: Cloud, tmp_path: Path) -> None:
    url, root = cloud.url(), tmp_path / "a"
    digest = commit(opened(root, url))
    place = f"objects/{digest[:2]}/{digest}"
    assert names(url) == [
        f"actions/aa/{KEY}.json",
        *(f"{place}/{name}" for name in ("manifest.json", "part/note.txt", "weights.bin")),
        "store.json",
    ]
    assert list((root / "pending").iterdir()) == []


def _compete(root: Path, url: str, log: Path, ready: multiprocessing.synchronize.Barrier) -> None:
    store = opened(root, url)
    ready.wait(60)
    if store.find(KEY) is None:
        with store.lock(KEY):
            if store.find(KEY) is None:
                with open(log, "a") as handle:
                    handle.write(f"{os.getpid()}\n")
                time.sleep(1.0)
                digest = store.publish(content, about={})
                store.record(KEY, call(digest))
    assert store.find(KEY) is not None


def test_three_processes_with_three_caches_that_want_one_key_compute_it_once(cloud: Cloud, tmp_path: Path) -> None:
    url, ready = cloud.url(), SPAWN.Barrier(3)
    arguments = [(tmp_path / str(number), url, tmp_path / "log", ready) for number in range(3)]
    processes = [SPAWN.Process(target=_compete, args=one) for one in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    assert len(list(Store(tmp_path / "0").digests())) == 1


def _hold(root: Path, url: str, held: multiprocessing.synchronize.Event) -> None:
    with opened(root, url, lease_seconds=2.0).lock(KEY):
        held.set()
        time.sleep(120)


def test_only_a_killed_holders_lock_is_taken_over(cloud: Cloud, tmp_path: Path) -> None:
    url, held, holders = cloud.url(), SPAWN.Event(), []
    holder = SPAWN.Process(target=_hold, args=(tmp_path / "a", url, held))
    holder.start()
    assert held.wait(60)
    killer = SPAWN.Event()

    def take(topic: str, values: dict[str, object]) -> None:
        if topic == "lock":
            holders.append(str(values["holder"]))
            killer.set()

    store, began = opened(tmp_path / "b", url, lease_seconds=2.0), time.monotonic()

    def kill() -> None:
        killer.wait(60)
        time.sleep(7.0)  # three times the lease: the holder renews it
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with listen(take), store.lock(KEY):
        waited = time.monotonic() - began
    thread.join()
    holder.join()
    assert 7.0 < waited < 30.0
    assert f"pid {holder.pid}" in holders[0]


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(
    "fault",
    [
        Fault("drop", "PUT", "weights.bin", 2),
        Fault("drop", "PUT", "manifest.json", 2),
        Fault("drop", "GET", "", 3),
        Fault("refuse", "PUT", "", 2, code="SlowDown", status=503),
        Fault("refuse", "", "actions", 2, code="InternalError", status=500),
        Fault("truncate", "PUT", "weights.bin", 1),
        Fault("delay", "PUT", "weights.bin", 1),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.method or 'any'}-{fault.part or fault.code}",
)
def test_a_fault_that_passes_costs_time_only(cloud: Cloud, tmp_path: Path, fault: Fault) -> None:
    url = cloud.url()
    fault.seen = 0
    cloud.faults.append(fault)
    digest = commit(opened(tmp_path / "a", url, patience=30.0))
    other = opened(tmp_path / "b", url, patience=30.0)
    assert other.find(KEY) is not None
    assert (other.path(digest) / "weights.bin").read_bytes() == bytes(range(256)) * 40
    assert fault.seen == fault.times


@pytest.mark.parametrize("kind", ["drop", "cut", "flip"])
def test_a_download_that_goes_wrong_once_is_repeated(cloud: Cloud, tmp_path: Path, kind: str) -> None:
    url = cloud.url()
    digest = commit(opened(tmp_path / "a", url))
    cloud.faults.append(Fault(kind, "GET", "weights.bin"))
    other = opened(tmp_path / "b", url)
    other.path(digest)
    other.verify(digest)
    assert cloud.faults[0].seen == 1
    assert cloud.asked("GET", "weights.bin") == 2


def test_an_upload_that_is_always_truncated_is_never_visible(cloud: Cloud, tmp_path: Path) -> None:
    url = cloud.url()
    cloud.faults.append(Fault("truncate", "PUT", "weights.bin", 100))
    with pytest.raises(StoreError, match=r"do not arrive whole: expected bytes .*10240.*found .*5120"):
        commit(opened(tmp_path / "a", url))
    assert not any(name.endswith("manifest.json") or "actions" in name for name in names(url))
    cloud.faults.clear()
    assert opened(tmp_path / "a", url).find(KEY) is not None
    assert opened(tmp_path / "b", url).find(KEY) is not None


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("refuse", "PUT", "objects", 99, code="ExpiredToken", status=400), "credentials have expired"),
        (Fault("refuse", "PUT", "objects", 99, code="AccessDenied", status=403), "access is denied"),
        (Fault("refuse", "PUT", "objects", 99, code="InvalidAccessKeyId", status=403), "no valid credentials"),
        (
            Fault("refuse", "PUT", "objects", 99, code="RequestTimeTooSkewed", status=403, hours=-2),
            r"clock of this host is off: it is 7[12]\d\d s ahead of",
        ),
    ],
    ids=lambda value: value.code if isinstance(value, Fault) else "",
)
def test_a_refusal_is_named_at_once_and_the_next_run_uploads(
    cloud: Cloud, tmp_path: Path, fault: Fault, said: str
) -> None:
    url = cloud.url()
    opened(tmp_path / "a", url).find(KEY)
    fault.seen = 0
    cloud.faults.append(fault)
    with pytest.raises(StoreError, match=said) as raised:
        commit(opened(tmp_path / "a", url, patience=60.0))
    assert "Nothing is lost" in str(raised.value)
    assert "not-a-secret" not in str(raised.value)
    assert fault.seen == 1  # no attempt that cannot succeed
    with pytest.warns(UserWarning, match="not uploaded yet"):
        assert opened(tmp_path / "a", url).find(KEY) is not None
    cloud.faults.clear()
    assert opened(tmp_path / "b", url).find(KEY) is None
    assert opened(tmp_path / "a", url).find(KEY) is not None  # a hit, and the upload
    assert opened(tmp_path / "b", url).find(KEY) is not None


def test_a_bucket_that_is_not_there_is_named(cloud: Cloud, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"s3://no-such-bucket-here/x: there is no such bucket \(NoSuchBucket\)"):
        commit(opened(tmp_path / "a", "s3://no-such-bucket-here/x"))


def test_a_server_that_is_not_there_is_given_up_after_the_patience(
    cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"cannot be used after \d+ attempts"):
        opened(tmp_path / "a", cloud.url(), patience=5.0).find(KEY)
    assert time.monotonic() - began < 60.0


def test_the_clock_of_this_host_is_compared_with_the_servers(
    cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = RemoteStore(cloud.url())
    assert abs(remote.probe()) < 60.0
    real = time.time
    monkeypatch.setattr("pipeline.remote.locks.time.time", lambda: real() - 400)
    with pytest.raises(StoreError, match=r"clock of this host is (3[5-9]|4[0-4])\d s behind the server's"):
        remote.probe()


# ---------------------------------------------------------------- damage


def _spoil(url: str, part: str, data: bytes | None) -> None:
    import fsspec

    fs = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
    (path,) = (path for path in fs.find(url) if part in path)
    fs.rm_file(path) if data is None else fs.pipe_file(path, data)


@pytest.mark.parametrize("data", [None, b"short"])
def test_a_file_missing_or_cut_upstream_is_a_miss_and_computed_again(
    cloud: Cloud, tmp_path: Path, data: bytes | None
) -> None:
    url = cloud.url()
    digest = commit(opened(tmp_path / "a", url))
    _spoil(url, "weights.bin", data)
    other = opened(tmp_path / "b", url)
    with pytest.warns(UserWarning, match=r"weights\.bin is missing or of another size; computing it again"):
        assert other.find(KEY) is None
    assert commit(other) == digest
    opened(tmp_path / "c", url).path(digest)


def test_a_large_file_goes_up_in_parts_and_comes_back_whole(cloud: Cloud, tmp_path: Path) -> None:
    url, size = cloud.url(), 120 * 2**20

    def fill(folder: Path) -> None:
        (folder / "large.bin").write_bytes(os.urandom(2**20) * (size // 2**20))

    store = opened(tmp_path / "a", url)
    digest = store.publish(fill, about={})
    store.record(OTHER, call(digest))
    assert cloud.asked("PUT", "partNumber=2") == 1
    assert (opened(tmp_path / "b", url).path(digest) / "large.bin").stat().st_size == size
