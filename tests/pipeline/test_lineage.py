"""Ancestry and explanations, from real stage calls in a real store."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from pipeline.artifact import Table
from pipeline.config import Config
from pipeline.lineage import Ancestor, ancestry, explain, mermaid, tree
from pipeline.stage import stage
from pipeline.store import Store


class Numbers(Table):
    schema = pa.schema([pa.field("n", pa.int64(), nullable=False)])


class ScaleConfig(Config):
    factor: int = 2
    """Multiplier."""
    labels: tuple[str, ...] = ("a", "b")
    """Unused by the stage; part of its key."""


@stage(version="1")
def count(*, size: int) -> Numbers:
    return Numbers.write({"n": list(range(size))})


@stage(version="3")
def scale(numbers: Numbers, config: ScaleConfig) -> Numbers:
    return Numbers.write({"n": [config.factor * n for n in numbers.read().column("n").to_pylist()]})


@stage(version="1")
def join(parts: list[Numbers], *, seed: int) -> Numbers:
    return Numbers.write({"n": [seed, *(n for part in parts for n in part.read().column("n").to_pylist())]})


def called(store: Store, numbers: Numbers) -> dict[str, Any]:
    assert numbers.action
    return store.action(numbers.action)


def test_ancestry_names_every_input_once_with_the_stage_that_made_it(store: Store) -> None:
    source = count(size=3)
    doubled = scale(source, ScaleConfig())
    joined = join([source, doubled], seed=7)
    found = ancestry(store, joined.digest)
    assert list(found) == [joined.digest, source.digest, doubled.digest]
    assert [ancestor.stage for ancestor in found.values()] == ["join", "count", "scale"]
    assert found[joined.digest].inputs == (("parts[0]", source.digest), ("parts[1]", doubled.digest))
    assert found[joined.digest].kind == "Numbers"


def test_an_artifact_made_outside_of_stages_is_an_origin(store: Store) -> None:
    given = Numbers.write({"n": [5]})
    found = ancestry(store, scale(given, ScaleConfig()).digest)
    assert found[given.digest].stage is None
    assert "not made by a stage" in found[given.digest].label


def test_a_call_that_returns_its_own_input_is_not_its_origin(store: Store) -> None:
    source = count(size=2)
    same = scale(source, ScaleConfig(factor=1))
    assert same.digest == source.digest
    assert ancestry(store, same.digest)[source.digest].stage == "count"
    assert ancestry(store, same.digest, key=same.action)[same.digest].stage == "scale"
    assert "scale" in tree(ancestry(store, same.digest, key=same.action))


def test_mermaid_draws_an_edge_for_each_input(store: Store) -> None:
    source = count(size=3)
    doubled = scale(source, ScaleConfig())
    text = mermaid(ancestry(store, doubled.digest))
    assert text == (
        "flowchart LR\n"
        f'  a0["Numbers<br/>{doubled.digest[:12]}"]\n'
        f'  a1["Numbers<br/>{source.digest[:12]}"]\n'
        '  a1 -- "numbers" --> a0\n'
    )


def test_the_tree_indents_generations_and_repeats_no_subtree(store: Store) -> None:
    doubled = scale(count(size=3), ScaleConfig())
    lines = tree(ancestry(store, join([doubled, doubled], seed=1).digest)).splitlines()
    assert [line.split(" (")[0].split(": ")[0] for line in lines[1:]] == ["  parts[0]", "    numbers", "  parts[1]"]
    assert lines[-1].endswith("shown above")
    assert len(tree(ancestry(store, join([doubled, doubled], seed=1).digest), depth=1).splitlines()) == 3


def test_a_training_of_three_thousand_steps_is_drawn_without_recursion() -> None:
    names = [f"{number:064d}" for number in range(3000)]
    chain = {
        name: Ancestor(name, "Checkpoint", "update", name, 1.0, (("policy", parent),))
        for name, parent in zip(names, [*names[1:], "origin"], strict=True)
    }
    chain["origin"] = Ancestor("origin", "Checkpoint", None, None, 0.0, ())
    assert len(tree(chain).splitlines()) == 3001
    assert mermaid(chain).count("-->") == 3000


def test_explain_names_the_dotted_key_from_what_to_what(store: Store) -> None:
    source = count(size=3)
    scale(source, ScaleConfig())
    changed = scale(source, ScaleConfig(factor=5, labels=("a", "c")))
    explanation = explain(store, called(store, changed))
    assert [(c.part, c.before, c.after) for c in explanation.changes] == [
        ("config.factor", "2", "5"),
        ("config.labels", "['a', 'b']", "['a', 'c']"),
    ]
    assert explanation.causes == explanation.changes


def test_of_calls_that_gave_equal_content_those_of_the_run_are_meant(store: Store) -> None:
    other = scale(count(size=4), ScaleConfig(factor=6))
    own = scale(scale(count(size=4), ScaleConfig(factor=2)), ScaleConfig(factor=3))
    assert other.digest == own.digest
    assert len(ancestry(store, own.digest)) == 2
    assert len(ancestry(store, own.digest, calls={str(own.action)})) == 3


def test_explain_follows_a_changed_input_to_the_config_that_caused_it(store: Store) -> None:
    first = join([scale(count(size=3), ScaleConfig())], seed=0)
    second = join([scale(count(size=4), ScaleConfig())], seed=0)
    explanation = explain(store, called(store, second))
    assert explanation.nearest == called(store, first)
    assert [change.part for change in explanation.changes] == ["parts[0]"]
    assert [str(cause) for cause in explanation.causes] == ["count: size: 3 -> 4"]
    assert "because upstream\n  count: size: 3 -> 4" in str(explanation)


def test_explain_compares_with_the_call_that_differs_least(store: Store) -> None:
    near = join([count(size=3)], seed=1)
    join([count(size=4)], seed=2)
    explanation = explain(store, called(store, join([count(size=3)], seed=9)))
    assert explanation.nearest == called(store, near)


def test_explain_says_that_a_version_changed_or_that_nothing_came_before(store: Store) -> None:
    record = called(store, count(size=3))
    assert explain(store, record).nearest is None
    assert str(explain(store, record)).endswith("no earlier call of this stage")
    planned = {**json.loads(json.dumps(record)), "version": "2", "key": "0" * 64}
    del planned["created"]
    assert [str(change) for change in explain(store, planned).changes] == ["count: version: '1' -> '2'"]


def test_parts_absent_on_one_side_are_shown_as_absent(store: Store) -> None:
    record = called(store, count(size=3))
    planned = {**record, "arguments": {"size": 3, "offset": None}, "key": "0" * 64, "created": record["created"] + 1}
    assert [str(change) for change in explain(store, planned).changes] == ["count: offset: (absent) -> None"]


@pytest.mark.parametrize("value", [{}, {"artifact": "x", "more": 1}])
def test_mappings_that_only_look_like_artifacts_are_compared_as_values(store: Store, value: dict[str, Any]) -> None:
    record = called(store, count(size=3))
    planned = {**record, "arguments": {"size": value}, "key": "0" * 64, "created": record["created"] + 1}
    assert all(change.part.startswith("size") for change in explain(store, planned).changes)


def test_mermaid_holds_text_of_a_record_as_text() -> None:
    hostile = 'Folder"]; click a0 "javascript:x" <script>'
    made = Ancestor("a" * 64, hostile, "make", "b" * 64, 1.0, (('p" --> x', "c" * 64),))
    text = mermaid({"a" * 64: made, "c" * 64: Ancestor("c" * 64, "Folder", None, None, 0.0, ())})
    assert "<script>" not in text
    assert text.count('"') == 6  # two of each artifact, and two of the edge
    assert text.count("-->") == 1
