"""Records, manifests and notes that others wrote: a name in them is no path, and a wrong type is damage, not an accident."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.artifact import ArtifactError
from pipeline.diff import read_rows, stored_tensors
from pipeline.store import DamagedArtifactError, MissingArtifactError, Store, StoreError
from pipeline.store.files import is_plain_name, sha256_of, write_sealed
from pipeline.store.folder import digest_of
from pipeline.store.locks import locked
from pipeline.tracking.records import Sent
from tests.pipeline.calls import call

KEY, SOUND = "a" * 64, "b" * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "precious.txt").write_text("precious")
    return Store(tmp_path / "store")


@pytest.fixture
def digest(store: Store) -> str:
    def fill(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "a.txt").write_text("a")
        (folder / "b.txt").write_text("b")

    return store.publish(fill, about={"type": "Folder"})


def precious(store: Store) -> str:
    return (store.root.parent / "victim" / "precious.txt").read_text()


def plant(store: Store, record: dict[str, Any]) -> None:
    """Put a well-sealed record where that of KEY lies."""
    path = store.root / "actions" / KEY[:2] / f"{KEY}.json"
    path.parent.mkdir(exist_ok=True)
    write_sealed(path, {"key": KEY, **record})


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


OUTSIDE = [
    "../../../victim",
    "/victim",
    "..",
    "",
    "a" * 63,
    "A" * 64,
    f"{'a' * 64}\n",
    f"{'a' * 63}/",
    5,
    None,
    ["a" * 64],
]
WRONG = [
    *({"result": name} for name in OUTSIDE),
    *({"arguments": {"policy": {"artifact": name}}} for name in OUTSIDE),
    {"arguments": {"models": [{"inner": {"artifact": "../victim"}}]}},
    {"arguments": ["policy"]},
    {"arguments": nested(400)},
    *({"seconds": value} for value in ("1", None, True, -1.0, 1e300)),
    *({"created": value} for value in ("now", -1, 1e18, {})),
    *({"stage": value} for value in (None, 3, "a\x1b[2J", "a\nb", "\u202e", "s" * 301)),
    {"version": 2},
    {"type": ["Folder"]},
    *({"metrics": value} for value in ({"loss": "0"}, {"loss": None}, {"a\x07": 1.0}, [1.0])),
    {"packages": {"torch": 2}},
    {"key": SOUND},
]


@pytest.mark.parametrize("change", WRONG, ids=lambda change: repr(change)[:40])
def test_a_record_of_wrong_names_or_types_is_a_miss_and_touches_nothing(
    store: Store, digest: str, change: dict[str, Any]
) -> None:
    store.record(SOUND, call(digest))
    plant(store, call(digest) | change)
    with pytest.raises(DamagedArtifactError, match=KEY):
        store.action(KEY)
    assert [record["key"] for record in store.actions()] == [SOUND]
    with pytest.warns(UserWarning, match="computing it again"):
        assert store.find(KEY) is None
    assert precious(store) == "precious"
    assert store.find(SOUND) is not None


@pytest.mark.parametrize("field", ["result", "stage", "version", "type", "arguments", "seconds", "created"])
def test_a_record_without_a_field_is_damaged(store: Store, digest: str, field: str) -> None:
    record = call(digest)
    del record[field]
    plant(store, record)
    with pytest.raises(DamagedArtifactError, match=rf"\({field}: "):
        store.action(KEY)


@pytest.mark.parametrize("name", [name for name in OUTSIDE if isinstance(name, str)])
@pytest.mark.parametrize("use", ["folder", "path", "manifest", "verify", "prune", "freed", "quarantine", "action"])
def test_no_call_of_a_store_makes_a_path_of_what_is_no_digest(store: Store, name: str, use: str) -> None:
    function: Callable[[str], object] = getattr(store, use)
    with pytest.raises(MissingArtifactError, match="expected 64 hexadecimal digits"):
        function(name)
    assert precious(store) == "precious"


# ------------------------------------------------------------------------------------------------ manifests, notes, links


FILE = {"name": "a.txt", "size": 1, "sha256": sha256_of("a")}
MANIFESTS: list[dict[str, Any]] = [
    *({"files": [FILE | {"name": name}]} for name in ("../../../../victim/precious.txt", "/etc/passwd", "..\\b", ".")),
    *(
        {"files": [FILE | {"name": name}]}
        for name in ("a\x00b", "a\nb", "./a.txt", "a//b", "manifest.json", "pruned.json")
    ),
    {"files": [FILE, FILE]},
    {"files": [FILE | {"size": -1}]},
    {"files": [FILE | {"size": "1"}]},
    {"files": [FILE | {"sha256": "no"}]},
    {"files": [{"name": "a.txt"}]},
    {"files": "a.txt"},
    {"files": None},
    {"schema": 5},
    {"type": None},
    {"type": "\x1b[31m"},
    {"rows": "many"},
    {"provenance": {"metrics": {"loss": "low"}}},
    {"provenance": {"arguments": {"policy": {"artifact": "../x"}}}},
    {"provenance": []},
]


@pytest.mark.parametrize("change", MANIFESTS, ids=lambda change: repr(change)[:60])
def test_a_manifest_of_wrong_names_or_types_is_damaged(store: Store, change: dict[str, Any]) -> None:
    manifest = {"files": [FILE], "schema": None, "type": "Folder"} | change
    digest = digest_of(manifest["files"], manifest["schema"])
    folder = store.root / "objects" / digest[:2] / digest
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    write_sealed(folder / "manifest.json", {**manifest, "digest": digest})
    for use in (store.manifest, store.path, store.prune):
        with pytest.raises(DamagedArtifactError, match="does not describe"):
            use(digest)
    assert precious(store) == "precious"


@pytest.mark.parametrize(
    "freed",
    [["../../../../victim/precious.txt"], ["b.txt", "manifest.json"], ["other.txt"], [5], "b.txt", None, [["b.txt"]]],
)
def test_a_note_of_what_was_freed_frees_nothing_but_the_payload(store: Store, digest: str, freed: Any) -> None:
    write_sealed(store.folder(digest) / "pruned.json", {"digest": digest, "files": freed, "pruned": 1.0})
    for use in (store.prune, store.freed, store.path):
        with pytest.raises(DamagedArtifactError, match=r"pruned\.json"):
            use(digest)
    assert precious(store) == "precious"
    assert (store.folder(digest) / "b.txt").exists()


@pytest.mark.parametrize("name", ["b.txt", "deep/a.txt", "deep", "manifest.json", "."])
def test_a_link_in_the_place_of_payload_is_damage_and_is_not_followed(store: Store, digest: str, name: str) -> None:
    folder, elsewhere = store.folder(digest), store.root.parent / "elsewhere"
    place = folder if name == "." else folder / name
    place.rename(elsewhere)
    place.symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    fresh = Store(store.root)
    for use in (fresh.path, fresh.verify):
        with pytest.raises(DamagedArtifactError):
            use(digest)
    with contextlib.suppress(DamagedArtifactError):
        fresh.prune(digest)
    assert elsewhere.exists()
    assert sorted(elsewhere.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("a", True),
        ("a/b.c", True),
        ("数.txt", True),
        ("a" * 255, True),
        ("a" * 256, False),
        ("", False),
        (".", False),
        ("a/", False),
        ("/a", False),
        ("a//b", False),
        ("a/./b", False),
        ("a/../b", False),
        ("..", False),
        ("a\\b", False),
        ("a\x00", False),
        ("a\n", False),
        ("\x1b[2J", False),
        ("a\u202eb", False),
        ("a\ud800", False),
        (5, False),
        (None, False),
    ],
)
def test_a_plain_name_stays_in_its_folder_and_can_be_seen(name: object, plain: bool) -> None:
    assert is_plain_name(name) is plain


# ------------------------------------------------------------------------------------------------ pins, cursors


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{}",
        "no JSON",
        '{"run": "\\u001b[2J", "host": "h", "pid": 1, "started": 1.0}',
        '{"run": "r", "host": "h", "pid": "1", "started": 1.0}',
        '{"run": "r", "host": "h", "pid": 1, "started": NaN}',
        "[" * 9999,
        "\udc80",
    ],
)
def test_a_file_of_pins_of_another_shape_is_left_out_once_its_run_is_dead(store: Store, digest: str, line: str) -> None:
    (store.root / "pins").mkdir()
    (store.root / "pins" / "bad.1").write_bytes(f"{line}\n+{digest}\n".encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning, match=r"left out: .*bad\.1 is no file of pins"):
        assert store.pins.remains() == {}
    with locked(store.root / "pins" / "bad.1"), pytest.raises(StoreError, match="is no file of pins"):
        store.pins.require_unpinned(digest)  # what a live run needs is unknown


def test_pins_are_digests_and_nothing_else(store: Store, digest: str) -> None:
    (store.root / "pins").mkdir()
    about = json.dumps({"run": "r", "host": "h", "pid": 1, "started": 1.0})
    (store.root / "pins" / "r.1").write_text(f"{about}\n+../../victim\n+{digest}\n\n-\n+{'A' * 64}\n")
    assert store.pins.remains() == {"r": {digest}}


@pytest.mark.parametrize(
    "text",
    [
        *(
            "[]",
            "5",
            '{"number": -1}',
            '{"size": "0"}',
            '{"size": -1}',
            '{"run_id": 5}',
            '{"tried": null}',
            '{"more": 1}',
        ),
        *('{"database": 1.5}', '{"error": []}', '{"hashes": []}', "{", "[" * 9999, "\x00"),
    ],
)
def test_a_cursor_of_another_shape_means_that_nothing_was_sent(tmp_path: Path, text: str) -> None:
    (tmp_path / ".mlflow.json").write_text(text)
    assert Sent.read(tmp_path) == Sent()
    sent = Sent("sqlite:///x", 5, "r", 7, 900, "FINISHED", "", 2.5, {"run/r": "ab"})
    sent.write(tmp_path)
    assert Sent.read(tmp_path) == sent


# ------------------------------------------------------------------------------------------------ a shared store


@pytest.mark.parametrize("change", WRONG[:4] + WRONG[-1:] + [{"seconds": None}], ids=lambda change: repr(change)[:40])
def test_a_record_in_a_shared_store_is_read_as_warily(tmp_path: Path, store: Store, change: dict[str, Any]) -> None:
    url = f"file://{tmp_path}/shared"
    one = Store(tmp_path / "one", url)
    made = one.publish(lambda folder: (folder / "a").touch(), about={"type": "Folder"})
    one.record(KEY, call(made))
    shared = tmp_path / "shared" / "actions" / KEY[:2] / f"{KEY}.json"
    shared.unlink()
    write_sealed(shared, {"key": KEY, **call(made), **change})
    two = Store(tmp_path / "two", url)
    assert list(two.actions()) == []
    with pytest.warns(UserWarning, match="computing it again"):
        assert two.find(KEY) is None
    assert precious(store) == "precious"


@pytest.mark.parametrize("identity", ["../x", "\x1b[2J", "", 5, None, {"a": 1}])
def test_the_name_of_a_shared_store_is_32_digits(tmp_path: Path, identity: object) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "store.json").write_text(json.dumps({"id": identity, "layout": 1}))
    with pytest.raises(StoreError, match=r"store\.json is not that of a store"):
        Store(tmp_path / "one", f"file://{tmp_path}/shared").find(KEY)


# ------------------------------------------------------------------------------------------------ payload


def test_a_table_whose_offsets_lead_out_of_its_buffers_is_refused(store: Store) -> None:
    """Its hash is sound: its writer meant it. Reading the text would read other memory, or end the process."""
    offsets = pa.array([0, 2**30, 1, 3], pa.int32()).buffers()[1]
    text = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"abc")])

    def fill(folder: Path) -> None:
        batch = pa.record_batch([text], names=["text"])
        with pa.OSFile(str(folder / "table.arrow"), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)

    made = store.publish(fill, about={"type": "Table"})
    with pytest.raises(ArtifactError, match="not a readable Arrow file"):
        read_rows(store, made)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (2**62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (99).to_bytes(8, "little") + json.dumps({"w": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}).encode(),
        (30).to_bytes(8, "little") + json.dumps({"w": {"dtype": "F32", "shape": [-1]}}).encode(),
        (5000).to_bytes(8, "little") + b"[" * 5000,
    ],
)
def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: no safetensors file"):
        stored_tensors(tmp_path)
