"""Trained state of which only the description is written: a name, a hit, and bytes when somebody reads them."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.artifact import Folder, Table
from pipeline.derivation.materialise import materialise, write_payload
from pipeline.residency import evict, resident
from pipeline.stage import stage
from pipeline.store import DamagedArtifactError, PrunedArtifactError, Store, current_store, use_store
from pipeline.store.archive import read_archive, write_archive
from pipeline.store.context import payloads, writing_payloads

pytestmark = pytest.mark.filterwarnings("ignore:.* is not there .* replaying", "ignore:.*computing it again")
ran: list[int] = []


class Numbers(Table):
    schema = pa.schema([pa.field("x", pa.int64(), nullable=False)])


class Weights(Folder):
    """What a training makes."""


class Engine:
    """Holds what was trained last."""

    def __init__(self) -> None:
        self.holds: str | None = None
        self.text = ""

    def fill(self, folder: Path) -> None:
        describe(folder)
        (folder / "weights").write_text(self.text)

    def has(self, state: str) -> bool:
        return self.holds == state

    def write(self, name: str) -> None:
        write_payload(current_store(), name, self.fill)


def describe(folder: Path) -> None:
    (folder / "description").write_text("a model")


@stage(version="1")
def draw(step: int) -> Numbers:
    return Numbers.write([{"x": step}])


@stage(version="1")
def learn(weights: Weights | None, numbers: Numbers) -> Weights:
    engine = resident("engine", None, Engine)
    if weights is not None and engine.holds != weights.state:
        engine.text = (weights.path / "weights").read_text()
    elif weights is None:
        engine.text = ""
    (number,) = (row["x"] for row in numbers.rows())
    ran.append(number)
    engine.text += str(number)
    written = payloads() == "now"
    engine.holds = (
        Weights.write_derived(engine.fill)
        if written
        else Weights.write_description(describe, ["weights", "more/state"])
    )
    return Weights.derived(engine.holds)


@pytest.fixture(autouse=True)
def replaying(store: Store) -> Store:
    store.replay = functools.partial(materialise, store)
    ran.clear()
    return store


def chain(length: int, *, written: tuple[int, ...] = (1,)) -> list[Weights]:
    """Steps 1, 2, ... of a training; these are written."""
    made: list[Weights] = []
    for step in range(1, length + 1):
        with writing_payloads("now" if step in written else "never"):
            made.append(learn(made[-1] if made else None, draw(step)))
    ran.clear()
    return made


def text(weights: Weights) -> str:
    return (weights.path / "weights").read_text()


def written(made: list[Weights]) -> list[int]:
    return [step for step, weights in enumerate(made, 1) if weights.content is not None]


def archive(store: Store, file: Path) -> None:
    write_archive(file, store, store.digests(), [record["key"] for record in store.actions()], [])


def test_what_an_engine_holds_is_written_from_there(replaying: Store) -> None:
    made = chain(4)
    assert written(made) == [1]
    state = made[3].state
    assert text(made[3]) == "1234"
    assert (ran, written(made)) == ([], [1, 4])
    assert made[3].state == state, "engines that hold it need not load it"
    assert replaying.action(made[3].digest)["content"] == made[3].content
    assert (made[3].path / "description").read_text() == "a model"


def test_what_no_engine_holds_is_replayed_from_the_last_that_was_written() -> None:
    made = chain(6, written=(1, 3))
    assert text(made[4]) == "12345"
    assert ran == [4, 5]
    assert written(made) == [1, 3, 5], "those on the way stay unwritten"
    assert made[4].content == chain(5, written=(5,))[4].content


def test_it_has_the_name_and_the_content_of_one_that_is_written(tmp_path: Path) -> None:
    made = chain(3)
    with use_store(Store(tmp_path / "other")):
        evict()
        other = chain(3, written=(1, 2, 3))
        contents = [weights.content for weights in other]
    assert [weights.digest for weights in made] == [weights.digest for weights in other]
    evict()
    for weights in made:
        text(weights)
    assert [weights.content for weights in made] == contents


def test_two_stores_of_one_process_hold_states_of_their_own(replaying: Store, tmp_path: Path) -> None:
    made = chain(2)
    state = made[1].state
    with use_store(Store(tmp_path / "other")) as other:
        other.replay = functools.partial(materialise, other)
        again = chain(2)
        assert made[1].digest == again[1].digest
        assert text(again[1]) == "12"
        assert state != again[1].state
    assert text(made[1]) == "12"
    assert ran == [2], "the engine had gone on to the other store's"


def test_its_description_is_read_without_anything_else() -> None:
    made = chain(3)
    evict()
    assert (made[2].described / "description").read_text() == "a model"
    assert ran == []
    assert not (made[2].described / "weights").exists()


def test_a_store_that_does_not_replay_says_that_it_was_not_written(replaying: Store) -> None:
    made = chain(2)
    replaying.replay = None
    with pytest.raises(PrunedArtifactError, match=f"{made[1].digest[:12]} was not written"):
        _ = made[1].path
    assert (made[1].described / "description").exists()


def test_it_is_a_hit_for_this_and_for_later_processes(replaying: Store) -> None:
    made = chain(3)
    chain(3)
    assert ran == []
    with use_store(Store(replaying.root)):
        assert [weights.digest for weights in chain(3)] == [weights.digest for weights in made]
    assert ran == []


def test_it_is_a_hit_where_not_even_the_description_is_there(replaying: Store) -> None:
    made = chain(4)
    evict()
    shutil.rmtree(replaying.folder(made[2].digest))
    assert [weights.digest for weights in chain(4)] == [weights.digest for weights in made]
    assert ran == []
    assert (made[2].described / "description").exists()
    assert ran == [2, 3]


@pytest.mark.parametrize("instant", ["before the manifest", "before any file"])
def test_a_crash_while_it_is_completed_leaves_it_unwritten(
    replaying: Store, monkeypatch: pytest.MonkeyPatch, instant: str
) -> None:
    made = chain(2)
    folder, replace = replaying.folder(made[1].digest), os.replace

    def crash(source: Path, target: Path) -> None:
        first = "manifest.json" if instant == "before the manifest" else "weights"
        if Path(target) == folder / first:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        _ = made[1].path
    monkeypatch.setattr(os, "replace", replace)
    fresh = Store(replaying.root)
    fresh.verify(made[1].digest)
    assert not fresh.is_written(made[1].digest)
    evict()
    assert text(made[1]) == "12"
    assert (ran, written(made)) == ([2], [1, 2])


def test_a_file_that_it_never_named_is_damage(replaying: Store) -> None:
    made = chain(2)
    folder = replaying.folder(made[1].digest)
    (folder / "weights").write_text("not trusted: it is not in the manifest")
    replaying.verify(made[1].digest)
    evict()
    assert text(made[1]) == "12"
    (folder / "surplus").write_text("x")
    with pytest.raises(DamagedArtifactError, match="surplus does not belong"):
        replaying.verify(made[1].digest)


def test_it_comes_out_of_an_archive_as_it_went_in(replaying: Store, tmp_path: Path) -> None:
    made = chain(3)
    evict()
    archive(replaying, tmp_path / "x.tar")
    with use_store(Store(tmp_path / "other")) as other:
        other.replay = functools.partial(materialise, other)
        read_archive(tmp_path / "x.tar", other, tmp_path / "runs")
        assert written(made) == [1]
        assert text(made[2]) == "123"
    assert ran == [2, 3]


def test_an_archive_completes_what_is_unwritten_here(replaying: Store, tmp_path: Path) -> None:
    with use_store(Store(tmp_path / "other")) as other:
        whole = chain(2, written=(1, 2))
        archive(other, tmp_path / "x.tar")
    evict()
    made = chain(2)
    evict()
    read_archive(tmp_path / "x.tar", replaying, tmp_path / "runs")
    assert whole[1].digest == made[1].digest
    assert (text(made[1]), ran) == ("12", [])


def test_a_remote_store_gets_what_was_written_and_others_replay_the_rest(tmp_path: Path) -> None:
    remote = f"file://{tmp_path}/remote"
    with use_store(Store(tmp_path / "one", remote)):
        made = chain(4, written=(1, 3))
    evict()
    with use_store(Store(tmp_path / "two", remote)) as other:
        other.replay = functools.partial(materialise, other)
        assert [weights.digest for weights in chain(4)] == [weights.digest for weights in made]
        assert (text(made[3]), ran) == ("1234", [4])
        assert text(made[2]) == "123"
    assert ran == [4], "the third was fetched"
