"""Pins: what a live run may need is not freed by others, what a dead one held is, and no look-up is too late."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from pipeline.artifact import Folder
from pipeline.stage import stage
from pipeline.store import PrunedArtifactError, Store, use_store
from pipeline.store.pins import PinnedArtifactError, Pins


@stage(version="1")
def make(content: str) -> Folder:
    return Folder.write(lambda folder: (folder / "a.bin").write_text(content * 100) and None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_only_a_live_run_itself_may_free_what_it_made_or_looked_up(store: Store) -> None:
    with use_store(store):
        before = make("looked up").digest
    running, other = Store(store.root), Store(store.root)
    with running.pins.open("long-run"), use_store(running):
        made, found = make("made").digest, make("looked up").digest
        assert found == before
        for digest in (made, found):
            with pytest.raises(PinnedArtifactError, match=rf"in use by the run long-run \(.*, pid {os.getpid()}\)"):
                other.prune(digest)
            assert (other.path(digest) / "a.bin").exists()
        assert running.prune(made) == 400
    assert other.prune(found) == 900


def test_what_a_run_gave_back_is_no_longer_refused(store: Store) -> None:
    other = Store(store.root)
    with store.pins.open("run"), use_store(store):
        digest = make("x").digest
        store.pins.remove(digest)
        assert other.prune(digest) == 100


def test_part_of_a_pinned_object_is_refused_as_well(store: Store) -> None:
    with store.pins.open("run"), use_store(store):
        digest = make("x").digest
        with pytest.raises(PinnedArtifactError):
            Store(store.root).prune(digest, ["a.bin"])
        assert Store(store.root).freed(digest) == frozenset()


def test_the_pins_of_a_killed_process_are_void_at_once_and_still_readable(store: Store) -> None:
    child = os.fork()
    if child == 0:
        with store.pins.open("killed"), use_store(store):
            make("x")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with use_store(store):
        digest = make("x").digest
    assert store.pins.live() == []
    assert store.pins.remains() == {"killed": {digest}}
    assert store.prune(digest) == 100
    with store.pins.open("killed"):  # whoever continues the run says anew what it needs
        assert store.pins.remains() == {}
    assert list((store.root / "pins").iterdir()) == []


def test_a_line_cut_off_by_a_kill_is_left_out(store: Store) -> None:
    folder = store.root / "pins"
    folder.mkdir()
    digest = "ab" * 32
    about = '{"run": "r", "host": "h", "pid": 1, "started": 0.0}'
    (folder / "r.1").write_text(f"{about}\n+{digest}\n+{digest[:20]}")
    assert store.pins.remains() == {"r": {digest}}
    (folder / "r.2").write_text("not pins\n")
    with pytest.warns(UserWarning, match=r"r\.2 is no file of pins; remove it"):
        assert store.pins.remains() == {"r": {digest}}


def test_what_is_read_of_pins_grows_with_them_and_is_not_read_again(store: Store) -> None:
    watching = Pins(store.root)
    with store.pins.open("run"):
        store.pin("a" * 64)
        assert watching.live()[0].digests == {"a" * 64}
        size = store.root.joinpath("pins", os.listdir(store.root / "pins")[0]).stat().st_size
        store.pin("b" * 64)
        store.pin("b" * 64)
        assert watching.live()[0].digests == {"a" * 64, "b" * 64}
        grown = store.root.joinpath("pins", os.listdir(store.root / "pins")[0]).stat().st_size
        assert grown - size == 66  # one line: a sign, the digest, the end
    assert watching.live() == []


class Slow(Pins):
    """Finds no pin, and then takes its time before anything is freed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.looked, self.looked_up = threading.Event(), threading.Event()

    def require_unpinned(self, digest: str) -> None:
        super().require_unpinned(digest)
        self.looked.set()
        assert not self.looked_up.wait(0.05)


def test_a_lookup_waits_for_a_process_about_to_free(store: Store) -> None:
    with use_store(store):
        digest = make("x").digest
    running, freeing = Store(store.root), Store(store.root)
    freeing.pins = slow = Slow(store.root)
    with running.pins.open("run"):
        thread = threading.Thread(target=lambda: freeing.prune(digest))
        thread.start()
        slow.looked.wait()
        with pytest.raises(PrunedArtifactError):
            running.path(digest)
        slow.looked_up.set()
        thread.join()


@pytest.mark.scale
def test_a_lookup_during_a_prune_finds_the_object_freed_or_keeps_it(store: Store) -> None:
    """200 races of one look-up and one prune: never does a look-up find a payload that is then freed under its pin."""
    with use_store(store):
        digests = [make(str(number)).digest for number in range(200)]
    running, freeing = Store(store.root), Store(store.root)
    outcomes: list[tuple[bool, bool]] = []
    with running.pins.open("run"):
        for digest in digests:
            start, freed = threading.Barrier(2), []

            def free(digest: str = digest, start: threading.Barrier = start, freed: list[bool] = freed) -> None:
                start.wait()
                try:
                    freed.append(freeing.prune(digest) > 0)
                except PinnedArtifactError:
                    freed.append(False)

            thread = threading.Thread(target=free)
            thread.start()
            start.wait()
            try:
                running.path(digest)
                found = True
            except PrunedArtifactError:
                found = False
            thread.join()
            outcomes.append((found, freed[0]))
    assert {(True, True), (False, False)}.isdisjoint(outcomes)


def test_a_store_that_cannot_be_written_is_read_without_pins(store: Store) -> None:
    (store.root / "pins").write_text("in the way")
    with pytest.warns(UserWarning, match="no pins in"), store.pins.open("run"):
        assert not store.pins.lacks("a" * 64)
