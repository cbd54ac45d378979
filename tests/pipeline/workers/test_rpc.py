"""Calls that another process carries out: what is sent is JSON, and both sides end with the same."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pyarrow as pa
import pytest

from pipeline.artifact import Table
from pipeline.config import Config
from pipeline.events import Event, StageDone, StageStarted, recording
from pipeline.progress import report
from pipeline.stage import stage
from pipeline.store import Store, current_store
from pipeline.store.context import record_metrics
from pipeline.workers.rpc import accept, order_of, perform


class Numbers(Table):
    schema = pa.schema([pa.field("number", pa.float64(), nullable=False)])


class Words(Table):
    schema = pa.schema([pa.field("word", pa.string(), nullable=False)])


class Scaling(Config):
    factor: float = 2.0


def scaled(numbers: Numbers | Words, config: Scaling, *, seed: int, names: list[str] | None = None) -> Numbers:
    assert isinstance(numbers, Numbers)
    record_metrics({"scaled/seed": seed, "scaled/factor": config.factor})
    report("scaled", done=1, total=1)
    return Numbers.write([{"number": config.factor * row["number"]} for row in numbers.rows()])


def sent(given: dict[str, Any]) -> dict[str, Any]:
    """What arrives at the other side."""
    arrived: dict[str, Any] = json.loads(json.dumps(given))
    return arrived


def test_a_call_gives_there_what_it_gives_here(store: Store) -> None:
    numbers, heard = Numbers.write({"number": [0.1, 1e300, -0.0]}), []
    arguments = {"numbers": numbers, "config": Scaling(factor=1 / 3), "seed": 7, "names": None}
    order = sent(order_of("scaled", scaled, arguments))
    reply = sent(perform(order, scaled, lambda topic, values: heard.append((topic, values))))
    assert accept(reply, scaled) == scaled(numbers, Scaling(factor=1 / 3), seed=7)
    assert reply["metrics"] == {"scaled/seed": 7.0, "scaled/factor": 1 / 3}
    assert heard == [("scaled", {"done": 1, "total": 1})]


def test_a_stage_whose_body_ran_elsewhere_is_recorded_as_if_it_had_run_here(store: Store) -> None:
    @stage(version="3")
    def doubled(numbers: Numbers, config: Scaling) -> Numbers:
        order = order_of("scaled", scaled, {"numbers": numbers, "config": config, "seed": 1})
        result: Numbers = accept(sent(perform(sent(order), scaled, lambda topic, values: None)), scaled)
        return result

    numbers = Numbers.write({"number": [2.0]})
    outcomes: list[Event] = []
    with recording(outcomes.append):
        result = doubled(numbers, Scaling())
        assert doubled(numbers, Scaling()).metrics == {"scaled/seed": 1.0, "scaled/factor": 2.0}
    assert result.rows() == [{"number": 4.0}]
    assert [(type(event), getattr(event, "cached", None)) for event in outcomes] == [
        (StageStarted, None),
        (StageDone, False),
        (StageDone, True),
    ]
    provenance = store.manifest(result.digest)["provenance"]
    assert (provenance["stage"], provenance["version"]) == ("doubled", "3")
    assert provenance["arguments"]["numbers"] == {"artifact": numbers.digest}


def warned(config: Scaling) -> Numbers:
    for _ in range(2):
        warnings.warn("nothing to scale", stacklevel=2)  # as stages do: it is their caller's
    warnings.warn("deprecated", stacklevel=1)  # elsewhere, as that of a library
    return Numbers.write({"number": [1.0]})


def test_warnings_of_stages_are_shown_here_once_and_those_of_libraries_not(store: Store) -> None:
    order = order_of("warned", warned, {"config": Scaling()})
    reply = sent(perform(sent(order), warned, lambda topic, values: None))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        accept(reply, warned)
    assert [str(warning.message) for warning in shown] == ["nothing to scale"]


def test_an_argument_of_another_class_is_not_sent(store: Store) -> None:
    class Other(Config):
        factor: float = 2.0

    with pytest.raises(TypeError, match=r"config: expected .*Scaling.*, found Other"):
        order_of("scaled", scaled, {"config": Other()})


@pytest.mark.parametrize(
    ("parameter", "changed", "error"),
    [
        ("numbers", {"class": "Store"}, KeyError),
        ("config", {"config": {"factor": 2.5}}, ValueError),
    ],
)
def test_an_order_changed_on_the_way_is_refused(
    store: Store, parameter: str, changed: dict[str, Any], error: type[Exception]
) -> None:
    order = order_of("scaled", scaled, {"numbers": Numbers.write({"number": [1.0]}), "config": Scaling(), "seed": 1})
    order["arguments"][parameter] |= changed
    with pytest.raises(error, match="Store" if error is KeyError else "arguments differ from those that were sent"):
        perform(sent(order), scaled, lambda topic, values: None)


def test_code_runs_there_where_the_configuration_of_this_order_pins_it(store: Store) -> None:
    seen: list[set[str]] = []

    def looking(config: Scaling) -> Numbers:
        seen.append(set(current_store().trusted))
        return Numbers.write({"number": [config.factor]})

    looking.__annotations__ = {"config": Scaling, "return": Numbers}
    for pins in ({"a" * 40}, {"b" * 40}, set()):
        store.trusted = pins
        perform(sent(order_of("looking", looking, {"config": Scaling()})), looking, lambda topic, values: None)
    assert seen == [{"a" * 40}, {"b" * 40}, set()]
