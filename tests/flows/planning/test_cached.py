from __future__ import annotations

from pathlib import Path

from flows.config.resolve import choose
from flows.planning.cached import calls_of, progress_of
from flows.runs.paths import Places
from pipeline.store import use_store
from stages.data import arithmetic_questions


def test_a_plan_counts_the_calls_that_runs_were_seen_to_make() -> None:
    """docs/lab: 266 stages of the demo, 43 of the smallest run, and since then a count of votes in every evaluation."""
    found = {
        name: sum(count for _, count in calls_of(choose(name).config))
        for name in ("arithmetic_cpu", "arithmetic_smoke")
    }
    assert found == {"arithmetic_cpu": 286, "arithmetic_smoke": 49}


def test_what_is_recorded_is_found_and_nothing_is_computed(tmp_path: Path) -> None:
    config, places = choose("arithmetic_smoke").config, Places(tmp_path)
    empty = progress_of(config, places.open_store())
    assert (empty.found, empty.total, empty.steps, empty.ended) == (0, 49, 0, False)
    with use_store(places.open_store()):
        arithmetic_questions(config.data.train, "train")
    written = sorted(path for path in tmp_path.rglob("*"))
    begun = progress_of(config, places.open_store())
    assert (begun.found, begun.total, begun.note) == (1, 49, "")
    assert sorted(path for path in tmp_path.rglob("*")) == written
