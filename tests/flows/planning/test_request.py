from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.config.resolve import choose
from flows.planning.request import calls_of, lengths_for, progress_of
from flows.planning.work import Lengths
from flows.runs.ledger import Ledger
from flows.runs.paths import Places
from pipeline.config import ConfigError
from pipeline.store import use_store
from stages.data import arithmetic_questions
from stages.tables import Rollouts
from tests.flows.planning.conftest import Planned
from tests.stages.rows import rollout_row


def test_a_model_that_nobody_knows_needs_its_config(planned: Planned, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--model-config"):
        planned("deepseekmath_7b", "policy.path=someone/other-7b", device="a100-80g")
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 99,
    }
    (tmp_path / "model.json").write_text(json.dumps(settings))
    plan = planned("deepseekmath_7b", device="a100-80g", model_config=tmp_path / "model.json")
    assert plan.given.shape.hidden == 64


def test_a_mean_beyond_the_longest_output_is_refused(planned: Planned) -> None:
    with pytest.raises(ConfigError, match=r"at most rollout\.max_output_tokens=64"):
        planned("arithmetic_cpu", mean_output_tokens=65.0)


def test_lengths_are_those_of_the_last_step_that_was_run(tmp_path: Path) -> None:
    config, places = choose("arithmetic_smoke").config, Places(tmp_path)
    with use_store(places.open_store()):
        outputs = Rollouts.write([rollout_row("q", 0, [5, 6]), rollout_row("q", 1, [5, 6, 7, 8, 9])])
        prompt = len(outputs.rows()[0]["prompt_ids"])
    ledger = Ledger(steps={1: {"rollout": "0" * 64}, 2: {"rollout": outputs.digest}})
    found, said = lengths_for(config, places, places.open_store(), ledger, prompt=None, output=None)
    assert found == Lengths(prompt, 3.5, config.rollout.max_output_tokens)
    assert said[0].endswith("as those of the last step that was run")
    given, _ = lengths_for(config, places, places.open_store(), ledger, prompt=9, output=None)
    assert given == Lengths(9, 3.5, config.rollout.max_output_tokens)


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
