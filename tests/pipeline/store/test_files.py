"""The disk watched: what is expected of a stage is what it wrote, and too little space stops it before it starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.artifact import Folder
from pipeline.stage import stage
from pipeline.store import Store, use_store
from pipeline.store.context import watching_disk
from pipeline.store.files import DiskFullError, DiskWatch, folder_bytes, free_bytes

STARTED: list[int] = []


@stage(version="1")
def train(size: int) -> Folder:
    STARTED.append(size)
    return Folder.write(lambda folder: (folder / "a.bin").write_bytes(os.urandom(size)) and None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    STARTED.clear()
    return Store(tmp_path / "store")


def watch_of(store: Store, free: int, margin: int = 0) -> DiskWatch:
    return DiskWatch(store.root, margin, lambda: "`cohort store prune --optimizer 1` frees 3 GB", lambda folder: free)


def test_a_stage_starts_where_its_last_result_and_the_margin_just_fit(store: Store) -> None:
    with use_store(store), watching_disk(watch_of(store, 0)) as watch:
        train(50_000)
        written = watch.estimate("train", store.manifest)
        assert written == 50_000 + (store.folder(train(50_000).digest) / "manifest.json").stat().st_size
        assert watch.written == written
        for free, fits in ((written + 1000, True), (written + 999, False)):
            watch.free, watch.margin = (lambda folder, free=free: free), 1000
            if fits:
                train(40_000)
            else:
                with pytest.raises(
                    DiskFullError, match=r"train did not start: .*0\.0\d+ MB.*--optimizer 1` frees 3 GB"
                ):
                    train(40_001)
    assert STARTED == [50_000, 40_000]


def test_the_estimate_is_the_largest_of_the_last_three(store: Store) -> None:
    with use_store(store), watching_disk(watch_of(store, 10**9)) as watch:
        for size in (90_000, 10_000, 30_000, 20_000):
            train(size)
        assert 30_000 < watch.estimate("train", store.manifest) < 31_000


def test_a_continued_run_expects_what_it_looked_up_pruned_or_not(store: Store) -> None:
    with use_store(store):
        store.prune(train(50_000).digest)
    with use_store(store), watching_disk(watch_of(store, 49_999)) as watch:
        train(50_000)  # a hit writes nothing
        assert watch.estimate("train", store.manifest) == 50_000
        with pytest.raises(DiskFullError, match="Nothing is lost; free space, then run the same command again"):
            train(1)
        watch.free = lambda folder: 50_000
        train(1)
    assert STARTED == [50_000, 1]


def test_a_stage_that_nothing_is_known_of_starts_unless_the_margin_is_gone(store: Store) -> None:
    with use_store(store), watching_disk(watch_of(store, 999, margin=1000)), pytest.raises(DiskFullError):
        train(1)
    with use_store(store), watching_disk(watch_of(store, 1000, margin=1000)):
        train(1)


def test_hard_links_take_no_bytes_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "one" / "deep").mkdir(parents=True)
    (tmp_path / "one" / "a").write_bytes(b"x" * 300)
    (tmp_path / "one" / "deep" / "b").write_bytes(b"x" * 5)
    assert folder_bytes(tmp_path / "one") == 305
    os.link(tmp_path / "one" / "a", tmp_path / "link")
    assert folder_bytes(tmp_path / "one") == 5
    assert folder_bytes(tmp_path / "gone") == 0


def test_what_is_free_is_what_the_file_system_says(tmp_path: Path) -> None:
    state = os.statvfs(tmp_path)
    assert abs(free_bytes(tmp_path) - state.f_bavail * state.f_frsize) < 1e9  # others write meanwhile
