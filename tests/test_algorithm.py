"""Algorithm 1 line by line, read from the records that one run of two iterations of two steps left in its store."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from flows.config.recipes import arithmetic_smoke
from flows.iterative_rl import iterative_rl
from flows.runs.curve import Points
from pipeline.events import recording
from pipeline.residency import evict
from pipeline.store import Store, use_store
from stages.tables import Questions


class Run(NamedTuple):
    store: Store
    final: str
    points: dict[int, dict[str, float]]
    calls: dict[str, list[dict[str, Any]]]
    """Stage -> its calls in the order made: inputs by argument, and the result."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    store, seen = Store(tmp_path_factory.mktemp("run")), Points()
    with use_store(store), recording(seen.take):
        final = iterative_rl(arithmetic_smoke()).digest
    calls: dict[str, list[dict[str, Any]]] = {}
    for action in store.actions():
        inputs = {name: value.get("artifact") for name, value in action["arguments"].items() if isinstance(value, dict)}
        calls.setdefault(action["stage"], []).append({**inputs, "result": action["result"]})
    evict()
    return Run(store, final, seen.by_step, calls)


def updates(run: Run) -> list[dict[str, Any]]:
    return run.calls["update_policy"]


@pytest.mark.claim("line 1")
def test_the_first_policy_is_the_supervised_one_and_the_last_is_returned(run: Run) -> None:
    assert updates(run)[0]["policy"] == run.calls["supervised_finetuning"][0]["result"]  # line 1
    assert updates(run)[-1]["result"] == run.final
    assert len(updates(run)) == 4  # lines 2 and 4


@pytest.mark.claim("the output")
def test_every_update_goes_on_from_the_one_before(run: Run) -> None:
    made = updates(run)
    assert [update["policy"] for update in made[1:]] == [update["result"] for update in made[:-1]]
    assert len({update["result"] for update in made}) == 4


@pytest.mark.claim(
    "a reference of another time or precision",
    "the reference refreshed at the wrong place",
    "line 3",
    "4.1.4 reference",
)
def test_the_reference_is_the_policy_at_the_start_of_each_iteration(run: Run) -> None:
    made = updates(run)  # line 3
    starts = [made[0]["policy"], made[2]["policy"]]
    assert [update["reference"] for update in made] == [starts[0], starts[0], starts[1], starts[1]]


@pytest.mark.claim("a reference loaded for beta = 0", "line 3")
def test_kl_is_exactly_zero_at_the_first_update_of_an_iteration_only(run: Run) -> None:
    kl = [run.points[step]["policy/kl"] for step in (1, 2, 3, 4)]
    assert (kl[0], kl[2]) == (0.0, 0.0)
    assert min(kl[1], kl[3]) > 0


@pytest.mark.claim("line 6")
def test_outputs_are_sampled_by_the_policy_that_learns_from_them(run: Run) -> None:
    samplers = {call["result"]: call["policy"] for call in run.calls["rollout"]}  # lines 6 and 7
    assert [samplers[update["outputs"]] for update in updates(run)] == [update["policy"] for update in updates(run)]
    for step in (1, 2, 3, 4):
        assert run.points[step]["policy/ratio_min"] == run.points[step]["policy/ratio_max"] == 1.0


@pytest.mark.claim("line 9")
def test_advantages_are_of_the_rewards_of_these_outputs(run: Run) -> None:
    scored = {call["outputs"]: call["result"] for call in run.calls["score"]}  # line 8
    estimated = {call["result"]: call for call in run.calls["estimate_advantages"]}  # line 9
    for update in updates(run):  # line 10
        estimate = estimated[update["advantages"]]
        assert estimate["outputs"] == update["outputs"]
        assert estimate["rewards"] == scored[update["outputs"]]


@pytest.mark.claim("a resumed run that repeats questions", "line 5")
def test_no_question_is_drawn_twice_before_all_were_drawn_once(run: Run) -> None:
    with use_store(run.store):
        drawn = [row["question_id"] for call in run.calls["sample_batch"] for row in Questions(call["result"]).rows()]
    assert len(drawn) == len(set(drawn)) == 16  # line 5: 4 steps of 4 of the 64 questions
