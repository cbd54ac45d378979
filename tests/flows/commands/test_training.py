"""`cohort init`: a configuration that runs, from a model and a file; what no run can use is refused before sampling."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from flows.cli import run_command
from flows.config import IterativeRLConfig
from flows.config.resolve import choose
from flows.iterative_rl import iterative_rl
from flows.runs.curve import Points
from pipeline.events import recording
from pipeline.residency import evict
from pipeline.store import Store, use_store
from stages.text import CharacterTokenizerConfig, build_tokenizer
from stages.text.prompts import INSTRUCTIONS
from tests.end_to_end.terminal import terminal
from tests.stages.models.smollm import smollm
from tests.stages.training.tiny import tiny_model

__all__ = ["smollm"]
QUESTIONS = [{"question": f"What is {number} + {number}?", "answer": 2 * number} for number in range(1, 9)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model without a chat template, a token a character."""
    texts = ["Question: What is 0123456789 + ?\nAnswer:", *INSTRUCTIONS.values()]
    tokenizer = build_tokenizer(texts, CharacterTokenizerConfig())
    place = tmp_path / "model"
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=0).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def arguments(folder: Path, model: Path | str, rows: list[dict[str, Any]], *more: str) -> list[str]:
    given = {"model": model, "data": written(folder, rows), "out": folder / "run.yaml", "root": folder / "root"}
    return ["init", *(word for name, value in given.items() for word in (f"--{name}", str(value))), *more]


def test_what_is_written_is_valid_and_about_these_files(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(arguments(tmp_path, model, QUESTIONS, "--minutes", "1")) == 0
    out = tmp_path / "run.yaml"
    config = choose(str(out)).config
    assert (config.policy.path, config.data.path) == (str(model.resolve()), str(tmp_path.resolve()))
    assert (config.prompt.chat, config.sft, config.data.evaluation) == ("none", None, {})
    assert config.questions_per_step == len(QUESTIONS)
    assert config.reward.components[0].verifier == "exact"
    text = out.read_text()
    assert "had a signal" in text
    assert len(text.splitlines()) <= 45
    assert run_command(["check", str(out), "--root", str(tmp_path / "root")]) == 0
    assert Store(tmp_path / "root" / "store").root.is_dir(), "the model is there for the run"
    capsys.readouterr()
    assert run_command(arguments(tmp_path, model, QUESTIONS)) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (
            [{**row, "answer": "It depends on what the reader means by it."} for row in QUESTIONS],
            "no answer can be compared",
        ),
        (
            [{**row, "question": "What is 1 + " + "1 + " * 200 + "1?"} for row in QUESTIONS[:1]],
            "the model's window of 512",
        ),
        ([{"frage": "1?", "antwort": "1"}], "--question"),
        ([{**row, "question": "Qué?"} for row in QUESTIONS[:1]], "cannot express the character"),
    ],
    ids=["sentences", "window", "columns", "characters"],
)
def test_data_that_no_run_can_use_are_refused_before_sampling(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]], named: str
) -> None:
    assert run_command(arguments(tmp_path, model, rows)) == 2
    assert named in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run.yaml").exists()
    assert [file for file in (tmp_path / "root").rglob("*") if file.is_file()] == [], "nothing was computed"


def test_a_disk_too_small_for_a_checkpoint_is_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("flows.planning.request.shutil.disk_usage", lambda path: usage)
    assert run_command(arguments(tmp_path, model, QUESTIONS)) == 2
    assert "1.0 kB are free" in " ".join(capsys.readouterr().err.split())


def test_without_a_terminal_the_missing_options_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert run_command(["init", "--model", "model.gguf"]) == 2
    assert "--data, --out" in capsys.readouterr().err


def test_on_a_terminal_it_asks_for_what_is_not_given(tmp_path: Path, model: Path) -> None:
    with terminal(120) as window:
        process = window.start("init", "--model", str(model), "--root", str(tmp_path / "root"))
        window.wait_for(lambda text: "Questions (" in text)
        window.type(f"{written(tmp_path, [{'frage': '1?'}])}\n")
        window.wait_for(lambda text: "Configuration to write" in text)
        window.type(f"{tmp_path / 'run.yaml'}\n")
        assert process.wait(60) == 2


FACTS = {
    "What is 1 plus 1?": 2,
    "What is 2 plus 2?": 4,
    "How many days are in a week?": 7,
    "How many legs does a dog have?": 4,
    "How many months are in a year?": 12,
    "How many sides does a triangle have?": 3,
}


@pytest.mark.slow
def test_of_a_gguf_file_some_outputs_are_right_under_the_prompt_chosen(
    tmp_path: Path, smollm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": question, "answer": answer} for question, answer in FACTS.items()]
    assert run_command(arguments(tmp_path, smollm, rows)) == 0
    config = choose(str(tmp_path / "run.yaml")).config
    assert (config.prompt.chat, config.policy.path) == ("tokenizer", str(smollm.resolve()))
    right = [int(count) for count in re.findall(r"(\d+) of 24 right", capsys.readouterr().out)]
    assert max(right) > 0


CHOSEN = {
    "prompt": {
        "chat": "tokenizer",
        "instruction": "Think in one or two short sentences. End with `The answer is` and the answer.",
    },
    "steps": 8,
    "questions_per_step": 16,
    "rollout": {"G": 8, "max_output_tokens": 24, "temperature": 0.6},
    "reward": {"components": [{"kind": "accuracy", "verifier": "exact"}]},
    "update": {
        "training": {"optimizer": {"kind": "adamw", "learning_rate": 3e-4}, "adapter": {"r": 16}},
        "micro_batch_tokens": 4096,
    },
}
"""What `cohort init` wrote for these sums (docs/first-run.md), but for an adapter, its rate, and 8 of 20 steps."""


@pytest.mark.engines  # two minutes of a real model, nothing of vLLM
def test_a_real_model_learns_sums_with_an_adapter(tmp_path: Path, smollm: Path) -> None:
    sums = [{"question": f"What is {a} plus {b}?", "answer": a + b} for a in range(2, 12) for b in range(1, 9)]
    data = {"kind": "files", "path": str(written(tmp_path, sums).parent), "train": {"path": "questions.jsonl"}}
    policy = {"kind": "pretrained", "path": str(smollm)}
    values = {"name": "sums", "data": data | {"evaluation": {}}, "policy": policy, **CHOSEN}
    config, seen = IterativeRLConfig.parse(values, source="test"), Points()
    with use_store(Store(tmp_path / "store")), recording(seen.take):
        iterative_rl(config)
    evict()
    rewards = [seen.by_step[step]["reward/mean"] for step in range(1, 9)]
    assert rewards[0] > 0
    # Means of 256 and 384 outputs of 32 and 48 questions have standard errors of about 0.07.
    assert mean(rewards[-3:]) > mean(rewards[:2]) + 0.2
