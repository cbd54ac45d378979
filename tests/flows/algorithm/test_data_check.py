"""Data that a run would fail of is found by `cohort check` and at the start, not when it is drawn."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.algorithm.data import limit_data, prepare_data, room_of, shortages
from flows.algorithm.data_check import answer_kinds, examine_data
from flows.algorithm.models import base_model
from flows.cli import run_command
from flows.config import IterativeRLConfig
from flows.config.recipes import arithmetic_smoke, gsm8k_cpu
from flows.config.resolve import choose
from pipeline.config import ConfigError
from pipeline.store import Store
from stages.data import PromptLengths, PromptRoom

LONG = "What is " + "1 + " * 40 + "1?"
QUESTIONS = [f"What is {number} + 1?" for number in range(8)]
WINDOW, LONGEST_OUTPUT = 96, 32


def write(path: Path, questions: list[str]) -> None:
    rows = [{"question": text, "answer": "1", "solution": f"{number}"} for number, text in enumerate(questions)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config(folder: Path, train: list[str], test: list[str], **changes: Any) -> IterativeRLConfig:
    """GSM8K's recipe on a handful of questions, one token a character, prompts of at most 64 tokens."""
    write(folder / "gsm8k_train.jsonl", train)
    write(folder / "gsm8k_test.jsonl", test)
    small = {
        "data.path": str(folder),
        "policy.tokenizer.kind": "character",
        "policy.settings": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "max_position_embeddings": WINDOW,
        },
        "rollout.max_output_tokens": LONGEST_OUTPUT,
        "questions_per_step": 4,
        "sft": None,
    }
    return gsm8k_cpu().override(small | changes)


def prepared(config: IterativeRLConfig) -> Any:
    data = prepare_data(config.data)
    return limit_data(config, data, base_model(config, data))


def test_a_chat_template_without_the_role_tool_is_found_where_answers_are_messages() -> None:
    template = "{% for m in messages if m.role != 'tool' %}{{ m.content }}=+{% endfor %}{{ '\n' }}"
    calls = {"kind": "tool_calls", "opens": "m", "closes": ".", "tools": [{"kind": "calculator"}]}
    prompt = {"chat": "tokenizer", "chat_template": template}
    given = arithmetic_smoke().override(
        {"data.demonstrations.chains.count": 64, "prompt": prompt, "environment": calls}
    )
    (complaint,) = examine_data(given).complaints
    assert complaint.startswith("environment: ")
    assert "role tool" in complaint
    template = template.replace(" if m.role != 'tool'", "")
    assert not examine_data(given.override({"prompt.chat_template": template})).complaints


@pytest.mark.claim("prompts too long, questions too few")
@pytest.mark.parametrize(
    ("train", "test", "changes", "complaint"),
    [
        ([*QUESTIONS, LONG], QUESTIONS, {}, "data.train: 1 of 9 questions have prompts above 64 tokens"),
        (QUESTIONS, [LONG], {}, "data.evaluation.test: 1 of 1 questions have prompts above 64 tokens"),
        (QUESTIONS, QUESTIONS, {"data.max_prompt_tokens": 8}, "data.train: 8 of 8 questions have prompts above 8"),
        (QUESTIONS, QUESTIONS, {"prompt.prefix": "x" * 60}, "data.train: 8 of 8 questions have prompts above 64"),
        (QUESTIONS, [LONG], {"data.max_prompt_tokens": "drop"}, "data.evaluation.test: 1 of 1 questions"),
        (QUESTIONS, QUESTIONS, {"rollout.max_output_tokens": WINDOW}, "prompts above 0 tokens"),
        (QUESTIONS, ["What is é?"], {}, "data.evaluation.test: the tokenizer cannot express the character 'é'"),
        (
            QUESTIONS,
            QUESTIONS,
            {"rollout.stop_strings": ["é"]},
            "rollout.stop_strings: expected text that the policy's",
        ),
        (
            QUESTIONS,
            QUESTIONS,
            {"rollout.stop_ids": [4000]},
            "rollout.stop_ids: expected ids of the policy's tokenizer",
        ),
        (QUESTIONS, QUESTIONS, {"questions_per_step": 9}, "questions_per_step=9 draws more than the 8 questions"),
        (
            [*QUESTIONS[:3], LONG],
            QUESTIONS[:3],
            {"data.max_prompt_tokens": "drop"},
            "questions_per_step=4 draws more than the 3 questions",
        ),
    ],
)
def test_what_a_run_would_fail_of_is_found_by_check_and_at_its_start(
    store: Store, tmp_path: Path, train: list[str], test: list[str], changes: dict[str, Any], complaint: str
) -> None:
    given = config(tmp_path, train, test, **changes)
    assert any(complaint in text for text in examine_data(given).complaints), examine_data(given)
    with pytest.raises(ValueError, match=re.escape(complaint)):
        prepared(given)


def test_stops_that_the_built_in_worlds_tokenizer_cannot_write_are_found() -> None:
    given = arithmetic_smoke().override({"data.demonstrations.chains.count": 64, "rollout.stop_strings": ["+", "é"]})
    (complaint,) = examine_data(given).complaints
    assert complaint.startswith("rollout.stop_strings: ")
    assert "'é'" in complaint
    assert not examine_data(given.override({"rollout.stop_strings": ["+"]})).complaints


def test_ends_of_calls_that_the_tokenizer_cannot_write_are_found() -> None:
    given = arithmetic_smoke().override({"data.demonstrations.chains.count": 64, "environment": {"kind": "calculator"}})
    (complaint,) = examine_data(given).complaints  # no author of this mixture calls, so that no token is a bracket
    assert complaint.startswith("environment: ")
    assert "']'" in complaint
    assert not examine_data(given.override({"environment.opens": "m", "environment.closes": "."})).complaints


@pytest.mark.claim("prompts too long, questions too few")
def test_long_prompts_are_left_out_of_every_set_with_their_demonstrations(store: Store, tmp_path: Path) -> None:
    given = config(tmp_path, [LONG, *QUESTIONS], [QUESTIONS[0], LONG], **{"data.max_prompt_tokens": "drop"})
    with pytest.warns(UserWarning, match=r"data\.train: 1 of 9 questions are left out") as warned:
        data = prepared(given)
    assert "data.evaluation.test: 1 of 2 questions are left out" in str([str(warning.message) for warning in warned])
    assert [row["question"] for row in data.train.rows()] == QUESTIONS
    assert [row["question"] for row in data.demonstrations.rows()] == QUESTIONS
    assert [row["question"] for row in data.evaluation["test"].rows()] == [QUESTIONS[0]]
    found = examine_data(given)
    assert not found.complaints
    assert found.sizes == {"train": 8, "evaluation.test": 1}
    assert "data.train: 1 questions are left out, 8 stay" in found.notes


@pytest.mark.parametrize("given", ["drop", 30, "{tokens: 30, longer: drop}", "{longer: drop}"])
def test_a_limit_is_a_number_a_policy_or_both_and_errors_say_what_to_set(tmp_path: Path, given: Any) -> None:
    config(tmp_path, QUESTIONS, QUESTIONS)
    settings = [f"data.path={tmp_path}", f"data.max_prompt_tokens={given}"]
    limit = choose("gsm8k_cpu", settings=settings).config.data.max_prompt_tokens
    assert (limit.tokens, limit.longer) == (
        30 if "30" in str(given) else None,
        "drop" if "drop" in str(given) else "refuse",
    )
    room = PromptRoom(WINDOW, None, LONGEST_OUTPUT, limit)
    advice = re.search(r"set (data\.max_prompt_tokens='.*?') to", PromptLengths(70, 0, [0]).complaint(["a"], room))
    assert advice is not None
    followed = choose("gsm8k_cpu", settings=[*settings, advice[1].replace("'", "")]).config.data.max_prompt_tokens
    assert followed == limit.override({"longer": "drop"})


def test_sets_of_which_all_fits_are_the_very_same_artifacts(store: Store, tmp_path: Path) -> None:
    given = config(tmp_path, QUESTIONS, QUESTIONS)
    data = prepare_data(given.data)
    limited = limit_data(given, data, base_model(given, data))
    assert (limited.train, limited.demonstrations, limited.evaluation) == (
        data.train,
        data.demonstrations,
        data.evaluation,
    )
    longest = max(len(question) for question in QUESTIONS) + 1  # and the newline of the recipe's suffix
    assert limited.train.metrics == {"data/questions": 8, "data/dropped": 0, "data/longest_prompt": longest}


def test_a_prompt_as_long_as_the_limit_fits(store: Store, tmp_path: Path) -> None:
    longest = max(len(question) for question in QUESTIONS) + 1
    assert not examine_data(config(tmp_path, QUESTIONS, QUESTIONS, **{"data.max_prompt_tokens": longest})).complaints
    assert examine_data(config(tmp_path, QUESTIONS, QUESTIONS, **{"data.max_prompt_tokens": longest - 1})).complaints


def test_an_engine_that_reads_less_than_the_model_bounds_prompts_too(tmp_path: Path) -> None:
    engine = {"kind": "vllm", "max_model_len": 50}
    given = config(tmp_path, QUESTIONS, QUESTIONS, **{"rollout.backend": engine})
    evaluated = given.override({"evaluation.backend": {"kind": "vllm", "max_model_len": 40}})
    assert room_of(given, "train", WINDOW).tokens == 50 - LONGEST_OUTPUT
    assert room_of(evaluated, "train", WINDOW).tokens == 50 - LONGEST_OUTPUT
    assert room_of(evaluated, "evaluation.test", WINDOW).tokens == 40 - LONGEST_OUTPUT
    assert room_of(given, "train", 45).tokens == 45 - LONGEST_OUTPUT


@pytest.mark.parametrize(
    ("changes", "counts", "key"),
    [
        ({}, (4, 4), None),
        ({}, (3, 4), "questions_per_step"),
        ({"curriculum": {}}, (4, 4), "questions_per_step"),
        ({"curriculum": {}}, (5, 5), None),
        ({"data_source": "demonstrations", "update.old_logprobs": "trainer"}, (1, 15), "questions_per_step"),
        ({"sft.batch_size": 5}, (4, 4), "sft.batch_size"),
        ({"reward_model": {"questions": 5}}, (4, 4), "reward_model.questions"),
    ],
)
def test_whatever_draws_more_than_there_is_is_named(
    changes: dict[str, Any], counts: tuple[int, int], key: str | None
) -> None:
    base = arithmetic_smoke().override({"sft.batch_size": 4})
    if "data_source" in changes:
        changes = {**changes, "update.objective": {"kind": "sft"}, "advantage": {"kind": "one"}}
    found = list(shortages(base.override(changes), *counts))
    assert [text.partition("=")[0] for text in found] == ([key] if key else [])


def test_the_built_in_world_too_has_enough_questions_for_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["check", "arithmetic_smoke", "--set", "questions_per_step=65"]) == 2
    assert "questions_per_step=65 draws more than the 64 questions" in capsys.readouterr().err


@pytest.mark.parametrize(("room", "faults"), [(19, 0), (18, 0), (17, 2), (0, 2), (-5, 2)])
def test_the_built_in_world_s_longest_question_leaves_room_for_an_output(room: int, faults: int) -> None:
    """Sixteen chains of up to four numbers: `Compute 12+34-56.` is as long as any; the recipe's newline is the 18th token."""
    sets = {"shortest": 3, "longest": 4, "count": 16}
    window = 256
    changes = {"data.train": sets, "data.evaluation": {"in_domain": sets}, "rollout.max_output_tokens": window - room}
    found = examine_data(arithmetic_smoke().override(changes)).complaints
    assert len(found) == faults
    assert all("its longest prompt has 18 tokens" in complaint for complaint in found)


def test_check_reads_data_without_torch_and_says_what_it_found(tmp_path: Path) -> None:
    config(tmp_path, [*QUESTIONS, LONG], QUESTIONS)
    code = (
        "import sys; from flows.cli import run_command; code = run_command(sys.argv[1:]);"
        "print('TORCH' if 'torch' in sys.modules else 'LIGHT'); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "check", "gsm8k_cpu", "--set", f"data.path={tmp_path}"],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert "data.train: 9 questions" in done.stdout
    assert done.stdout.splitlines()[-1] == "LIGHT"
    assert "questions_per_step=16 draws more than the 9 questions of data.train" in done.stderr


def test_data_that_is_not_here_is_said_and_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["check", "gsm8k_cpu", "--set", f"data.path={tmp_path}"]) == 0
    assert "data.train: not read" in capsys.readouterr().out


def test_faults_of_every_set_are_listed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config(tmp_path, QUESTIONS, QUESTIONS)
    (tmp_path / "gsm8k_train.jsonl").write_text('{"question": "q", "answer": NaN}\n')
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "q"}\n')
    assert run_command(["check", "gsm8k_cpu", "--set", f"data.path={tmp_path}"]) == 2
    errors = capsys.readouterr().err
    assert "data.train: " in errors
    assert "data.evaluation.test: " in errors


@pytest.mark.parametrize("name", ["..", "a/b", "", "A", "-a", "a b", "a\x1b[31m", "x" * 65, "$(id)"])
@pytest.mark.parametrize("recipe", [arithmetic_smoke, gsm8k_cpu])
def test_names_of_held_out_sets_are_those_of_runs(recipe: Any, name: str) -> None:
    values = recipe().model_dump(mode="json")
    part = next(iter(values["data"]["evaluation"].values()))
    values["data"]["evaluation"] = {name: part}
    with pytest.raises(ConfigError, match="evaluation"):
        IterativeRLConfig.parse(values)


def test_a_prompt_is_printed_as_text_and_ids(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--set", "data.demonstrations.chains.count=64", "--set", "prompt.prefix=<|endoftext|>"]
    question = "Compute 12+7."
    assert run_command(["prompt", "arithmetic_smoke", "--question", question, *small]) == 0
    out = capsys.readouterr().out
    assert f"'<|endoftext|>{question}\\n'" in out
    assert f"{len(question) + 2} tokens, 1 of them special" in out
    assert "       0  '<|endoftext|>'  special" in out
    ids = json.loads(out.partition("ids\n")[2].splitlines()[0])
    assert len(ids) == len(question) + 2


def test_a_prompt_of_a_question_that_cannot_be_expressed_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--set", "data.demonstrations.chains.count=64"]
    assert run_command(["prompt", "arithmetic_smoke", "--question", "\x1b[31m", *small]) == 1
    errors = capsys.readouterr().err
    assert "cannot express the character" in errors
    assert "\x1b" not in errors


# ------------------------------------------------------------------------------------------------ what no run can use


def instructed(folder: Path, *, ends: int) -> Path:
    """A model whose chat template ends an answer with `<|im_end|>`, and whose outputs end at the token `ends`."""
    pytest.importorskip("gguf", reason="the extra gguf")
    from tests.stages.models.gguf_files import write_gguf

    return write_gguf(folder / f"ends{ends}.gguf", eos=ends)


def of_model(folder: Path, model: Path, **changes: Any) -> IterativeRLConfig:
    given = config(folder, ["the 1", "the 2", "the 3", "the 4"], ["the 5"])
    settings = {"policy": {"kind": "pretrained", "path": str(model)}, "prompt": {"chat": "tokenizer"}}
    return given.override(settings | {"rollout.max_output_tokens": 8} | changes)


def test_a_base_model_under_a_chat_template_is_refused_with_the_token(tmp_path: Path) -> None:
    assert examine_data(of_model(tmp_path, instructed(tmp_path, ends=2))).complaints == []
    base = of_model(tmp_path, instructed(tmp_path, ends=0))
    assert [text for text in examine_data(base).complaints if "'<|im_end|>'" in text and "<|endoftext|>" in text]
    assert examine_data(base.override({"prompt": {"chat": "none"}})).complaints == []
    assert examine_data(base.override({"rollout.stop_ids": [2]})).complaints == []


def test_a_model_without_a_chat_template_is_refused_where_one_is_asked(tmp_path: Path) -> None:
    asked = config(tmp_path, QUESTIONS, QUESTIONS, **{"prompt": {"chat": "tokenizer"}})
    assert [text for text in examine_data(asked).complaints if "no chat template" in text]


def test_questions_beyond_the_window_of_a_gguf_file_are_refused(tmp_path: Path) -> None:
    long = of_model(tmp_path, instructed(tmp_path, ends=2), **{"rollout.max_output_tokens": 60})
    assert [text for text in examine_data(long).complaints if "the model's window of 64" in text]


def test_a_damaged_gguf_file_is_a_complaint_and_no_note(tmp_path: Path) -> None:
    (broken := tmp_path / "broken.gguf").write_bytes(b"GGUF\x03")
    assert [text for text in examine_data(of_model(tmp_path, broken)).complaints if "cut off" in text]


def test_answers_are_told_apart_by_how_they_are_compared() -> None:
    answers = [
        "1,234.5",
        "#### 7",
        r"\boxed{12}",
        "(C)",
        "x^2 + 1",
        "Paris",
        "It depends on what the reader means by it.",
    ]
    assert answer_kinds(answers) == {"number": 3, "option": 1, "formula": 1, "name": 1, "sentence": 1}


def test_a_set_whose_answers_are_all_sentences_is_refused(tmp_path: Path) -> None:
    given = config(tmp_path, QUESTIONS, QUESTIONS)
    rows = [{"question": text, "answer": "It depends on what the reader means by it."} for text in QUESTIONS]
    (tmp_path / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [text for text in examine_data(given).complaints if "no answer can be compared" in text]
    rows[0]["answer"] = "7"
    (tmp_path / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert examine_data(given).complaints == []


def test_a_disk_too_small_for_one_checkpoint_stops_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config(tmp_path, QUESTIONS, QUESTIONS)
    arguments = ["check", "gsm8k_cpu", "--set", f"data.path={tmp_path}", "--root", str(tmp_path / "root")]
    arguments += ["--set", "questions_per_step=4", "--set", "sft=null", "--set", "policy.tokenizer.kind=character"]
    assert run_command(arguments) == 0
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("flows.planning.request.shutil.disk_usage", lambda path: usage)
    assert run_command(arguments) == 2
    assert "1.0 kB are free" in " ".join(capsys.readouterr().err.split())
