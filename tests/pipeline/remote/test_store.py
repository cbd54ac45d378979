"""The logic of a remote store on cheap file systems: what goes up when, what comes down, what is refused."""

from __future__ import annotations

import functools
import json
import mmap
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from pipeline.artifact import Folder
from pipeline.config import ConfigError
from pipeline.derivation.materialise import materialise
from pipeline.remote.bucket import Bucket, checked_url, is_url
from pipeline.remote.cache import RemoteCache
from pipeline.remote.errors import complaint, passes
from pipeline.remote.folder import evict, mapped_digests
from pipeline.remote.locks import RemoteLocks, ServerClock
from pipeline.remote.store import RemoteStore
from pipeline.stage import stage
from pipeline.store import DamagedArtifactError, MissingArtifactError, PrunedArtifactError, Store, StoreError, use_store
from pipeline.store.files import write_sealed
from pipeline.store.pins import PinnedArtifactError
from tests.pipeline.calls import call
from tests.pipeline.processes import until

KEY, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/remote"


def commit(store: Store, key: str = KEY, text: str = "a") -> str:
    digest = store.publish(lambda folder: (folder / "a.txt").write_text(text) and None, about={"type": "Folder"})
    store.record(key, call(digest, created=float(int(key[:1], 16))))
    return digest


# ---------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://user:secret@bucket/x", "may hold no user, password or query"),
        ("s3://bucket/x?token=secret", "may hold no user, password or query"),
        ("gs://bucket/x", r"gs:// needs the package gcsfs, which is not installed: pip install gcsfs"),
        ("nope://x/y", "unknown scheme nope://"),
        ("s3:/bucket/x", "expected a URL such as s3://bucket/folder"),
    ],
)
def test_a_url_that_cannot_be_a_stores_is_refused_without_its_secrets(tmp_path: Path, url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        Store(tmp_path, url)
    assert "secret" not in str(raised.value)
    assert "user:" not in str(raised.value)


def test_a_url_is_distinguished_from_a_folder() -> None:
    assert [is_url(text) for text in ("s3://b/x", "s3:/b/x", "file:///x")] == [True] * 3
    assert [is_url(text) for text in ("artifacts", "/data/s3", "./a:b", "C:/x")] == [False] * 4
    assert checked_url("file:///tmp/x/") == "file:///tmp/x"


# ---------------------------------------------------------------- two caches of one store


def test_a_copy_of_the_remote_folder_is_a_store(tmp_path: Path, url: str) -> None:
    digest = commit(Store(tmp_path / "a", url))
    plain = Store(tmp_path / "remote")
    assert plain.find(KEY) == {"key": KEY, **call(digest, created=10.0)}
    assert (plain.path(digest) / "a.txt").read_text() == "a"


@stage(version="1")
def learn(steps: int) -> Folder:
    return Folder.derived(Folder.write_derived(lambda folder: (folder / "weights").write_text(str(steps)) and None))


def test_trained_state_of_one_cache_is_a_hit_of_another_under_its_name(tmp_path: Path, url: str) -> None:
    with use_store(Store(tmp_path / "a", url)):
        made, content = learn(3), learn(3).content
    assert made.digest != content
    with use_store(Store(tmp_path / "b", url)) as other:
        assert other.find(made.digest) is not None
        assert learn(3) == made
        assert made.content == content
        assert list((other.root / "objects").glob("*/*")) == []
        assert (made.path / "weights").read_text() == "3"


@pytest.mark.filterwarnings("ignore:.* is not there .* replaying")
@pytest.mark.parametrize("cache", ["a", "b"])
def test_trained_state_that_was_freed_is_replayed_in_any_cache(tmp_path: Path, url: str, cache: str) -> None:
    with use_store(Store(tmp_path / "a", url)) as first:
        made = learn(3)
        content = made.content
        first.prune(made.digest)
    with use_store(Store(tmp_path / cache, url)) as store:
        assert not store.is_whole(made.digest)
        with pytest.raises(PrunedArtifactError):
            _ = made.path
        store.replay = functools.partial(materialise, store)
        assert (made.path / "weights").read_text() == "3"
        assert (made.content, store.is_whole(made.digest)) == (content, True)


def test_a_store_in_memory_serves_two_caches(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    digest = commit(Store(tmp_path / "a", url))
    other = Store(tmp_path / "b", url)
    assert other.find(KEY) is not None
    assert list((other.root / "objects").glob("*/*")) == []
    assert (other.path(digest) / "a.txt").read_text() == "a"


def test_listings_hold_what_is_here_and_what_is_there(tmp_path: Path, url: str) -> None:
    one, two = Store(tmp_path / "a", url), Store(tmp_path / "b", url)
    digests = [commit(one), commit(two, OTHER, "b")]
    for store in (one, two):
        assert list(store.digests()) == sorted(digests)
        assert [record["key"] for record in store.actions()] == [KEY, OTHER]
        assert store.resolve(digests[0][:10]) == digests[0]


def test_what_is_nowhere_is_missing(tmp_path: Path, url: str) -> None:
    store = Store(tmp_path / "a", url)
    assert store.find(KEY) is None
    for use in (store.path, store.manifest, store.verify, store.prune):
        with pytest.raises(MissingArtifactError):
            use("0" * 64)


def test_pruning_and_forgetting_reach_the_remote_store(tmp_path: Path, url: str) -> None:
    digest = commit(Store(tmp_path / "a", url), text="12345")
    other = Store(tmp_path / "b", url)
    assert other.prune(digest) == 5
    assert not list((tmp_path / "remote").rglob("a.txt"))
    third = Store(tmp_path / "c", url)
    assert third.find(KEY) is not None
    with pytest.raises(PrunedArtifactError, match="cohort forget"):
        third.path(digest)
    assert third.forget(digest) == 1
    assert Store(tmp_path / "d", url).find(KEY) is None
    assert commit(Store(tmp_path / "d", url), text="12345") == digest
    assert (Store(tmp_path / "e", url).path(digest) / "a.txt").read_text() == "12345"


def test_what_a_live_run_on_another_machine_has_looked_up_is_not_freed(tmp_path: Path, url: str) -> None:
    digest = commit(Store(tmp_path / "a", url))
    away = Store(tmp_path / "b", url)
    with away.pins.open("run"):
        assert away.find(KEY) is not None
        with pytest.raises(PinnedArtifactError, match=f"{digest[:12]} is in use by .*-{os.getpid()}-"):
            Store(tmp_path / "c", url).prune(digest)
        outline = away._cache.manifest(digest)  # a note without the look before it: as if the run had come in between
        write_sealed(outline / "pruned.json", {"digest": digest, "files": ["a.txt"], "pruned": 1.0})
        with pytest.raises(PinnedArtifactError):
            RemoteStore(url).prune(outline)
        assert not list((tmp_path / "remote").rglob("pruned.json"))
    for alive in (tmp_path / "remote" / "pins").rglob("alive"):
        os.utime(alive, (0, 1000))  # as if its process had died
    assert Store(tmp_path / "c", url).prune(digest) == 1
    assert not [path for path in (tmp_path / "remote" / "pins").rglob("*") if path.is_file()]


def test_objects_damaged_here_are_fetched_and_those_damaged_there_recomputed(tmp_path: Path, url: str) -> None:
    store = Store(tmp_path / "a", url)
    digest = commit(store)
    (store.path(digest) / "a.txt").unlink()
    assert Store(store.root).find(KEY) is not None
    assert (Store(store.root).path(digest) / "a.txt").read_text() == "a"
    (remote,) = (tmp_path / "remote").rglob("a.txt")
    remote.chmod(0o644)
    remote.write_text("b")
    other = Store(tmp_path / "b", url)
    with pytest.raises(DamagedArtifactError, match=r"a\.txt is damaged \(its hash is not the manifest's\)"):
        other.path(digest)
    assert not remote.exists()
    with pytest.warns(UserWarning, match="computing it again"):
        assert other.find(KEY) is None
    assert commit(other) == digest
    assert Store(tmp_path / "c", url).path(digest).exists()


def test_a_record_altered_there_is_a_miss(tmp_path: Path, url: str) -> None:
    commit(Store(tmp_path / "a", url))
    (record,) = (tmp_path / "remote" / "actions").rglob("*.json")
    record.chmod(0o644)
    record.write_text(record.read_text().replace("10.0", "20.0"))
    with pytest.warns(UserWarning, match="computing it again"):
        assert Store(tmp_path / "b", url).find(KEY) is None


# ---------------------------------------------------------------- owed uploads


def test_what_could_not_be_uploaded_is_owed_and_uploaded_by_the_next_process(tmp_path: Path, url: str) -> None:
    store = Store(tmp_path / "a", RemoteStore(url, patience=0.0))
    assert store.find(OTHER) is None
    (tmp_path / "remote").rename(tmp_path / "away")
    (tmp_path / "remote").write_text("a file where the folder was")
    with pytest.raises(StoreError, match="Nothing is lost"):
        commit(store)
    (tmp_path / "remote").unlink()
    (tmp_path / "away").rename(tmp_path / "remote")
    assert Store(tmp_path / "b", url).find(KEY) is None
    assert Store(tmp_path / "a", url).find(KEY) is not None
    assert Store(tmp_path / "b", url).find(KEY) is not None
    assert list((tmp_path / "a" / "pending").iterdir()) == []


def test_a_local_store_that_becomes_a_cache_brings_what_it_has(tmp_path: Path, url: str) -> None:
    digest = commit(Store(tmp_path / "a"))
    with pytest.warns(UserWarning, match="held 1 artifacts and 1 records; they are uploaded"):
        commit(Store(tmp_path / "a", url), OTHER, "b")
    other = Store(tmp_path / "b", url)
    assert other.find(KEY) is not None
    assert (other.path(digest) / "a.txt").read_text() == "a"


# ---------------------------------------------------------------- which store


def test_a_cache_remembers_its_store_and_refuses_another(tmp_path: Path, url: str) -> None:
    commit(Store(tmp_path / "a", url))
    commit(Store(tmp_path / "b", f"{url}2"))
    known = json.loads((tmp_path / "a" / "upstream.json").read_text())
    assert known["url"] == url
    assert json.loads((tmp_path / "remote" / "store.json").read_text())["id"] == known["id"]
    for wrong, found in ((f"{url}2", "there is store "), (f"{url}3", "there is no store yet")):
        with pytest.raises(StoreError, match=f"is the cache of the store {known['id'][:12]} at .*{found}.*not mixed"):
            Store(tmp_path / "a", wrong).find(OTHER)
    assert not (tmp_path / "remote3").exists()
    (tmp_path / "remote").rename(tmp_path / "moved")
    assert Store(tmp_path / "a", f"file://{tmp_path}/moved").find(OTHER) is None  # the same store elsewhere


# ---------------------------------------------------------------- locks, marks


def test_a_lock_is_one_entry_while_it_is_held_and_dead_ones_are_removed(url: str, tmp_path: Path) -> None:
    bucket = Bucket(url)
    locks = RemoteLocks(bucket, ServerClock(bucket))
    entry = tmp_path / "remote" / "locks" / KEY / "dead"
    bucket.write(f"locks/{KEY}/dead", b"{}")
    os.utime(entry, (0, os.stat(entry).st_mtime - 63))
    with locks.held(KEY):
        (name,) = bucket.entries(f"locks/{KEY}")
        assert name != "dead"
        assert json.loads(bucket.read(f"locks/{KEY}/{name}"))["pid"] == os.getpid()
    assert bucket.entries("locks") == {}


def test_of_two_that_wrote_their_entries_neither_takes_the_lock(url: str) -> None:
    bucket = Bucket(url)
    locks = RemoteLocks(bucket, ServerClock(bucket))
    bucket.write(f"locks/{KEY}/other", b"{}")
    assert not locks._try(KEY, "mine")
    bucket.remove([f"locks/{KEY}/other"])
    assert locks._try(KEY, "mine")
    assert list(bucket.entries(f"locks/{KEY}")) == ["mine"]


# ---------------------------------------------------------------- the cache's size


def test_the_least_recently_used_go_first_and_come_back_when_they_are_wanted(tmp_path: Path, url: str) -> None:
    store = Store(tmp_path / "a", url)
    digests = [commit(store, str(n) * 64, str(n) * 10_000) for n in range(4)]
    for age, digest in enumerate((digests[2], digests[0], digests[3], digests[1])):
        os.utime(store.folder(digest), (0, 1000 - age))  # digests[1] was used longest ago, then 3, 0, 2
    size = sum(path.stat().st_size for path in store.folder(digests[0]).iterdir())
    assert evict(store.root, 2.5 * size, keep=lambda name: name == digests[1]) > 1.5 * size
    assert [store.folder(digest).exists() for digest in digests] == [False, True, True, False]
    assert store.find("0" * 64) is not None
    assert (store.path(digests[0]) / "a.txt").read_text() == "0" * 10_000


def test_what_is_owed_in_use_or_newly_used_is_not_evicted(tmp_path: Path, url: str) -> None:
    store = Store(tmp_path / "a", url)
    owed, used, new, old = [commit(store, str(n) * 64, str(n)) for n in range(4)]
    cache = RemoteCache(store.root, url, limit=0.0, grace=100.0)
    cache.owe("object", owed)
    with cache.lock(KEY):
        cache.used(used, store.folder(used))
        for digest in (owed, used, old):
            os.utime(store.folder(digest), (0, 1000))
        cache._grown = None
        cache.evict()
        assert [store.folder(digest).exists() for digest in (owed, used, new, old)] == [True, True, True, False]
    os.utime(store.folder(used), (0, 1000))
    cache._grown = None
    cache.evict()
    assert not store.folder(used).exists()


def test_an_object_that_is_mapped_into_memory_is_known(tmp_path: Path) -> None:
    store = Store(tmp_path / "a")
    digest = commit(store)
    with open(store.path(digest) / "a.txt", "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ):
        assert mapped_digests(store.root) == {digest}
        assert evict(store.root, 0.0, keep=lambda _: False, grace=0.0) == 0
    assert mapped_digests(store.root) == frozenset()
    assert evict(store.root, 0.0, keep=lambda _: False, grace=0.0) > 0


# ---------------------------------------------------------------- errors


class _ServerError(Exception):
    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}}


def test_what_the_next_attempt_cannot_change_is_not_repeated() -> None:
    assert all(passes(_ServerError(code)) for code in ("SlowDown", "InternalError", "503", "RequestTimeout"))
    assert not any(passes(_ServerError(code)) for code in ("ExpiredToken", "AccessDenied", "NoSuchBucket", "400"))
    assert all(passes(error) for error in (ConnectionResetError(), TimeoutError(), OSError(5, "I/O")))
    assert not any(passes(error) for error in (OSError(28, "full"), PermissionError(), ValueError()))
    assert "no such bucket" in complaint(_ServerError("NoSuchBucket"), "s3://b", 1)
    assert "after 4 attempts" in complaint(ConnectionResetError("reset"), "s3://b", 4)


def test_the_pins_of_a_process_are_gone_when_it_ends(tmp_path: Path, url: str) -> None:
    commit(Store(tmp_path / "a", url))
    code = (
        "import sys\nfrom pipeline.remote.store import RemoteStore\n"
        f"remote = RemoteStore({url!r})\nfor digit in '012': remote.pin(digit * 64)\n"
        "import pathlib\nprint(len(list(pathlib.Path(sys.argv[1]).rglob('pins/*/*'))))"
    )
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert said.stdout == "4\n"
    assert not [path for path in (tmp_path / "remote" / "pins").rglob("*") if path.is_file()]


def test_a_live_process_removes_the_pins_of_killed_ones(tmp_path: Path, url: str) -> None:
    dead = tmp_path / "remote" / "pins" / "killed-1-0"
    dead.mkdir(parents=True)
    for name in ("alive", "d" * 64):
        (dead / name).touch()
        os.utime(dead / name, (1.0, 1.0))
    remote = RemoteStore(url, lease_seconds=4.0)
    remote.pin(KEY)
    until(lambda: not any(path.is_file() for path in dead.iterdir()), 30)
    assert remote._pins.of(OTHER) == []
    assert list((tmp_path / "remote" / "pins").glob(f"*/{KEY}"))
