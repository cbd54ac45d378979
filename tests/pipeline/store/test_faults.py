"""Faults at the n-th operation on the file system, n = 1, 2, ... until none fires (the method of SQLite's tests).

A forked child performs a stage call (lock, draft, files, manifest, rename, record) and is killed, or given an error, at one
operation. Afterwards whatever is visible must be whole, and the same call again must succeed.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import os
import signal
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.artifact import Folder, Table
from pipeline.stage import record_metrics, stage
from pipeline.store import PrunedArtifactError, Store, StoreError, use_store

CLEAN, NAMED, OTHER, SURVIVED = 0, 3, 4, 5
OPERATIONS = ("open", "mkdir", "fsync", "rename", "replace", "chmod", "unlink", "rmdir")


class Weights(Folder):
    pass


@stage(version="1")
def train(seed: int) -> Weights:
    def fill(folder: Path) -> None:
        (folder / "deep").mkdir()
        for name in ("a.bin", "deep/b.bin"):
            with open(folder / name, "wb") as handle:
                handle.write(bytes([seed]) * 1000)

    record_metrics({"loss": 0.5})
    return Weights.write(fill)


class Countdown:
    """Calls `strike` before the n-th operation; a write does half of its work first."""

    def __init__(self, at: int, strike: Callable[[], None]) -> None:
        self.left, self.strike, self.fired = at, strike, False

    def tick(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.fired = True
            self.strike()

    def install(self) -> None:
        for name in OPERATIONS:
            setattr(os, name, self.counted(name, getattr(os, name)))
        plain = builtins.open

        def counted_open(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return Handle(plain(*args, **kwargs), self)

        builtins.open = counted_open

    def counted(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return None if name == "fsync" else plain(*args, **kwargs)

        return call


class Handle:
    def __init__(self, plain: Any, countdown: Countdown) -> None:
        self.plain, self.countdown = plain, countdown

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.plain.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def write(self, data: Any) -> int:
        self.plain.write(data[: len(data) // 2])
        self.plain.flush()
        self.countdown.tick()
        return int(self.plain.write(data[len(data) // 2 :]))


def in_child(root: Path, at: int, strike: Callable[[], None], work: Callable[[], object]) -> int:
    """Wait status of a forked child that does `work` with a fault at operation `at`."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    countdown = Countdown(at, strike)
    try:
        warnings.simplefilter("ignore")
        countdown.install()
        work()
        os._exit(SURVIVED if countdown.fired else CLEAN)
    except StoreError as error:
        os._exit(NAMED if str(root) in str(error) else OTHER)
    except BaseException:
        os._exit(OTHER)
    return OTHER


def suicide() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number: int) -> Callable[[], None]:
    def strike() -> None:
        raise OSError(number, os.strerror(number))

    return strike


def prepare(root: Path, scenario: str) -> Callable[[], object]:
    """A store in the state that a scenario starts from, and the work at which faults strike."""
    with use_store(Store(root)) as store:
        if scenario == "fresh":
            return lambda: call(root)
        digest = train(1).digest
        if scenario == "prune":
            return lambda: Store(root).prune(digest)
        damaged = store.path(digest) / "a.bin"
        damaged.chmod(0o644)
        damaged.write_bytes(b"damaged")
        return lambda: call(root)


def call(root: Path) -> Weights:
    with use_store(Store(root)):
        return train(1)


def assert_whole(root: Path, *, work: Callable[[], object], expected: str) -> None:
    """What is visible is whole or known as damaged before; the same work again succeeds and leaves nothing behind."""
    store = Store(root)
    for action in store.actions():
        assert action["result"] == expected
    work()
    for digest in store.digests():
        assert digest == expected
        try:
            Store(root).verify(digest)
        except PrunedArtifactError:
            assert store.find(store.actions()[0]["key"]) is not None
    assert call(root).digest == expected
    with use_store(Store(root)):
        assert call(root).metrics == {"loss": 0.5}
    for folder in ("drafts", "locks"):
        assert list((root / folder).iterdir()) == []


@pytest.fixture
def expected(tmp_path: Path) -> str:
    return call(tmp_path / "golden").digest


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("scenario", "least"), [("fresh", 40), pytest.param("damaged", 50, marks=pytest.mark.slow), ("prune", 8)]
)
def test_a_kill_at_any_operation_leaves_nothing_or_a_whole_artifact(
    tmp_path: Path, expected: str, scenario: str, least: int
) -> None:
    for at in range(1, 500):
        root = tmp_path / str(at)
        work = prepare(root, scenario)
        status = in_child(root, at, suicide, work)
        if scenario == "fresh":  # before any sweep or repair: every object that has its name is whole
            for digest in Store(root).digests():
                Store(root).verify(digest)
        assert_whole(root, work=work, expected=expected)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == CLEAN
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert at - 1 >= least


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "number",
    [errno.ENOSPC, *(pytest.param(number, marks=pytest.mark.slow) for number in (errno.EIO, errno.EACCES))],
    ids=errno.errorcode.get,
)
def test_an_error_at_any_operation_names_the_store_and_leaves_no_halves(
    tmp_path: Path, expected: str, number: int
) -> None:
    outcomes = []
    for at in range(1, 500):
        root = tmp_path / str(at)
        work = prepare(root, "fresh")
        status = os.WEXITSTATUS(in_child(root, at, fail(number), work))
        assert status in (CLEAN, NAMED, SURVIVED), f"operation {at}: exit status {status}"
        for digest in Store(root).digests():
            Store(root).verify(digest)
        assert_whole(root, work=work, expected=expected)
        outcomes.append(status)
        if status == CLEAN:
            break
    assert outcomes.count(NAMED) >= 25


def mounted(options: list[str], folder: Path, work: Callable[[], None]) -> int:
    """Exit status of `work` in a forked child that sees `folder` mounted by `mount OPTIONS FOLDER`; skips where refused."""
    child = os.fork()
    if child:
        status = os.WEXITSTATUS(os.waitpid(child, 0)[1])
        if status == SURVIVED:
            pytest.skip("this machine does not let tests mount a file system")
        return status
    try:
        if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS
            os._exit(SURVIVED)
        for arguments in (["--make-rprivate", "/"], [*options, str(folder)]):
            if subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode:
                os._exit(SURVIVED)
        work()
        os._exit(CLEAN)
    except BaseException as error:
        print(repr(error))
        os._exit(OTHER)


def test_a_read_only_store_can_be_read_and_the_first_write_names_it(tmp_path: Path) -> None:
    root = tmp_path / "store"
    digest = call(root).digest
    ran: list[int] = []

    @stage(version="1")
    def expensive(seed: int) -> Weights:
        ran.append(seed)
        return Weights(digest)

    def work() -> None:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(root)], check=True)
        with use_store(Store(root)) as store:
            assert (store.path(store.resolve(digest[:8])) / "a.bin").exists()
            assert len(list(store.actions())) == 1
            assert train(1).metrics == {"loss": 0.5}  # a hit needs no write
            with pytest.raises(StoreError, match=f"the store {root} cannot be used: Read-only file system"):
                expensive(1)
            assert ran == []
            with pytest.raises(StoreError, match="Read-only"):
                Weights.write(lambda folder: None)

    assert mounted(["--bind", str(root)], root, work) == CLEAN


class Numbers(Table):
    schema = pa.schema([pa.field("x", pa.int64())])


def heavy(folder: Path) -> None:
    (folder / "w").write_bytes(b"w" * 10_000_000)


def test_a_full_disk_is_a_store_error_and_space_is_given_back(tmp_path: Path) -> None:
    root = tmp_path / "store"
    root.mkdir()

    def work() -> None:
        with use_store(Store(root)) as store:
            small = Numbers.write({"x": [1, 2]})
            with pytest.raises(StoreError, match=f"the store {root} cannot be used: .*No space left"):
                Numbers.write({"x": list(range(1_000_000))})
            with pytest.raises(StoreError, match="No space left"):
                Weights.write(heavy)
            assert list(store.digests()) == [small.digest]
            assert list((root / "drafts").iterdir()) == []
            assert Numbers.write({"x": [3]}).rows() == [{"x": 3}]

    assert mounted(["-t", "tmpfs", "-o", "size=1m", "tmpfs"], root, work) == CLEAN


def test_a_store_where_a_file_stands_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("not a folder")
    with use_store(Store(tmp_path / "store")), pytest.raises(StoreError, match=f"the store {tmp_path}/store cannot be"):
        train(1)
