"""Leases: what a live run may need is not freed by others, what a dead one held is, and no look-up is too late."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from pipeline.artifact import Folder
from pipeline.stage import stage
from pipeline.store import PrunedArtifactError, Store, use_store
from pipeline.store.pins import LeasedArtifactError, Leases


@stage(version="1")
def make(content: str) -> Folder:
    return Folder.write(lambda folder: (folder / "a.bin").write_text(content * 100) and None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_what_a_live_run_made_or_looked_up_is_refused_to_others_and_free_to_itself(store: Store) -> None:
    with use_store(store):
        before = make("looked up").digest
    running, other = Store(store.root), Store(store.root)
    with running.leases.open("long-run"), use_store(running):
        made, found = make("made").digest, make("looked up").digest
        assert found == before
        for digest in (made, found):
            with pytest.raises(LeasedArtifactError, match=rf"in use by the run long-run \(.*, pid {os.getpid()}\)"):
                other.prune(digest)
            assert (other.path(digest) / "a.bin").exists()
        assert running.prune(made) == 400
    assert other.prune(found) == 900


def test_what_a_run_gave_back_is_no_longer_refused(store: Store) -> None:
    other = Store(store.root)
    with store.leases.open("run"), use_store(store):
        digest = make("x").digest
        store.leases.give_back(digest)
        assert other.prune(digest) == 100


def test_part_of_a_leased_object_is_refused_as_well(store: Store) -> None:
    with store.leases.open("run"), use_store(store):
        digest = make("x").digest
        with pytest.raises(LeasedArtifactError):
            Store(store.root).prune(digest, ["a.bin"])
        assert Store(store.root).freed(digest) == frozenset()


def test_the_lease_of_a_killed_process_is_void_at_once_and_still_tells_what_it_had_come_to(store: Store) -> None:
    child = os.fork()
    if child == 0:
        with store.leases.open("killed"), use_store(store):
            make("x")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with use_store(store):
        digest = make("x").digest
    assert store.leases.live() == []
    assert store.leases.remains() == {"killed": {digest}}
    assert store.prune(digest) == 100
    with store.leases.open("killed"):  # whoever continues the run says anew what it needs
        assert store.leases.remains() == {}
    assert list((store.root / "leases").iterdir()) == []


def test_a_line_cut_off_by_a_kill_is_left_out(store: Store) -> None:
    folder = store.root / "leases"
    folder.mkdir()
    digest = "ab" * 32
    about = '{"run": "r", "host": "h", "pid": 1, "started": 0.0}'
    (folder / "r.1").write_text(f"{about}\n+{digest}\n+{digest[:20]}")
    assert store.leases.remains() == {"r": {digest}}
    (folder / "r.2").write_text("not a lease\n")
    with pytest.warns(UserWarning, match=r"r\.2 is no lease; remove it"):
        assert store.leases.remains() == {"r": {digest}}


def test_what_is_read_of_a_lease_grows_with_it_and_is_not_read_again(store: Store) -> None:
    watching = Leases(store.root)
    with store.leases.open("run"):
        store.hold("a" * 64)
        assert watching.live()[0].digests == {"a" * 64}
        size = store.root.joinpath("leases", os.listdir(store.root / "leases")[0]).stat().st_size
        store.hold("b" * 64)
        store.hold("b" * 64)
        assert watching.live()[0].digests == {"a" * 64, "b" * 64}
        grown = store.root.joinpath("leases", os.listdir(store.root / "leases")[0]).stat().st_size
        assert grown - size == 66  # one line: a sign, the digest, the end
    assert watching.live() == []


class Slow(Leases):
    """Finds no lease, and then takes its time before anything is freed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.looked, self.looked_up = threading.Event(), threading.Event()

    def refuse(self, digest: str) -> None:
        super().refuse(digest)
        self.looked.set()
        assert not self.looked_up.wait(0.05)


def test_a_lookup_waits_for_whoever_has_looked_at_the_leases_and_not_freed_yet(store: Store) -> None:
    with use_store(store):
        digest = make("x").digest
    running, freeing = Store(store.root), Store(store.root)
    freeing.leases = slow = Slow(store.root)
    with running.leases.open("run"):
        thread = threading.Thread(target=lambda: freeing.prune(digest))
        thread.start()
        slow.looked.wait()
        with pytest.raises(PrunedArtifactError):
            running.path(digest)
        slow.looked_up.set()
        thread.join()


@pytest.mark.scale
def test_a_lookup_beside_a_prune_either_finds_the_object_freed_or_keeps_it_from_being_freed(store: Store) -> None:
    """200 races of one look-up and one prune: never does a look-up find a payload that is then freed under its lease."""
    with use_store(store):
        digests = [make(str(number)).digest for number in range(200)]
    running, freeing = Store(store.root), Store(store.root)
    outcomes: list[tuple[bool, bool]] = []
    with running.leases.open("run"):
        for digest in digests:
            start, freed = threading.Barrier(2), []

            def free(digest: str = digest, start: threading.Barrier = start, freed: list[bool] = freed) -> None:
                start.wait()
                try:
                    freed.append(freeing.prune(digest) > 0)
                except LeasedArtifactError:
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


def test_a_store_that_cannot_be_written_is_read_without_a_lease(store: Store) -> None:
    (store.root / "leases").write_text("in the way")
    with pytest.warns(UserWarning, match="no lease on"), store.leases.open("run"):
        assert not store.leases.lacks("a" * 64)
