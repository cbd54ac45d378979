"""Runs whose questions are chosen by earlier rewards: which rewards a step is given, and that they resume to the same bits."""

from __future__ import annotations

from typing import Any

import pytest

from flows import iterative_rl as loop
from flows.algorithm.data_check import examine_data
from pipeline.config import ConfigError
from pipeline.residency import evict
from pipeline.store import Store, use_store
from stages.tables import Questions
from tests.flows.short_runs import BASE, Run, copied, train

pytestmark = pytest.mark.slow

STEPS = 4
BAND: dict[str, Any] = {"curriculum": {"window": 2}, "steps": STEPS}
OVERLAP = BAND | {"overlap": 1, "update.old_logprobs": "rollout", "side_by_side": "never"}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "alone": ("grpo", BAND),
    "dynamic": ("dapo", BAND),
    "overlap": ("grpo", OVERLAP),
    "offline": ("rft", BAND),
    "iterations": ("grpo", BAND | {"steps": 2, "iterations": 2}),
}


@pytest.fixture(scope="module")
def store(supervised: Run, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return copied(supervised.store, tmp_path_factory)


@pytest.fixture(scope="module")
def runs(store: Store) -> dict[str, Run]:
    """Four steps each way."""
    made = {}
    for way, (method, changes) in WAYS.items():
        made[way] = train(store, method, **changes)
        evict()
    return made


def earlier(run: Run) -> list[list[str]]:
    """The rewards that each draw was given."""
    return [[part["artifact"] for part in record["arguments"]["earlier"]] for record in run.of("draw_from_band")]


@pytest.mark.parametrize("way", ["alone", "overlap", "offline", "iterations"])
def test_a_step_is_given_the_rewards_of_the_window_before_it(runs: dict[str, Run], way: str) -> None:
    r = runs[way].made("score")
    assert earlier(runs[way]) == [[], r[:1], r[:2], r[1:3]]
    assert not runs[way].of("sample_batch")


def test_each_draw_of_dynamic_sampling_counts_and_repeats_no_question(runs: dict[str, Run]) -> None:
    run = runs["dynamic"]
    given, draws = earlier(run), [record["arguments"] for record in run.of("draw_from_band")]
    firsts = [place for place, arguments in enumerate(draws) if not arguments["drawn"]]
    assert len(firsts) == STEPS < len(draws)
    scored = run.of("score")
    by_outputs = {record["arguments"]["outputs"]["artifact"]: record["result"] for record in scored}
    drawn = [by_outputs[outputs] for outputs in run.made("rollout")]
    steps = [drawn[first:after] for first, after in zip(firsts, [*firsts[1:], None], strict=True)]
    assert [given[first] for first in firsts] == [[], steps[0], steps[0] + steps[1], steps[1] + steps[2]]
    with use_store(run.store):
        batches = [
            Questions(name).read(["question_id"])["question_id"].to_pylist()
            for name in run.given("rollout", "questions")
        ]
    for first, after in zip(firsts, [*firsts[1:], None], strict=True):
        step = [question for batch in batches[first:after] for question in batch]
        assert len(set(step)) == len(step)


def test_metrics_say_what_was_drawn_from(runs: dict[str, Run]) -> None:
    for way, run in runs.items():
        assert run.points[1]["curriculum/unseen"] == 1, way
        # 6 of 48 questions a step at least; whatever was drawn has been seen.
        assert run.points[2]["curriculum/unseen"] <= 42 / 48, way
        for step in range(1, STEPS + 1):
            shares = [run.points[step][f"curriculum/{name}"] for name in ("band", "evicted", "unseen")]
            assert sum(shares) <= 1, way


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", ["reward_outputs", "update_policy"])
def test_a_run_that_ends_at_any_step_resumes_to_the_same_digests(
    runs: dict[str, Run],
    supervised: Run,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    stage: str,
) -> None:
    """Every attempt ends in a step further than the one before, before the step's rewards, or after them."""
    method, changes = WAYS[way]
    store, original = copied(supervised.store, tmp_path_factory), getattr(loop, stage)
    for last in range(STEPS):
        calls = iter(range(STEPS))

        def ending(*args: Any, last: int = last, calls: Any = calls, **kwargs: Any) -> Any:
            if next(calls) == last:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(loop, stage, ending)
            with pytest.raises(KeyboardInterrupt):
                train(store, method, **changes)
        evict()  # as a new process would begin
    resumed = train(store, method, **changes)
    evict()
    assert (resumed.digest, resumed.content) == (runs[way].digest, runs[way].content)
    assert resumed.calls == runs[way].calls


def test_first_estimates_are_rewards_of_another_run(runs: dict[str, Run], store: Store) -> None:
    names = runs["alone"].made("score")[-2:]
    given = {"curriculum": {"window": 2, "rewards": [names[0], names[1][:12]]}}
    run = train(store, "grpo", **given)
    evict()
    assert earlier(run) == [names, [names[1], run.made("score")[0]]]
    assert run.points[1]["curriculum/unseen"] <= 42 / 48


def test_names_that_are_no_rewards_of_these_questions_are_refused_first(runs: dict[str, Run], store: Store) -> None:
    outputs, rewards = runs["alone"].made("rollout")[0], runs["alone"].made("score")[0]
    longer = {"data.train": {"count": 48, "shortest": 3, "longest": 3}}
    for name, changes in (("0" * 64, {}), (outputs, {}), (rewards, longer)):
        run = Run(store)
        with pytest.raises(ConfigError, match=f"curriculum.rewards: .* found {name}"):
            train(store, "grpo", run=run, **{"curriculum": {"rewards": [name]}}, **changes)
        assert not run.of("supervised_finetuning")
        (complaint,) = examine_data(BASE.override(changes | {"curriculum": {"rewards": [name]}}), store).complaints
        assert f"found {name}" in complaint
    assert not examine_data(BASE.override({"curriculum": {"rewards": [rewards]}}), store).complaints
