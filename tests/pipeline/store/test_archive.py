"""Archives: what comes out is what went in, hits included; what was cut, altered or made up leaves nothing behind."""

from __future__ import annotations

import tarfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import Folder
from pipeline.stage import stage
from pipeline.store import PrunedArtifactError, Store, StoreError, archive, use_store
from pipeline.store.archive import read_archive, write_archive
from pipeline.store.files import write_sealed
from pipeline.store.folder import digest_of
from tests.pipeline.calls import call


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


@stage(version="1")
def learn(steps: int) -> Folder:
    return Folder.derived(Folder.write_derived(lambda folder: (folder / "weights").write_text(str(steps)) and None))


def test_trained_state_is_a_hit_under_its_name_after_an_import(tmp_path: Path) -> None:
    store, file = Store(tmp_path / "one"), tmp_path / "trained.tar"
    with use_store(store):
        made = learn(3)
    write_archive(file, store, [made.digest], [made.digest], [])
    other = Store(tmp_path / "other")
    read_archive(file, other, tmp_path / "runs")
    assert other.find(made.digest) is not None
    assert (other.path(made.digest) / "weights").read_text() == "3"
    assert other.manifest(made.digest)["digest"] == store.manifest(made.digest)["digest"] != made.digest


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


def test_an_import_completes_what_was_pruned_and_keeps_what_is_whole(
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


def test_a_file_of_a_run_that_grows_during_the_export_is_taken_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, log = tmp_path / "runs" / "live", tmp_path / "runs" / "live" / "events.jsonl"
    run.mkdir(parents=True)
    log.write_text("first\n")
    plain = archive.measure

    def appended(path: Path) -> Any:
        with open(log, "a") as handle:
            handle.write("next\n")
        return plain(path)

    monkeypatch.setattr(archive, "measure", appended)
    write_archive(tmp_path / "run.tar", Store(tmp_path / "store"), [], [], [run])
    monkeypatch.undo()
    read_archive(tmp_path / "run.tar", Store(tmp_path / "other"), tmp_path / "copy")
    assert (tmp_path / "copy" / "live" / "events.jsonl").read_text() == "first\n"


# ------------------------------------------------------------------------------------------------ made up by hand

KEY, DIGEST = "a" * 64, "d" * 64
Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, content: bytes = b"abc", **changes: Any) -> Member:
    """A member whose header may say something else than its content; `pax` are its extended headers."""
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = len(content), changes.pop("pax", {})
    for field, value in changes.items():
        setattr(info, field, value)
    return info, content


def sealed(value: dict[str, Any], folder: Path) -> bytes:
    write_sealed(folder / "sealed", value)
    content = (folder / "sealed").read_bytes()
    (folder / "sealed").unlink()
    return content


def made_up(folder: Path, *members: Member, files: Any = None) -> Path:
    """An archive of these members with an index that fits them, or says `files`."""
    named = {info.name: {"size": info.size, "sha256": sha256(content).hexdigest()} for info, content in members}
    index = sealed({"layout": 1, "files": named if files is None else files}, folder)
    with tarfile.open(folder / "made_up.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in [*members, member("index.json", index)]:
            header = info.tobuf(tarfile.PAX_FORMAT)
            tar.fileobj.write(header + content + bytes(-len(content) % 512))  # type: ignore[union-attr]
            tar.offset += len(header) + len(content) + -len(content) % 512
    return folder / "made_up.tar"


def refused(tmp_path: Path, *members: Member, files: Any = None, match: str = "refused") -> None:
    """Check that nothing of such an archive comes in, and that no draft was filled on the way."""
    archive, store = made_up(tmp_path, *members, files=files), Store(tmp_path / "root" / "store")
    with pytest.raises(StoreError, match=match):
        read_archive(archive, store, tmp_path / "root" / "runs")
    assert visible(tmp_path / "root") == []
    assert list((store.root / "drafts").iterdir()) == []


def test_an_archive_made_by_hand_is_read_like_one_of_a_store(tmp_path: Path) -> None:
    """Else the refusals below would show nothing."""
    archive = made_up(tmp_path, member("runs/x/config.yaml"))
    assert read_archive(archive, Store(tmp_path / "store"), tmp_path / "runs").runs == ("x",)
    assert (tmp_path / "runs" / "x" / "config.yaml").read_bytes() == b"abc"


SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "runs/x/big"}


@pytest.mark.parametrize(
    ("hostile", "match"),
    [
        (
            member(
                "runs/x/big", b"1\n0\n1\n".ljust(512, b"\0"), pax={**SPARSE, "GNU.sparse.realsize": f"{50 * 10**9}"}
            ),
            "refused",
        ),
        (member("runs/x/big", type=tarfile.GNUTYPE_SPARSE), "refused|no archive"),
        (member("runs/x/big", size=50 * 10**9), "cut off"),
        (member("runs/x/pipe", b"", type=tarfile.FIFOTYPE), "refused"),
        (member("runs/x/device", b"", type=tarfile.CHRTYPE), "refused"),
        (member("runs/x/link", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "refused"),
        (member("runs/x/link", b"", type=tarfile.LNKTYPE, linkname="index.json"), "refused"),
        (member("runs/x/folder", b"", type=tarfile.DIRTYPE), "refused"),
        (member("runs/x/a\nb"), "refused"),
        (member("runs/x/\x1b[2Jb"), "refused"),
        (member("runs/x/a", pax={"path": "runs/x/a\0b"}), "refused"),
        (member("runs/x/a", pax={"path": "/runs/x/a"}), "refused"),
        (member("runs/x/.lock"), "refused"),
        (member("runs/../x/a"), "refused"),
        (member("runs/X/a"), "refused"),
        (member("actions/../a.json"), "refused"),
        (member(f"objects/{DIGEST.upper()}/a"), "refused"),
        (member(f"objects/{DIGEST}/a\\b"), "refused"),
        (member(f"objects/{DIGEST}/./a"), "refused"),
        (member(f"objects/{DIGEST}/../../../outside"), "refused"),
        (member(f"objects/{DIGEST}/link", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "refused"),
        (member("../outside"), "refused"),
        (member("/etc/outside"), "refused"),
        (member("runs/x/.lock/deep"), "refused"),
        (member("store.json"), "refused"),
    ],
    ids=lambda value: repr(value[0].name)[:30] if isinstance(value, tuple) else None,
)
def test_a_member_that_no_export_writes_is_refused_before_any_is_written(
    tmp_path: Path, hostile: Member, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tarfile.TarFile, "extract", lambda *_, **__: pytest.fail("something was written"))
    refused(tmp_path, member("runs/x/config.yaml"), hostile, match=match)


@pytest.mark.parametrize(
    "files",
    [
        [],
        "runs/x/a",
        {"runs/x/a": {"size": 4}},
        {"runs/x/a": {"size": 3}},
        {"runs/x/a": {"size": "3"}},
        {"runs/x/a": 3},
        {"runs/x/a": None},
        {"runs/x/a": {"size": 3}, "runs/x/b": {"size": 3}},
        {},
    ],
)
def test_an_index_of_wrong_types_or_sizes_is_refused(tmp_path: Path, files: Any) -> None:
    refused(
        tmp_path, member("runs/x/a"), files=files, match=r"names no files|altered|does not hold what its index says"
    )


BAD_RECORDS: dict[str, dict[str, Any]] = {
    "outside": {"result": "../../../victim"},
    "number": {"result": 5},
    "line": {"result": DIGEST + "\n"},
    "other key": {"key": DIGEST},
    "no number": {"seconds": None},
    "argument": {"arguments": {"policy": {"artifact": "../../../victim"}}},
    "escape": {"stage": "\x1b]0;owned\x07"},
    **{f"without {field}": {field: ...} for field in call(DIGEST)},
}


@pytest.mark.parametrize("change", BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_record_is_refused_with_the_whole_archive(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "victim").mkdir()
    record = {name: value for name, value in ({"key": KEY, **call(DIGEST)} | change).items() if value is not ...}
    place = "record aaaaaaaaaaaa in made_up.tar"
    expected = place if ... not in change.values() else rf"{place} is no record of a call \({next(iter(change))}:"
    refused(tmp_path, member(f"actions/{KEY}.json", sealed(record, tmp_path)), match=expected)
    assert (tmp_path / "victim").is_dir()


def test_an_artifact_with_a_file_that_its_manifest_does_not_name_is_refused(tmp_path: Path) -> None:
    files = [{"name": "a", "size": 3, "sha256": sha256(b"abc").hexdigest()}]
    digest = digest_of(files, None)
    manifest = sealed({"digest": digest, "files": files, "schema": None, "type": "Folder"}, tmp_path)
    sound = [member(f"objects/{digest}/a"), member(f"objects/{digest}/manifest.json", manifest)]
    for name in (".hidden.py", "code.py", "deep/.x"):
        refused(tmp_path, *sound, member(f"objects/{digest}/{name}"), match=r"not part of it|does not belong")
    store = Store(tmp_path / "sound")
    assert read_archive(made_up(tmp_path, *sound), store, tmp_path / "runs").new_objects == 1


def test_a_run_that_its_reader_does_not_know_is_refused(tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        if (folder / "record.json").read_bytes() == b"abc":
            raise ValueError("record.json: no record of a run")

    store = Store(tmp_path / "root" / "store")
    with pytest.raises(StoreError, match=r"the run x in made_up\.tar .* no record of a run"):
        read_archive(made_up(tmp_path, member("runs/x/record.json")), store, tmp_path / "root" / "runs", check=check)
    assert visible(tmp_path / "root") == []


def test_records_say_which_archive_brought_them(origin: tuple[Store, dict[str, str], Path], tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    taken = read_archive(origin[2], store, tmp_path / "runs")
    assert taken.stages == {"make": 3}
    assert {record["imported"] for record in store.actions()} == {"run.tar"}
    assert "imported" not in next(iter(origin[0].actions()))
