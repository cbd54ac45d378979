"""A run whose reference scores the outputs in a pass of its own, and one where it stays loaded; limits that stop a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.inspection.history import History, PlacedCall
from flows.inspection.replay import prepare_replay
from flows.runs.ledger import Ledger
from flows.runs.record import RunRecord
from pipeline.derivation.arguments import describe
from pipeline.residency import evict
from stages.update import MismatchError
from tests.flows.short_runs import BASE, Run, copied, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(supervised: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Two iterations of two steps each, either way."""
    made = {}
    for mode in ("inline", "stage"):
        made[mode] = train(copied(supervised.store, tmp_path_factory), "grpo", iterations=2, reference_pass=mode)
        evict()
    return made


def test_both_ways_end_in_the_same_policy(runs: dict[str, Run]) -> None:
    assert runs["stage"].content == runs["inline"].content
    assert min(runs["inline"].points[step]["policy/kl"] for step in (2, 4)) > 0


def test_the_pass_is_made_where_the_reference_is_not_the_policy_itself(runs: dict[str, Run]) -> None:
    updates, passes = runs["stage"].of("update_policy"), runs["stage"].of("score_reference")
    given = [update["arguments"]["reference"]["artifact"] for update in updates]
    starts = [update["arguments"]["policy"]["artifact"] for update in updates][::2]
    assert given[::2] == starts, "the first step of an iteration"
    assert given[1::2] == [made["result"] for made in passes]
    assert [made["arguments"]["reference"]["artifact"] for made in passes] == starts
    assert not runs["inline"].of("score_reference")
    assert runs["stage"].points[2]["time/reference"] > 0


def test_an_update_is_replayed_with_the_table_or_the_model_it_had(runs: dict[str, Run]) -> None:
    run, kinds = runs["stage"], set()
    history = History(RunRecord(Path("run"), "run", 4), BASE, Ledger(), {}, "")
    for name, key in run.calls:
        if name == "update_policy":
            replay = prepare_replay(run.store, history, PlacedCall(1, "", name, key, ""), [])
            assert {n: describe(v) for n, v in replay.arguments.items()} == replay.recorded["arguments"]
            kinds.add(type(replay.arguments["reference"]).__name__)
    assert kinds == {"Checkpoint", "ReferenceLogprobs"}


def test_a_limit_stops_the_run_by_the_name_of_its_step_computed_or_reused(runs: dict[str, Run]) -> None:
    limit: dict[str, Any] = {"update.mismatch": {"max_mean": 1e-12}}
    with pytest.raises(MismatchError, match=r"^step 1: .*above update\.mismatch\.max_mean=1e-12"):
        train(runs["inline"].store, "grpo", iterations=2, **limit)
    other = {"update.training.optimizer.learning_rate": 2e-4}
    before = Run(runs["inline"].store)
    with pytest.raises(MismatchError, match=r"^step 1: "):
        train(before.store, "grpo", run=before, iterations=2, **limit, **other)
    assert not before.of("update_policy"), "an update was recorded that learned from outputs beyond the limit"
