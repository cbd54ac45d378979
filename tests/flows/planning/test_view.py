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


@pytest.mark.parametrize(("gpus", "nodes", "copies"), [(8, 1, 8), (8, 2, 8), (2, 1, 2)])
def test_the_reference_of_every_rank_is_named_as_memory_of_the_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gpus: int, nodes: int, copies: int
) -> None:
    """14,660,091,904 bytes are 13.7 GiB: the 7B model, its linear layers in bfloat16."""
    command = ["plan", "deepseekmath_7b", "--gpus", str(gpus), "--nodes", str(nodes), "--gpu-memory", "200", "--json"]
    run_command([*command, "--root", str(tmp_path)])
    said = json.loads(capsys.readouterr().out)["assumptions"]
    assert any(f"pinned memory of the host, {copies} x 13.7 GiB" in text for text in said)


def test_on_a_cpu_no_other_memory_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", "gsm8k_cpu", "--json", "--root", str(tmp_path)]) == 0
    assert not any("pinned" in text for text in json.loads(capsys.readouterr().out)["assumptions"])
