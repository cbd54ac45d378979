"""The store: what is visible is whole, damage is found and recomputed, pruning keeps hits, processes share it."""

from __future__ import annotations

import os
import random
import re
import signal
import time
import warnings
from pathlib import Path

import pytest

from pipeline.store import (
    DamagedArtifactError,
    MissingArtifactError,
    PrunedArtifactError,
    Store,
    StoreError,
    current_store,
    use_store,
)
from pipeline.store.files import draft_folder, read_sealed, write_sealed
from tests.pipeline.calls import call
from tests.pipeline.processes import FORK, work_at_once


def content(folder: Path) -> None:
    (folder / "b.bin").write_bytes(bytes(range(256)))
    (folder / "a.txt").write_text("a")


def publish(store: Store, *, key: str = "c" * 64, text: str = "") -> str:
    def fill(folder: Path) -> None:
        content(folder)
        if text:
            (folder / "more.txt").write_text(text)

    digest = store.publish(fill, about={"type": "Folder", "provenance": {"metrics": {"loss": 0.1}}})
    store.record(key, call(digest))
    return digest


def alter(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def test_about_is_in_the_manifest_and_not_in_the_digest(store: Store) -> None:
    one = store.publish(content, about={"type": "A", "rows": 1})
    assert store.publish(content, about={"type": "B", "rows": 2}) == one
    assert store.publish(content, about={}, schema="x: int64") != one
    assert store.manifest(one)["type"] == "A"


def test_about_cannot_overwrite_what_the_digest_covers(store: Store) -> None:
    digest = store.publish(content, about={"files": [], "digest": "0", "schema": "x"})
    store.verify(digest)
    assert len(store.manifest(digest)["files"]) == 2


def test_publishing_leaves_neither_drafts_nor_locks(store: Store) -> None:
    publish(store)
    assert list((store.root / "drafts").iterdir()) == []
    assert list((store.root / "locks").iterdir()) == []


def test_a_fill_that_fails_leaves_nothing(store: Store) -> None:
    def fill(folder: Path) -> None:
        content(folder)
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        store.publish(fill, about={})
    assert list(store.digests()) == []
    assert list((store.root / "drafts").iterdir()) == []


# ---------------------------------------------------------------- damage


def test_every_single_bit_flip_in_payload_manifest_and_action_is_found(store: Store) -> None:
    digest = publish(store)
    folder, action = store.path(digest), next((store.root / "actions").glob("*/*.json"))
    draw, missed, flips = random.Random(7), [], 0
    for path in (folder / "b.bin", folder / "a.txt", folder / "manifest.json", action):
        original = path.read_bytes()
        bits = range(8 * len(original))
        for bit in bits if len(bits) < 200 else draw.sample(bits, 200):
            data = bytearray(original)
            data[bit // 8] ^= 1 << bit % 8
            alter(path, bytes(data))
            flips += 1
            try:
                Store(store.root).verify(digest)
                store.action("c" * 64)
                missed.append((path.name, bit))
            except DamagedArtifactError:
                pass
        alter(path, original)
    assert flips == 608
    assert missed == []
    Store(store.root).verify(digest)


def test_every_truncation_and_a_swap_of_two_files_is_found(store: Store) -> None:
    digest = publish(store)
    other = publish(store, key="d" * 64, text="other")
    folder = store.path(digest)
    actions = sorted((store.root / "actions").glob("*/*.json"))
    for path in (folder / "b.bin", folder / "manifest.json", actions[0]):
        original = path.read_bytes()
        for size in range(0, len(original), 37):
            alter(path, original[:size])
            with pytest.raises(DamagedArtifactError, match=re.escape(str(path))):
                Store(store.root).verify(digest) if path.parent == folder else store.action("c" * 64)
        alter(path, original)
    alter(folder / "manifest.json", (store.path(other) / "manifest.json").read_bytes())
    with pytest.raises(DamagedArtifactError, match="does not describe"):
        Store(store.root).verify(digest)
    alter(actions[0], actions[1].read_bytes())
    with pytest.raises(DamagedArtifactError, match="record of another call"):
        store.action("c" * 64)


@pytest.mark.parametrize("victim", ["b.bin", "a.txt", "manifest.json"])
@pytest.mark.parametrize("how", ["missing", "altered"])
def test_damage_is_a_miss_that_names_the_file_until_it_is_published_again(store: Store, victim: str, how: str) -> None:
    digest = publish(store)
    path = store.path(digest) / victim
    path.unlink() if how == "missing" else alter(path, b"?")
    fresh = Store(store.root)
    with pytest.warns(UserWarning, match=re.escape(str(path))):
        assert fresh.find("c" * 64) is None
    assert publish(fresh) == digest
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fresh.find("c" * 64)
    assert found is not None
    assert found["result"] == digest
    Store(store.root).verify(digest)


def test_publishing_over_a_damaged_object_replaces_it_without_a_look_up(store: Store) -> None:
    digest = publish(store)
    (store.path(digest) / "manifest.json").unlink()
    assert publish(Store(store.root)) == digest
    Store(store.root).verify(digest)


def test_a_deleted_object_is_a_miss_with_a_warning(store: Store) -> None:
    digest = publish(store)
    os.rename(store.path(digest), store.root / "gone")
    with pytest.warns(UserWarning, match=f"no artifact {digest} at .*; computing it again"):
        assert store.find("c" * 64) is None


def test_a_damaged_action_is_a_miss_that_names_its_file(store: Store) -> None:
    publish(store)
    action = next((store.root / "actions").glob("*/*.json"))
    alter(action, b"[1, 2]")
    with pytest.warns(UserWarning, match=re.escape(str(action))):
        assert store.find("c" * 64) is None
    assert list(store.actions()) == []
    publish(store)
    assert store.find("c" * 64) is not None


def test_a_file_deleted_after_it_was_verified_is_noticed_in_the_same_process(store: Store) -> None:
    digest = publish(store)
    assert store.find("c" * 64) is not None
    (store.path(digest) / "b.bin").unlink()
    with pytest.raises(DamagedArtifactError, match=r"b\.bin is missing"):
        store.path(digest)
    with pytest.warns(UserWarning, match=r"b\.bin is missing"):
        assert store.find("c" * 64) is None


def test_hashes_are_computed_once_for_unchanged_files(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = publish(store)
    fresh, verified = Store(store.root), []
    monkeypatch.setattr("pipeline.store.objects.verify_folder", lambda folder: verified.append(folder.name))
    for _ in range(3):
        fresh.path(digest)
        fresh.find("c" * 64)
    assert verified == [digest]


def test_a_file_put_beside_the_payload_is_found_a_hidden_one_is_the_systems(store: Store) -> None:
    digest = publish(store)
    (store.path(digest) / ".DS_Store").write_text("x")
    Store(store.root).verify(digest)
    (store.path(digest) / "adapter_config.json").write_text("{}")
    with pytest.raises(DamagedArtifactError, match=r"adapter_config\.json does not belong"):
        store.path(digest)


def test_quarantine_moves_a_damaged_object_and_no_sound_one(store: Store) -> None:
    digest = publish(store)
    assert store.quarantine(digest) is None
    alter(store.path(digest) / "a.txt", b"b")
    place = store.quarantine(digest)
    assert place is not None
    assert (place / "a.txt").read_bytes() == b"b"
    assert list(store.digests()) == []


def test_a_seal_covers_values_of_every_kind(tmp_path: Path) -> None:
    value = {"ü": [1, 2.5e-7, None, True, "数\n\u2028"], "nested": {"b": 1, "a": {}}}
    write_sealed(tmp_path / "x.json", value)
    assert read_sealed(tmp_path / "x.json") == value
    text = (tmp_path / "x.json").read_text()
    alter(tmp_path / "x.json", text.replace("2.5e-07", "2.5E-07").encode())
    with pytest.raises(DamagedArtifactError):
        read_sealed(tmp_path / "x.json")
    for junk in ("[]", '"text"', "1", "null", "{}", '{"seal": "x"}', '{"a": "\\ud800", "seal": "x"}', "[" * 100_000):
        alter(tmp_path / "x.json", junk.encode())
        with pytest.raises(DamagedArtifactError):
            read_sealed(tmp_path / "x.json")
    alter(tmp_path / "x.json", b"\xff\xfe")
    with pytest.raises(DamagedArtifactError):
        read_sealed(tmp_path / "x.json")


# ---------------------------------------------------------------- prune, forget, resolve


def test_prune_frees_the_payload_and_keeps_manifest_and_hit(store: Store) -> None:
    digest = publish(store)
    assert store.prune(digest) == 257
    assert store.prune(digest) == 0
    for opened in (store, Store(store.root)):
        found = opened.find("c" * 64)
        assert found is not None
        assert found["result"] == digest
        assert opened.manifest(digest)["provenance"]["metrics"] == {"loss": 0.1}
        with pytest.raises(PrunedArtifactError, match=f"`cohort forget {digest[:12]}` and the same run again"):
            opened.path(digest)
    assert list(store.digests()) == [digest]


def test_a_pruned_artifact_that_is_forgotten_is_computed_again(store: Store) -> None:
    digest = publish(store)
    publish(store, key="d" * 64)
    store.prune(digest)
    assert store.forget(digest) == 2
    assert store.find("c" * 64) is None
    assert store.find("d" * 64) is None
    assert publish(store) == digest
    assert (store.path(digest) / "a.txt").read_text() == "a"


def test_another_process_that_prunes_is_noticed_at_the_next_read(store: Store) -> None:
    digest = publish(store)
    store.path(digest)
    Store(store.root).prune(digest)
    with pytest.raises(PrunedArtifactError):
        store.path(digest)


def test_resolve_finds_the_one_digest_of_a_prefix(store: Store) -> None:
    digests = [publish(store, key=str(n) * 64, text=str(n)) for n in range(3)]
    assert store.resolve(digests[0][:12]) == digests[0]
    with pytest.raises(MissingArtifactError, match="names 3 artifacts"):
        store.resolve("")
    with pytest.raises(MissingArtifactError, match="'zz' names 0 artifacts"):
        store.resolve("zz")


def test_actions_come_oldest_first(store: Store) -> None:
    digest = publish(store)
    for number, created in enumerate((5.0, 3.0, 4.0)):
        store.record(str(number) * 64, call(digest, created=created))
    assert [record["created"] for record in store.actions()] == [1.0, 3.0, 4.0, 5.0]


def test_a_call_without_a_record_says_to_run_it_again(store: Store) -> None:
    assert store.find("0" * 64) is None
    with pytest.raises(MissingArtifactError, match="no record of the call 000000000000"):
        store.action("0" * 64)


def test_stages_without_a_store_are_told_how_to_open_one(store: Store, tmp_path: Path) -> None:
    assert current_store() is store
    with use_store(Store(tmp_path / "other")) as other:
        assert current_store() is other
    assert current_store() is store
    from contextvars import Context

    with pytest.raises(StoreError, match="no store is open"):
        Context().run(current_store)


# ---------------------------------------------------------------- processes


def test_eight_processes_that_publish_equal_content_end_in_one_folder(store: Store) -> None:
    def work(number: int) -> None:
        for round_ in range(5):
            publish(Store(store.root), key=f"{number}{round_}" * 32)

    work_at_once(8, work)
    (digest,) = store.digests()
    Store(store.root).verify(digest)
    assert len(list(store.actions())) == 40
    for folder in ("drafts", "locks"):
        assert list((store.root / folder).iterdir()) == []
    assert not (store.root / "quarantine").exists()


def test_processes_that_find_one_object_damaged_at_once_recompute_it(store: Store) -> None:
    digest = publish(store)
    alter(store.path(digest) / "a.txt", b"b")

    def work(number: int) -> None:
        opened = Store(store.root)
        warnings.simplefilter("ignore")
        if opened.find("c" * 64) is None:
            publish(opened)
        opened.verify(digest)

    work_at_once(6, work)
    Store(store.root).verify(digest)
    assert len(list((store.root / "quarantine").iterdir())) == 1


def test_the_draft_of_a_live_process_is_kept_and_that_of_a_killed_one_swept(store: Store) -> None:
    ready = FORK.Event()

    def work() -> None:
        with draft_folder(store.root) as draft:
            content(draft)
            ready.set()
            time.sleep(60)

    process = FORK.Process(target=work)
    process.start()
    assert ready.wait(10)
    Store(store.root)
    (draft,) = (store.root / "drafts").iterdir()
    assert (draft / "a.txt").exists()
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    Store(store.root)
    assert list((store.root / "drafts").iterdir()) == []
    assert list((store.root / "locks").iterdir()) == []


def test_a_killed_holders_lock_is_free_though_a_forked_worker_lives_on(store: Store) -> None:
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        with store.lock("key"):
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
                os._exit(0)
            os.write(write, f"{worker}\n".encode())
            time.sleep(60)
        os._exit(0)
    worker = int(os.read(read, 20))
    began = time.monotonic()
    try:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the lock of a killed process is still held"))
        signal.alarm(20)
        with store.lock("key"):
            assert time.monotonic() - began < 10
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        os.kill(worker, signal.SIGKILL)
        os.close(read)
        os.close(write)


def test_a_forked_child_that_leaves_the_block_does_not_free_its_parents_lock(store: Store) -> None:
    with store.lock("key"):
        child = os.fork()
        if child == 0:
            with store.lock("another"):
                pass
            store.root.joinpath("locks", "call-key").exists()
        else:
            os.waitpid(child, 0)
    if child == 0:
        os._exit(0)
    assert list((store.root / "locks").iterdir()) == []


def test_a_lock_excludes_other_processes_through_many_handovers(store: Store) -> None:
    counter = store.root / "counter"
    counter.write_text("0")

    def work(number: int) -> None:
        for _ in range(50):
            with store.lock("key"):
                value = int(counter.read_text())
                counter.write_text(str(value + 1))

    work_at_once(6, work)
    assert counter.read_text() == "300"
    assert list((store.root / "locks").iterdir()) == []


def test_waiting_for_a_lock_is_reported(store: Store) -> None:
    from pipeline.progress import listen

    ready, heard = FORK.Event(), []

    def hold() -> None:
        with store.lock("key"):
            ready.set()
            time.sleep(0.3)

    process = FORK.Process(target=hold)
    process.start()
    assert ready.wait(10)
    with listen(lambda topic, values: heard.append((topic, values))), store.lock("key"):
        pass
    process.join()
    assert heard == [("lock", {"waiting_for": "call-key"})]
