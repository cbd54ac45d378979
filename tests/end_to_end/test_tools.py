"""A run with a tool: calls are artifacts, what was answered is not learned from, and a second run asks for nothing again."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.config.recipes import arithmetic_smoke
from pipeline.residency import evict
from pipeline.store import Store, use_store
from stages.join import written_by_policy
from stages.tables import Advantages, Rollouts, ToolCalls
from stages.text.tokenizers import EOS
from tests.end_to_end.test_resume import CALLS
from tests.flows.short_runs import executed_by


def test_a_run_with_a_tool_learns_from_dialogues_and_answers_each_call_once(tmp_path: Path) -> None:
    config = arithmetic_smoke().override(CALLS)
    with use_store(Store(tmp_path)) as store:
        content, executed = executed_by(config)
        assert {"answer_calls", "continue_dialogues"} <= set(executed)
        actions = [action for action in store.actions() if action["stage"] == "continue_dialogues"]
        turns = [
            Rollouts(action["result"]).read(["question_id", "sample", "output_ids", "logprobs", "turns"])
            for action in actions
        ]
        assert max(len(row or ()) for table in turns for row in table["turns"].to_pylist()) > 2
        for table in turns:
            logprobs = [value for row in table["logprobs"].to_pylist() for value in row]
            assert [value is not None for value in logprobs] == written_by_policy(table).tolist()
        calls = [ToolCalls(action["result"]) for action in store.actions() if action["stage"] == "answer_calls"]
        assert {row["status"] for table in calls for row in table.rows()} <= {"ok", "error", "refused"}
        advantages = [Advantages(a["result"]) for a in store.actions() if a["stage"] == "estimate_advantages"]
        assert len(advantages) == config.iterations * config.steps
        evict()
        assert executed_by(config) == (content, [])
    evict()


@pytest.mark.slow
def test_a_run_with_a_function_reads_its_answers_as_text_and_asks_once(tmp_path: Path) -> None:
    tool = {"kind": "function", "function": "tests.stages.environment.tools:answer", "call_ends": ["m"]}
    short = {"iterations": 1, "steps": 1, "evaluation.every": 0}
    config = arithmetic_smoke().override(short | {"environment": tool | {"before_answer": EOS, "after_answer": "="}})
    with use_store(Store(tmp_path)) as store:
        content, executed = executed_by(config)
        assert {"answer_calls", "continue_dialogues"} <= set(executed)
        found = {action["stage"]: action["result"] for action in store.actions()}
        for row in ToolCalls(found["answer_calls"]).rows():
            assert (row["tool"], row["status"]) == ("answer", "ok")
            assert row["observation"] == f"{EOS}got {row['output']}="
        observed = [row for row in Rollouts(found["continue_dialogues"]).rows() if row["turns"]]
        assert observed
        for row in observed:
            ids = [one for one, logprob in zip(row["output_ids"], row["logprobs"], strict=True) if logprob is None]
            assert ids
            assert 0 not in ids
        evict()
        assert executed_by(config) == (content, [])
    evict()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"rollout.stop": False}, "rollout.stop"),
        ({"rollout.stop_strings": ["=m"]}, "rollout.stop_strings"),
        ({"rollout.stop_strings": ["m"]}, "rollout.stop_strings"),
        ({"overlap": 1, "update.old_logprobs": "rollout", "side_by_side": "always"}, "side_by_side"),
    ],
)
def test_what_does_not_go_with_calls_is_refused_before_anything_runs(settings: dict[str, object], key: str) -> None:
    from pipeline.config import ConfigError

    with pytest.raises(ConfigError, match=key):
        arithmetic_smoke().override(CALLS | settings)
