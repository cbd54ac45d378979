"""`cohort export --completions`: what a run sampled, row by row, against the tables that the run made."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flows.cli import run_command
from flows.runs.ledger import Ledger, read_ledger
from flows.runs.paths import Places
from flows.runs.record import RunRecord, read_records
from pipeline.store import Store, use_store
from stages.tables import Advantages, Rewards, Rollouts
from tests.flows.export.test_atif import check
from tests.flows.short_runs import smoke

SHORT = (
    'data.demonstrations.chains={"count": 400, "shortest": 2, "longest": 2}',
    'data.train={"count": 16, "shortest": 2, "longest": 2}',
    "sft.max_steps=60",
    "iterations=1",
    "questions_per_step=3",
    'evaluation={"every": 0, "samples": 0, "greedy": false, "estimates": {"ks": [1]}}',
)
TEMPLATE = "{% for m in messages %}[{{ m.content }}] {% endfor %}{% if add_generation_prompt %}= {% endif %}"


@dataclass(frozen=True)
class Ran:
    """A run of which only the log and the store are left."""

    places: Places
    store: Store
    record: RunRecord
    ledger: Ledger

    def export(self, file: Path, *arguments: str) -> int:
        """Write its completions."""
        command = ["export", self.record.name, str(file), "--completions", *arguments]
        return run_command([*command, "--root", str(self.places.root)])

    def lines(self, file: Path, *arguments: str) -> list[dict[str, Any]]:
        """What was written, line by line."""
        assert self.export(file, *arguments) == 0
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()]

    def tables(self, step: int) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]], dict[Any, list[float]]]:
        """Outputs of a step, and by key its rewards and advantages."""
        made = self.ledger.steps[step]
        with use_store(self.store):
            outputs = Rollouts(
                made.get("keep_informative")
                or made.get("continue_dialogues")
                or made.get("rollout")
                or made["demonstrated_outputs"]
            ).rows()
            rewards = Rewards(made["score"]).rows() if "score" in made else []
            advantages = Advantages(made["estimate_advantages"]).rows()
        return (
            outputs,
            {(row["question_id"], row["sample"]): row for row in rewards},
            {(row["question_id"], row["sample"]): row["advantage"] for row in advantages},
        )


def ran(root: Path, *settings: str, method: str = "grpo") -> Ran:
    assert run_command([*smoke(root, *SHORT, *settings), "--method", method]) == 0
    return left_in(root)


def left_in(root: Path) -> Ran:
    places = Places.under(root)
    (record,) = read_records(places)
    ledger = read_ledger(record.folder)
    assert ledger is not None
    return Ran(places, Store(places.store), record, ledger)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Outputs are selected from what is drawn, and policies between the first and the last have no weights."""
    return ran(tmp_path_factory.mktemp("plain"), "steps=3", "checkpoint.every=1000", "dynamic_sampling=1")


def test_every_output_of_every_step_is_a_line_that_says_what_its_tables_say(plain: Ran, tmp_path: Path) -> None:
    lines = plain.lines(tmp_path / "all.jsonl")
    assert len(lines) == 3 * 3 * 4
    assert lines[0]["policy"] == _initial(plain)
    assert [plain.ledger.steps[step]["keep_informative"] for step in (1, 2, 3)]
    policies = [plain.ledger.steps[step]["update_policy"] for step in (1, 2)]
    assert [line["policy"] for line in lines[12::12]] == policies, "step 2 was sampled from step 1's policy"
    assert {line["truncated"] for line in lines} == {True, False}
    at = iter(lines)
    for step in (1, 2, 3):
        outputs, rewards, advantages = plain.tables(step)
        for row in outputs:
            line, key = next(at), (row["question_id"], row["sample"])
            reward = rewards[key]
            assert (line["run"], line["step"], line["question_id"], line["sample"]) == (
                plain.record.folder.name,
                step,
                *key,
            )
            assert line["prompt"] == line["question"] + "\n"
            assert line["completion"] == row["text"]
            assert line["prompt_tokens"] == len(line["prompt"]), "one token a character"
            assert line["completion_tokens"] == len(row["output_ids"])
            assert line["truncated"] == (row["finish_reason"] == "length")
            for name in ("reward", "status", "extracted", "step_rewards"):
                assert line[name] == reward[name]
            assert line["components"] == dict(reward["components"])
            assert set(line["components"]) == {"format", "accuracy"}
            found = advantages[key]
            assert line["advantage"] == (found[0] if found else None)
            assert (line["token_advantages"], line["messages"]) == (None, None)
    for line, trajectory in zip(lines, plain.lines(tmp_path / "atif.jsonl", "--format", "atif"), strict=True):
        check(trajectory)
        assert [step["message"] for step in trajectory["steps"]] == [line["prompt"], line["completion"]]
        assert trajectory["extra"]["reward"] == line["reward"]
    for line in lines:
        first, _, rest = line["question"].removeprefix("Compute ").rstrip(".").partition("+")
        assert not rest or int(line["answer"]) == int(first) + int(rest)


def test_a_step_is_its_part_of_all_and_one_that_is_not_done_is_refused(
    plain: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = plain.lines(tmp_path / "all.jsonl")
    assert plain.lines(tmp_path / "deep" / "two.jsonl", "--step", "2") == whole[12:24]
    capsys.readouterr()
    assert plain.export(tmp_path / "four.jsonl", "--step", "4") == 2
    assert "1 to 3, found 4" in capsys.readouterr().err
    assert not (tmp_path / "four.jsonl").exists()


def test_policies_without_weights_are_neither_read_nor_replayed(
    plain: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with use_store(plain.store):
        unwritten = plain.ledger.steps[1]["update_policy"]
        assert plain.store.manifest(unwritten)["unwritten"]
    whole = plain.lines(tmp_path / "all.jsonl")

    def refuse(self: Store, digest: str) -> bool:
        raise AssertionError(f"{digest} is replayed")

    monkeypatch.setattr(Store, "make_whole", refuse)
    assert plain.lines(tmp_path / "again.jsonl") == whole


def test_a_file_that_is_there_is_left_as_it_is_without_force(
    plain: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text('{"mine": 1}\n')
    assert plain.export(file) == 2
    assert file.read_text() == '{"mine": 1}\n'
    assert len(plain.lines(file, "--force", "--step", "1")) == 12
    other = tmp_path / "config.yaml"
    other.write_text("seed: 1\n")
    assert plain.export(other, "--force") == 2
    assert plain.export(tmp_path, "--force") == 2
    assert other.read_text() == "seed: 1\n"
    assert {entry.name for entry in tmp_path.iterdir()} == {"out.jsonl", "config.yaml"}, "no draft is left"
    assert "is a folder" in capsys.readouterr().err


def test_a_name_that_is_no_run_is_refused(plain: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", plain.ledger.steps[1]["update_policy"], str(tmp_path / "x.jsonl"), "--completions"]
    assert run_command([*command, "--root", str(plain.places.root)]) == 2
    assert "expected a run" in capsys.readouterr().err


def test_outputs_of_a_chat_have_messages_and_advantages_by_step(tmp_path: Path) -> None:
    prompt = {"chat": "tokenizer", "chat_template": TEMPLATE, "system": "Be brief.", "instruction": "Show steps."}
    run = ran(tmp_path / "root", f"prompt={json.dumps(prompt)}", "steps=1", method="grpo_process")
    lines = run.lines(tmp_path / "chat.jsonl")
    outputs, rewards, advantages = run.tables(1)
    assert len(lines) == len(outputs) == 12
    for line, row in zip(lines, outputs, strict=True):
        key = (line["question_id"], line["sample"])
        assert key == (row["question_id"], row["sample"])
        assert line["policy"] == _initial(run)
        assert line["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": line["question"] + "\nShow steps."},
            {"role": "assistant", "content": line["completion"]},
        ]
        assert line["prompt"] == f"[Be brief.] [{line['question']}\nShow steps.] = "
        assert line["step_rewards"] == rewards[key]["step_rewards"]
        tokens = advantages[key]
        assert line["advantage"] == (tokens[0] if tokens else None)
        assert line["token_advantages"] == (tokens if tokens and len(set(tokens)) > 1 else None)
    assert any(line["token_advantages"] for line in lines)


@pytest.mark.slow
def test_outputs_of_several_turns_have_their_messages_and_the_lengths_of_what_the_policy_wrote(tmp_path: Path) -> None:
    large = '{"count": 400, "shortest": 2, "longest": 2, "numbers": "large"}'
    prompt = {"chat": "tokenizer", "chat_template": TEMPLATE}
    settings = (f"data.demonstrations.chains={large}", f"data.train={large}", 'environment={"kind": "calculator"}')
    run = ran(
        tmp_path / "root",
        *settings,
        f"prompt={json.dumps(prompt)}",
        "data.demonstrations.authors="
        '{"careful": 0, "calls": 1, "drops_carries_and_borrows": 0, "drops_borrows": 0, "stops_early": 0}',
        "sft.max_steps=300",
        "steps=1",
    )
    lines, (outputs, _, _) = run.lines(tmp_path / "tools.jsonl"), run.tables(1)
    assert any(row["turns"] for row in outputs), "some output made a call"
    for line, row in zip(lines, outputs, strict=True):
        said = line["messages"][1:]
        assert "".join(message["content"] for message in said) == line["completion"] == row["text"]
        assert len([message for message in said if message["role"] == "assistant"]) == len(row["turns"] or [0])
        assert line["completion_tokens"] == sum(logprob is not None for logprob in row["logprobs"])
        assert line["policy"] == _initial(run)
    made = run.lines(tmp_path / "atif.jsonl", "--format", "atif")
    assert len(made) == len(outputs)
    for trajectory, row in zip(made, outputs, strict=True):
        check(trajectory)
        turns = trajectory["steps"][1:]
        spans = [(span["start"], span["end"]) for span in row["turns"] or ()] or [(0, len(row["output_ids"]))]
        assert [step["metrics"]["completion_token_ids"] for step in turns] == [
            row["output_ids"][start:end] for start, end in spans
        ]
        assert [bool(step.get("tool_calls")) for step in turns[:-1]] == [True] * (len(spans) - 1)


def test_demonstrations_in_the_place_of_outputs_have_no_policy_and_no_reward(tmp_path: Path) -> None:
    run = ran(tmp_path / "root", "steps=1", method="sft")
    lines = run.lines(tmp_path / "sft.jsonl")
    outputs, _, advantages = run.tables(1)
    assert [line["completion"] for line in lines] == [row["text"] for row in outputs]
    for line in lines:
        assert (line["policy"], line["answer"]) == (None, None)
        assert line["question"].startswith("Compute ")
        assert line["advantage"] == advantages[line["question_id"], line["sample"]][0] == 1.0


def test_outputs_that_are_gone_are_refused_by_their_step(
    plain: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(plain.places.root, tmp_path / "root")
    run = left_in(tmp_path / "root")
    with use_store(run.store):
        run.store.prune(run.ledger.steps[1]["keep_informative"])
    assert run.export(tmp_path / "all.jsonl") == 2
    said = capsys.readouterr().err
    assert "step 1: " in said
    assert not (tmp_path / "all.jsonl").exists()
    assert {line["step"] for line in run.lines(tmp_path / "two.jsonl", "--step", "2")} == {2}


def _initial(run: Ran) -> str:
    return next(call.digest for call in run.ledger.calls.values() if call.stage == "supervised_finetuning")
