"""Stages: what decides a key, what a hit replays, what a failure leaves."""

from __future__ import annotations

import shutil
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.artifact import Folder, Table
from pipeline.config import UNKEYED, Config
from pipeline.events import Event, StageDone, StageFailed, StageStarted, recording
from pipeline.progress import listen, report
from pipeline.stage import record_metrics, stage
from pipeline.store import DamagedArtifactError, MissingArtifactError, Store, use_store
from pipeline.store.files import write_sealed
from pipeline.store.folder import digest_of
from tests.pipeline.processes import work_at_once

pytestmark = pytest.mark.usefixtures("store")
ran: list[str] = []


class Numbers(Table):
    schema = pa.schema([pa.field("x", pa.int64(), nullable=False)])


class Scale(Config):
    factor: int = 2
    """What numbers are multiplied by."""
    workers: Annotated[int, UNKEYED] = 1
    """Cannot change the product."""


@pytest.fixture(autouse=True)
def _nothing_ran() -> None:
    ran.clear()


@stage(version="1")
def count(upto: int, *, start: int = 0, tags: list[str] | None = None) -> Numbers:
    ran.append("count")
    record_metrics({"upto": upto})
    return Numbers.write({"x": list(range(start, upto))})


@stage(version="1")
def scale(numbers: Numbers, config: Scale) -> Numbers:
    ran.append("scale")
    record_metrics({"factor": config.factor})
    return Numbers.write({"x": [row["x"] * config.factor for row in numbers.rows()]})


def versioned(version: str) -> Any:
    @stage(version=version)
    def same_name(x: int) -> Numbers:
        ran.append(version)
        return Numbers.write({"x": [x]})

    return same_name


def test_a_second_call_is_a_hit_and_gives_an_equal_reference() -> None:
    first = scale(count(3), Scale())
    assert ran == ["count", "scale"]
    assert scale(count(3), Scale()) == first
    assert ran == ["count", "scale"]
    assert first.rows() == [{"x": 0}, {"x": 2}, {"x": 4}]


def test_the_way_arguments_are_passed_does_not_change_the_key() -> None:
    keys = {count(3).action, count(upto=3).action, count(3, start=0).action, count(3, tags=None, start=0).action}
    assert len(keys) == 1
    assert ran == ["count"]


def test_version_plain_values_configs_and_inputs_each_change_the_key() -> None:
    base = scale(count(3), Scale()).action
    changed = [
        scale(count(3), Scale(factor=3)).action,
        scale(count(4), Scale()).action,
        scale(count(3, start=1), Scale()).action,
    ]
    assert len({base, *changed}) == 4
    assert count(3, tags=["a"]).action != count(3, tags=["b"]).action
    assert versioned("1")(1).action != versioned("2")(1).action
    assert versioned("1")(1).action == versioned("1")(1).action


def test_unkeyed_fields_and_the_history_of_an_input_do_not_change_the_key() -> None:
    base = scale(count(3), Scale())
    assert scale(count(3), Scale(workers=8)).action == base.action
    assert scale(Numbers.write({"x": [0, 1, 2]}), Scale()).action == base.action
    assert ran == ["count", "scale"]


def test_a_hit_replays_its_own_calls_metrics_among_calls_of_equal_content() -> None:
    two = scale(Numbers.write({"x": [0]}), Scale(factor=2))
    three = scale(Numbers.write({"x": [0]}), Scale(factor=3))
    assert two.digest == three.digest
    for _ in range(2):
        assert scale(Numbers.write({"x": [0]}), Scale(factor=2)).metrics == {"factor": 2.0}
        assert scale(Numbers.write({"x": [0]}), Scale(factor=3)).metrics == {"factor": 3.0}
    assert ran == ["scale", "scale"]


def test_metrics_of_a_forgotten_call_say_to_run_it_again(store: Store) -> None:
    made = count(3)
    store.forget(made.digest)
    with pytest.raises(MissingArtifactError, match="run it again"):
        _ = made.metrics


@pytest.mark.filterwarnings("ignore:no artifact")
def test_a_deleted_artifact_is_computed_again_and_nothing_after_it(store: Store) -> None:
    first = count(3)
    last = scale(first, Scale())
    (store.path(first.digest) / "table.arrow").unlink()
    ran.clear()
    with use_store(Store(store.root)), pytest.warns(UserWarning, match=r"table\.arrow is missing"):
        assert scale(count(3), Scale()) == last
    assert ran == ["count"]


def test_a_deleted_record_is_computed_again_and_nothing_after_it(store: Store) -> None:
    last = scale(count(3), Scale())
    assert store.forget(count(3).digest) == 1
    ran.clear()
    assert scale(count(3), Scale()) == last
    assert ran == ["count"]


class Place:
    pass


@pytest.mark.parametrize("value", [Path("/tmp"), Place(), np.ones(1), {1: 2}, {"a": [Place()]}, b"bytes", {1, 2}])
def test_an_argument_that_is_no_value_is_refused_by_name_before_anything_runs(value: Any) -> None:
    with pytest.raises(TypeError, match=r"count\(tags=\.\.\.\): "):
        count(1, tags=value)
    with pytest.raises(TypeError, match="missing a required argument: 'upto'"):
        count()  # type: ignore[call-arg]
    assert ran == []


def test_a_failing_stage_leaves_nothing_and_reports(store: Store) -> None:
    @stage(version="1")
    def failing(x: int) -> Numbers:
        Numbers.write({"x": [x]})
        raise RuntimeError("out of luck")

    heard: list[Event] = []
    with recording(heard.append), pytest.raises(RuntimeError, match="out of luck"):
        failing(1)
    assert [type(event) for event in heard] == [StageStarted, StageFailed]
    assert heard[1].values()["error"] == "RuntimeError: out of luck"
    assert list(store.actions()) == []
    for folder in ("drafts", "locks"):
        assert list((store.root / folder).iterdir()) == []


def test_a_stage_that_returns_another_type_fails_and_is_not_recorded(store: Store) -> None:
    @stage(version="1")
    def forgetful(x: int) -> Numbers:
        return None  # type: ignore[return-value]

    with pytest.raises(TypeError, match="annotated to return Numbers; it returned None"):
        forgetful(1)
    assert list(store.actions()) == []
    with pytest.raises(TypeError, match="annotate the artifact"):
        stage(version="1")(lambda: Numbers("x"))


def test_events_of_nested_stages_reach_every_fold_in_order() -> None:
    @stage(version="1")
    def outer(x: int) -> Numbers:
        report("outer", done=1, total=2)
        inner = count(x)
        record_metrics({"outer": 1})
        return scale(inner, Scale())

    heard: list[tuple[str, Any]] = []
    other: list[Event] = []

    def fold(event: Event) -> None:
        assert isinstance(event, StageStarted | StageDone)
        heard.append((event.stage, event.cached if isinstance(event, StageDone) else "started"))

    with recording(fold, other.append), listen(lambda topic, values: heard.append((topic, values))):
        made = outer(3)
    assert heard == [
        ("outer", "started"),
        ("outer", {"done": 1, "total": 2}),
        ("count", "started"),
        ("count", False),
        ("scale", "started"),
        ("scale", False),
        ("outer", False),
    ]
    assert len(other) == 6
    assert made.metrics == {"outer": 1.0}
    heard.clear()
    with recording(fold):
        outer(3)
    assert heard == [("outer", True)]


def test_a_listener_that_fails_costs_a_warning_and_not_the_work() -> None:
    def broken(event: Event) -> None:
        raise ConnectionError("no display")

    with recording(broken), pytest.warns(UserWarning, match="ConnectionError: no display"):
        assert count(2).rows() == [{"x": 0}, {"x": 1}]


@pytest.mark.claim("MLflow that stops training")
def test_metrics_have_mlflow_names_and_are_finite() -> None:
    @stage(version="1")
    def measured(x: int) -> Numbers:
        record_metrics({"a/b-c_d. :1": 1, "none": None, "bad": float("nan"), "worse": float("inf"), "flag": True})
        return Numbers.write({"x": [x]})

    assert measured(1).metrics == {"a/b-c_d. :1": 1.0, "flag": 1.0, "nonfinite_metrics": 2.0}
    with pytest.raises(ValueError, match="metric name 'pass@8'"):
        record_metrics({"pass@8": 1.0})


def test_a_record_says_from_what_and_by_what_an_artifact_was_made(store: Store) -> None:
    made = scale(count(3), Scale(factor=3))
    record = store.action(made.action or "")
    assert record["stage"] == "scale"
    assert record["arguments"] == {"numbers": {"artifact": count(3).digest}, "config": {"config": {"factor": 3}}}
    assert record["type"] == "Numbers"
    assert record["packages"]["pyarrow"] == pa.__version__
    assert store.manifest(made.digest)["provenance"]["stage"] == "scale"


# ------------------------------------------------------------------------------------- trained state


class Weights(Folder):
    """What a training makes."""


bits = {"noise": 0}
"""Changed, it imitates hardware without a fixed order of sums."""


@stage(version="1")
def learn(weights: Weights | None, *, steps: int) -> Weights:
    ran.append("learn")
    if weights is not None and not steps:
        return weights

    def fill(folder: Path) -> None:
        (folder / "weights").write_text(f"{steps > 0} {bits['noise']}")

    return Weights.derived(Weights.write_derived(fill))


def test_trained_state_is_named_by_its_call_and_says_its_content(store: Store) -> None:
    made = learn(None, steps=1)
    record, manifest = store.action(made.digest), store.manifest(made.digest)
    assert made.action == made.digest == record["key"] == record["result"]
    assert made.content == manifest["digest"] == record["content"] == digest_of(manifest["files"], None)
    assert learn(None, steps=1) == made
    assert ran == ["learn"]


def test_equal_content_of_two_calls_has_two_names_and_calls_of_both_differ() -> None:
    one, two = learn(None, steps=1), learn(None, steps=2)
    assert one.content == two.content
    assert one.digest != two.digest
    assert learn(one, steps=1).digest != learn(two, steps=1).digest


def test_a_training_that_changes_nothing_returns_the_name_it_was_given(store: Store) -> None:
    before = learn(None, steps=1)
    after = learn(before, steps=0)
    assert after == before
    assert "content" not in store.action(after.action or "")


def test_outside_a_stage_the_content_is_the_name() -> None:
    content = Weights.write_derived(lambda folder: (folder / "weights").write_text("x") and None)
    assert Weights.derived(content).digest == content == Weights.derived(content).content


def test_an_object_under_the_name_of_another_call_is_damaged(store: Store) -> None:
    made, other = learn(None, steps=1), learn(None, steps=2)
    shutil.rmtree(store.folder(other.digest))
    shutil.copytree(store.folder(made.digest), store.folder(other.digest))
    with pytest.raises(DamagedArtifactError, match="does not describe"):
        store.path(other.digest)
    with pytest.warns(UserWarning, match="computing it again"):
        assert learn(None, steps=2) == other


def test_a_manifest_with_another_content_digest_is_damaged(store: Store) -> None:
    made = learn(None, steps=1)
    place = store.folder(made.digest) / "manifest.json"
    manifest = store.manifest(made.digest)
    place.chmod(0o644)
    place.unlink()
    write_sealed(place, {name: value for name, value in manifest.items() if name != "sealed"} | {"digest": "0" * 64})
    with pytest.raises(DamagedArtifactError, match="does not describe"):
        Store(store.root).path(made.digest)


@pytest.mark.filterwarnings("ignore:no artifact .* computing it again")
@pytest.mark.parametrize("lost", ["the record", "the object"])
def test_trained_state_that_comes_out_differently_is_a_warning(
    store: Store, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = learn(None, steps=1)
    content = made.content
    if lost == "the record":
        store.forget(made.digest)
    else:
        shutil.rmtree(store.folder(made.digest))
    monkeypatch.setitem(bits, "noise", 1)
    with pytest.warns(UserWarning, match=rf"{made.digest} was made again .* in place of {content}"):
        again = learn(None, steps=1)
    assert again == made
    assert (again.content == content) is (lost == "the record"), "the object that is there stays"
    assert store.action(made.digest)["content"] == again.content


def test_trained_state_that_comes_out_equal_is_no_warning(store: Store) -> None:
    made = learn(None, steps=1)
    store.forget(made.digest)
    with warnings.catch_warnings(action="error"):
        assert learn(None, steps=1) == made


def test_processes_that_call_one_key_at_once_compute_it_once(tmp_path: Path) -> None:
    @stage(version="1")
    def slow(x: int) -> Folder:
        with open(tmp_path / "computed", "a") as handle:
            handle.write("once\n")
        time.sleep(0.3)

        def fill(folder: Path) -> None:
            (folder / "x").write_text(str(x))

        return Folder.write(fill)

    def work(number: int) -> None:
        with use_store(Store(tmp_path / "store")):
            assert (slow(1).path / "x").read_text() == "1"

    work_at_once(4, work)
    assert (tmp_path / "computed").read_text() == "once\n"
