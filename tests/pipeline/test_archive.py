"""Archives: what comes out is what went in, hits included; what was cut, altered or made up leaves nothing behind."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from pipeline.archive import read_archive, write_archive
from pipeline.artifact import Folder
from pipeline.sealing import write_sealed
from pipeline.stage import stage
from pipeline.store import PrunedArtifactError, Store, StoreError, use_store


@stage(version="1")
def make(content: str) -> Folder:
    def fill(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "a.bin").write_text(content * 500)
        (folder / "deep" / "b.bin").write_text(content)

    return Folder.write(fill)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, str], Path]:
    """A store, its digests by what is left of them, and an archive of all, with a run's folder."""
    root = tmp_path_factory.mktemp("origin")
    store, run = Store(root / "store"), root / "runs" / "run-12345678"
    with use_store(store):
        digests = {name: make(name).digest for name in ("whole", "partial", "pruned")}
    store.prune(digests["partial"], ["a.bin"])
    store.prune(digests["pruned"])
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("name: run\n")
    (run / ".lock").write_text("")
    keys = [record["key"] for record in store.actions()]
    file = root / "run.tar"
    assert write_archive(file, store, digests.values(), keys, [run]) == file.stat().st_size
    return store, digests, file


def visible(root: Path) -> list[str]:
    folders = ("store/objects", "store/actions", "runs")
    return sorted(str(path) for name in folders for path in (root / name).rglob("*") if path.is_file())


def test_another_store_has_the_same_artifacts_calls_and_runs_after_an_import(
    origin: tuple[Store, dict[str, str], Path], tmp_path: Path
) -> None:
    _, digests, file = origin
    store = Store(tmp_path / "store")
    taken = read_archive(file, store, tmp_path / "runs")
    assert (taken.objects, taken.new_objects, taken.records, taken.new_records) == (3, 3, 3, 3)
    assert taken.runs == ("run-12345678",)
    assert [path.name for path in (tmp_path / "runs" / "run-12345678").iterdir()] == ["config.yaml"]
    with use_store(store):
        assert {name: make(name).digest for name in digests} == digests  # hits, or `make` would bring the files back
    assert (store.path(digests["whole"]) / "a.bin").read_text() == "whole" * 500
    assert (store.path(digests["partial"]) / "deep" / "b.bin").read_text() == "partial"
    assert store.freed(digests["partial"]) == {"a.bin"}
    with pytest.raises(PrunedArtifactError):
        store.path(digests["pruned"])
    again = read_archive(file, store, tmp_path / "runs")
    assert (again.new_objects, again.new_records, again.runs) == (0, 0, ())


def test_an_import_completes_what_was_pruned_and_takes_nothing_from_what_is_whole(
    origin: tuple[Store, dict[str, str], Path], tmp_path: Path
) -> None:
    _, digests, file = origin
    store = Store(tmp_path / "store")
    with use_store(store):
        make("whole"), make("partial")
    store.prune(digests["whole"])
    assert read_archive(file, store, tmp_path / "runs").new_objects == 2
    assert store.freed(digests["whole"]) == store.freed(digests["partial"]) == frozenset()
    assert (store.path(digests["partial"]) / "a.bin").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_refused_and_leaves_nothing(
    origin: tuple[Store, dict[str, str], Path], tmp_path: Path, share: float
) -> None:
    content = origin[2].read_bytes()
    end = content.rindex(b"index.json") + 600  # zeros follow
    cut = tmp_path / "cut.tar"
    cut.write_bytes(content[: int(share * end)])
    with pytest.raises(StoreError, match=r"cut off|altered"):
        read_archive(cut, Store(tmp_path / "store"), tmp_path / "runs")
    assert visible(tmp_path) == []
    assert list((tmp_path / "store" / "drafts").iterdir()) == []


def test_an_altered_byte_of_any_member_is_found(origin: tuple[Store, dict[str, str], Path], tmp_path: Path) -> None:
    content = bytearray(origin[2].read_bytes())
    store = Store(tmp_path / "store")
    with tarfile.open(origin[2]) as tar:
        places = [(member.name, member.offset_data + member.size // 2) for member in tar if member.size]
    assert len(places) == 13  # 3 payload files, 3 manifests, 2 notes, 3 records, a file of a run, the index
    for name, place in places:
        altered = tmp_path / "altered.tar"
        content[place] ^= 1
        altered.write_bytes(content)
        content[place] ^= 1
        with pytest.raises(StoreError, match="altered"):
            read_archive(altered, store, tmp_path / "runs")
        assert visible(tmp_path) == [], name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../outside", tarfile.REGTYPE),
        ("/etc/outside", tarfile.REGTYPE),
        (f"objects/{'a' * 64}/../../../outside", tarfile.REGTYPE),
        (f"objects/{'a' * 64}/link", tarfile.SYMTYPE),
        (f"objects/{'a' * 64}/link", tarfile.LNKTYPE),
        (f"objects/{'a' * 64}/pipe", tarfile.FIFOTYPE),
        ("runs/x/../../outside", tarfile.REGTYPE),
        ("runs/x/.lock/deep", tarfile.REGTYPE),
        ("store.json", tarfile.REGTYPE),
    ],
)
def test_members_that_no_export_writes_are_refused(tmp_path: Path, name: str, kind: bytes) -> None:
    file = tmp_path / "made_up.tar"
    with tarfile.open(file, "w") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.size = kind, "/etc/passwd", 3 if kind == tarfile.REGTYPE else 0
        tar.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(StoreError, match="refused"):
        read_archive(file, Store(tmp_path / "root" / "store"), tmp_path / "root" / "runs")
    assert visible(tmp_path / "root") == []
    assert not (tmp_path / "outside").exists()


def test_an_index_that_does_not_fit_its_members_is_refused(tmp_path: Path) -> None:
    write_sealed(tmp_path / "index", {"layout": 1, "files": {"runs/x/config.yaml": {"size": 1}}})
    file = tmp_path / "made_up.tar"
    with tarfile.open(file, "w") as tar:
        tar.add(tmp_path / "index", "index.json")
    with pytest.raises(StoreError, match=r"does not hold what its index says \(runs/x/config.yaml\)"):
        read_archive(file, Store(tmp_path / "store"), tmp_path / "runs")
    (tmp_path / "text.tar").write_text("no tar at all" * 100)
    with pytest.raises(StoreError, match="no archive of a store"):
        read_archive(tmp_path / "text.tar", Store(tmp_path / "store"), tmp_path / "runs")


def test_an_export_that_fails_leaves_no_file(origin: tuple[Store, dict[str, str], Path], tmp_path: Path) -> None:
    store = origin[0]
    with pytest.raises(StoreError, match="no artifact"):
        write_archive(tmp_path / "run.tar", store, ["ab" * 32], [], [])
    with pytest.raises(StoreError, match="cannot be written"):
        write_archive(tmp_path / "nowhere" / "run.tar", store, [], [], [])
    assert list(tmp_path.iterdir()) == []
