"""Trained state whose bytes are gone is made again from what is in the store, and says so."""

from __future__ import annotations

import functools
import shutil
import warnings
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pytest

from pipeline import stage as stage_module
from pipeline.artifact import Folder, Table
from pipeline.config import UNKEYED, Config
from pipeline.derivation.materialise import ReplayError, calls_to_replay, materialise
from pipeline.events import Event, recording
from pipeline.progress import listen
from pipeline.stage import record_metrics, stage
from pipeline.store import PrunedArtifactError, Store, use_store
from pipeline.store.context import current_call

pytestmark = pytest.mark.filterwarnings("ignore:.* is not there .* replaying", "ignore:.*computing it again")
ran: list[int] = []
bits = {"noise": "", "fails at": "", "remedy": ""}
"""Changed, `noise` imitates hardware without a fixed order of sums, and `remedy` names what is done about it."""


class Numbers(Table):
    schema = pa.schema([pa.field("x", pa.int64(), nullable=False)])


class Weights(Folder):
    """What a training makes."""


class Learning(Config):
    rate: float = 0.5
    """How fast."""
    workers: Annotated[int, UNKEYED] = 1
    """Cannot change what is learned."""


workers: list[int] = []


@stage(version="1")
def draw(step: int) -> Numbers:
    return Numbers.write([{"x": step}])


@stage(version="1")
def learn(weights: Weights | None, numbers: Numbers, config: Learning) -> Weights:
    before = "" if weights is None else (weights.path / "weights").read_text() + (weights.path / "state").read_text()
    (number,) = (row["x"] for row in numbers.rows())
    if str(number) == bits["fails at"]:
        raise RuntimeError(f"power cut at {number}")
    ran.append(number)
    workers.append(config.workers)
    record_metrics({"learned": number})
    if (call := current_call()) is not None:
        call.remedy = bits["remedy"]

    def fill(folder: Path) -> None:
        (folder / "weights").write_text(f"{before}{number}{bits['noise']}")
        (folder / "state").write_text(f"{config.rate};")

    return Weights.derived(Weights.write_derived(fill))


@pytest.fixture
def replaying(store: Store) -> Store:
    store.replay = functools.partial(materialise, store)
    return store


def chain(length: int, **settings: Any) -> list[Weights]:
    """Steps 1, 2, ... of a training."""
    made: list[Weights] = []
    for step in range(1, length + 1):
        made.append(learn(made[-1] if made else None, draw(step), Learning(**settings)))
    ran.clear()
    workers.clear()
    return made


def freed(store: Store, made: list[Weights]) -> list[int]:
    """The steps of which something was freed."""
    return [step for step, weights in enumerate(made, 1) if store.freed(weights.digest)]


def test_what_was_freed_is_replayed_from_the_nearest_that_has_its_bytes(replaying: Store) -> None:
    made = chain(6)
    contents, text = [weights.content for weights in made], (made[4].path / "weights").read_text()
    for weights in made[2:5]:
        replaying.prune(weights.digest)
    with pytest.warns(UserWarning, match=rf"{made[4].digest[:12]} is not there .*: replaying 3 x learn"):
        assert (made[4].path / "weights").read_text() == text
    assert ran == [3, 4, 5]
    assert freed(replaying, made) == [3, 4], "those on the way are freed again"
    assert [weights.content for weights in made] == contents


def test_files_that_were_freed_come_back_and_those_on_the_way_go_again(replaying: Store) -> None:
    made = chain(3)
    for weights in made[1:]:
        replaying.prune(weights.digest, ["state"])
    assert (made[2].path / "weights").exists()
    assert ran == [], "what is read was there"
    assert replaying.make_whole(made[2].digest)
    assert ran == [2, 3]
    assert (made[2].path / "state").read_text() == "0.5;"
    assert replaying.freed(made[1].digest) == {"state"}


@pytest.mark.parametrize("damage", ["deleted", "altered"])
def test_what_is_lost_or_damaged_is_replayed(replaying: Store, damage: str) -> None:
    made = chain(3)
    folder, text = made[1].path, (made[1].path / "weights").read_text()
    if damage == "deleted":
        shutil.rmtree(folder)
    else:
        (folder / "weights").chmod(0o644)
        (folder / "weights").write_text("other")
    assert (made[1].path / "weights").read_text() == text
    assert ran == [2]


def test_a_stage_that_reads_a_freed_input_gets_it(replaying: Store) -> None:
    made = chain(3)
    expected = learn(made[2], draw(9), Learning()).content
    replaying.prune(made[2].digest)
    replaying.forget(learn(made[2], draw(9), Learning()).digest)
    ran.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*made again with other content")
        assert learn(made[2], draw(9), Learning()).content == expected
    assert ran == [3, 9]


def test_a_whole_chain_is_replayed_from_its_data_without_recursion(replaying: Store) -> None:
    made = chain(120)
    text = (made[-1].path / "weights").read_text()
    for weights in made:
        replaying.prune(weights.digest)
    assert len(calls_to_replay(replaying, made[-1].digest)) == 120
    assert (made[-1].path / "weights").read_text() == text
    assert ran == list(range(1, 121))


def test_data_that_is_gone_is_named_and_nothing_is_touched(replaying: Store) -> None:
    made = chain(3)
    numbers = draw(2)
    for digest in (made[1].digest, made[2].digest, numbers.digest):
        replaying.prune(digest)
    with pytest.raises(
        ReplayError, match=rf"nothing to replay {made[2].digest[:12]} from: {numbers.digest[:12]}, which"
    ):
        _ = made[2].path
    assert ran == []
    assert freed(replaying, made) == [2, 3]


def test_data_is_not_replayed(replaying: Store) -> None:
    numbers = draw(1)
    replaying.prune(numbers.digest)
    with pytest.raises(PrunedArtifactError):
        numbers.rows()


def test_a_store_that_does_not_replay_says_that_it_was_freed(store: Store) -> None:
    made = chain(2)
    store.prune(made[1].digest)
    with pytest.raises(PrunedArtifactError):
        _ = made[1].path


def test_bits_that_differ_are_a_warning_and_stay_in_the_record(
    replaying: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = chain(2)
    before, record = made[1].content, replaying.action(made[1].digest)
    replaying.prune(made[1].digest)
    monkeypatch.setitem(bits, "noise", "~")
    with pytest.warns(UserWarning, match=rf"made again with other content, .* in place of {before}"):
        assert (made[1].path / "weights").read_text().endswith("~")
    after = replaying.action(made[1].digest)
    assert after == record | {"content": made[1].content, "earlier": [before]}
    assert made[1].content != before


@pytest.mark.parametrize(("remedy", "said"), [("", r"\(deterministic arithmetic"), ("turn it off", r"\(turn it off\)")])
def test_bits_that_differ_name_the_remedy_that_the_call_knows(
    replaying: Store, monkeypatch: pytest.MonkeyPatch, remedy: str, said: str
) -> None:
    made = chain(2)
    replaying.prune(made[1].digest)
    monkeypatch.setitem(bits, "noise", "~")
    monkeypatch.setitem(bits, "remedy", remedy)
    with pytest.warns(UserWarning, match=rf"made again with other content, .*{said}"):
        _ = made[1].path


def test_settings_outside_the_key_are_never_a_records(replaying: Store) -> None:
    made = chain(2, workers=3, rate=0.25)
    replaying.prune(made[1].digest)
    record = replaying.action(made[1].digest)
    assert record["replay"]["arguments"]["config"] == {"config": {"rate": 0.25}, "class": "Learning"}
    _ = made[1].path
    assert workers == [1], "the default"


def test_what_came_back_goes_again_when_a_replay_is_cut_short(
    replaying: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = chain(5)
    for weights in made[1:]:
        replaying.prune(weights.digest)
    monkeypatch.setitem(bits, "fails at", "4")
    with pytest.raises(RuntimeError, match="power cut at 4"):
        _ = made[4].path
    assert freed(replaying, made) == [2, 3, 4, 5]
    monkeypatch.setitem(bits, "fails at", "")
    assert (made[4].path / "weights").exists()
    assert ran == [2, 3, 2, 3, 4, 5]


def test_checkpoints_on_the_way_go_as_soon_as_nothing_needs_them(replaying: Store) -> None:
    made = chain(5)
    for weights in made:
        replaying.prune(weights.digest)
    seen: list[list[int]] = []

    def note(topic: str, values: dict[str, Any]) -> None:
        if topic == "replay":
            gone = freed(replaying, made)
            seen.append([step for step in range(1, 6) if step not in gone])

    with listen(note):
        _ = made[4].path
    assert seen == [[], [1], [2], [3], [4], [5]]


def test_a_replay_is_no_event_of_the_run_and_keeps_the_calls_metrics(replaying: Store) -> None:
    made = chain(2)
    metrics, seen = made[1].metrics, list[Event]()
    replaying.prune(made[1].digest)
    with recording(seen.append):
        _ = made[1].path
    assert seen == []
    assert made[1].metrics == metrics == {"learned": 2.0}


def test_a_version_that_is_not_installed_is_refused(replaying: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = chain(2)
    replaying.prune(made[1].digest)
    where = replaying.action(made[1].digest)["replay"]["function"]
    function, _ = stage_module.function_behind(where)
    monkeypatch.setitem(stage_module._functions, where, (function, "2"))
    with pytest.raises(ReplayError, match="made by learn version 1, and version 2 is installed"):
        _ = made[1].path


def test_a_call_late_in_the_chain_is_refused_before_the_first_is_made(replaying: Store) -> None:
    made = chain(3)
    for weights in made:
        replaying.prune(weights.digest)
    record = replaying.action(made[2].digest)
    replaying.record(made[2].digest, {**record, "replay": {**record["replay"], "function": "os:system"}})
    with pytest.raises(ReplayError, match="cannot be called any more"):
        _ = made[2].path
    assert ran == []


@pytest.mark.parametrize(
    "where", ["os:system", "stages.none:learn", "tests.pipeline.derivation.test_materialise:chain"]
)
def test_a_record_can_name_nothing_but_stages(replaying: Store, where: str) -> None:
    made = chain(2)
    replaying.prune(made[1].digest)
    record = replaying.action(made[1].digest)
    replaying.record(made[1].digest, {**record, "replay": {**record["replay"], "function": where}})
    with pytest.raises(ReplayError, match="cannot be called any more"):
        _ = made[1].path


def test_other_arguments_than_those_of_the_key_are_refused(replaying: Store) -> None:
    made = chain(2)
    replaying.prune(made[1].digest)
    record = replaying.action(made[1].digest)
    other = {
        **record["replay"]["arguments"],
        "numbers": {"artifact": draw(7).digest, "action": None, "class": "Numbers"},
    }
    replaying.record(made[1].digest, {**record, "replay": {**record["replay"], "arguments": other}})
    with pytest.raises(ReplayError, match="cannot be replayed"):
        _ = made[1].path
    assert ran == []


def test_two_stores_of_one_folder_replay_once(replaying: Store) -> None:
    made = chain(2)
    replaying.prune(made[1].digest)
    with use_store(Store(replaying.root)) as other:
        other.replay = functools.partial(materialise, other)
        assert (made[1].path / "weights").exists()
    assert (made[1].path / "weights").exists()
    assert ran == [2]
