"""Options of commands that another option, or what they are given, would leave without effect: refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.cli import run_command
from flows.config.recipes import arithmetic_smoke
from flows.runs.paths import Places
from flows.runs.record import RunRecord
from pipeline.store import use_store
from stages.data import ArithmeticConfig, arithmetic_questions


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["deploy", "arithmetic_smoke", "--timezone", "Europe/Berlin"],
            "--timezone Europe/Berlin: says what the hours of",
        ),
        (["deploy", "arithmetic_smoke", "--name", ""], "--name '': expected a lower-case letter"),
        (["deploy", "arithmetic_smoke", "--restarts", "-1"], "--restarts"),
        (["worker", "--limit", "0"], "--limit"),
        (["export", "x", "y", "--adapter", "--dtype", "float32"], "leave out --dtype and --shard-gb"),
        (["export", "x", "y", "--adapter", "--shard-gb", "1"], "leave out --dtype and --shard-gb"),
        (["export", "x", "y", "--base", "z"], "export one with --adapter"),
        (["export", "x", "y", "--step", "1"], "--step is read with --completions"),
        (["export", "x", "y", "--format", "atif"], "--format is read with --completions"),
        (["export", "x", "y", "--completions", "--dtype", "float32"], "--completions writes no weights"),
        (["export", "x", "y", "--completions", "--adapter"], "--completions writes no weights"),
        (["export", "x", "y", "--completions", "--step", "0"], "--step"),
        (["lineage", "abc", "--mermaid", "--depth", "2"], "--depth: is of the tree"),
        (["lineage", "abc", "--depth", "-1"], "--depth"),
        (["doctor", "--bench", "--vllm-python", "python"], "--bench measures the machine"),
        (["doctor", "--bench", "--quick"], "--bench measures the machine"),
        (["doctor", "--quick", "--vllm-python", "python"], "leave out --vllm-python or --quick"),
        (["doctor", "--set", "seed=1"], "--config and --set change a recipe"),
        (["experiments", "--quick"], "sizes of one experiment; name it"),
        (["compare", "arithmetic_smoke", "--set", "method=ppo"], "would replace that of the arms sft, rft"),
        (["ablate", "fig5", "--set", "method=ppo"], "would replace that of the arms rft"),
        (["ablate", "fig5", "--set", "seed=3"], "--set seed: the seeds of an experiment are given by --seeds"),
        (["show", "arithmetic_smoke", "--full"], "--full: is of the stage that made an artifact"),
        (["show", "arithmetic_smoke", "--question", "q"], "give --step too"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunRecord.begin(Places.under(tmp_path), arithmetic_smoke(), command="", engine="inline")
    root = [] if arguments[0] == "experiments" else ["--root", str(tmp_path)]
    assert run_command([*arguments, *root]) in (1, 2)
    captured = capsys.readouterr()
    assert said in " ".join((captured.out + captured.err).split())


def test_a_seed_in_a_file_for_all_arms_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "seed.yaml"
    file.write_text("seed: 3\n")
    assert run_command(["ablate", "fig5", "--config", str(file), "--root", str(tmp_path), "--dry-run"]) == 2
    assert f"{file} seed: the seeds of an experiment are given by --seeds" in capsys.readouterr().err.replace("\n", " ")


def test_a_question_of_an_artifact_without_groups_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with use_store(Places.under(tmp_path).open_store()):
        questions = arithmetic_questions(ArithmeticConfig(count=2))
    assert run_command(["show", questions.digest, "--question", "x", "--root", str(tmp_path)]) == 2
    assert "has no groups of outputs" in capsys.readouterr().err
