from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.cli import run_command


def test_the_command_prints_one_json_object_whose_parts_add_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["plan", "arithmetic_smoke", "--json", "--root", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    stages = found["stages"]
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] * stage["calls"] for stage in stages))
    assert found["peak"] == pytest.approx(found["overhead"] + max(stage["peak"] for stage in stages))
    assert found["calls"]["total"] == 49
    assert any("--mean-output-tokens" in text for text in found["assumptions"])


def test_the_command_says_that_a_run_does_not_fit_and_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "deepseekmath_7b", "--gpus", "8", "--gpu-memory", "24", "--root", str(tmp_path)]
    assert run_command(command) == 1
    printed = capsys.readouterr().out
    assert "does not fit by" in printed
    assert "0 of" in printed
    assert "assumed" in printed
