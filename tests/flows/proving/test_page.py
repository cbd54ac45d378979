"""The page of `cohort prove`: whatever is in the result is in it as text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from flows.cli import run_command
from flows.proving.page import resumption_of, rows_of, write_page
from flows.proving.proof import is_proved

ARM = {
    "name": "hf, torch",
    "error": None,
    "seconds": 20.0,
    "sampling_tokens_per_s": 1234.0,
    "sampling_seconds": 2.0,
    "update_seconds": 4.0,
    "update_peak_mb": 500.0,
    "mismatch_mean": 0.0005,
    "mismatch_kl": 1e-7,
    "content": "a" * 64,
    "planned": {
        "rates": "cpu",
        "assumed": False,
        "sampling_seconds": 1.0,
        "update_seconds": 5.0,
        "update_flops": 1e9,
        "update_mfu": 0.415,
    },
}
FAILED = {"name": "vLLM", "error": "first\n<script>alert(1)</script>"}
RESUMED = {"error": None, "killed": True, "updates_before": 1, "updates_replayed": 1, "equal": True}


def result(*arms: dict[str, Any], resumed: dict[str, Any] = RESUMED) -> dict[str, Any]:
    return {
        "machine": {
            "system": "Linux <b>",
            "cpus": 2,
            "memory": 2**34,
            "gpus": [],
            "packages": {"torch": "2.13.0"},
        },
        "shape": {"questions": 4, "group": 4, "tokens": 16, "hidden": 64, "layers": 2, "vocabulary": 512, "steps": 3},
        "precision": "bf16",
        "rates": None,
        "engines": list(arms),
        "resumed": resumed,
        "seconds": 61.0,
    }


def test_a_row_has_the_ratio_of_the_plan_to_what_was_measured() -> None:
    assert rows_of(result(ARM)) == [["hf, torch", "1,234", "4.0 s", "41.5%", "500.0 MB", "0.0005", "0.50", "1.25"]]


def test_an_undefined_share_is_a_dash() -> None:
    unknown = ARM | {"planned": ARM["planned"] | {"update_mfu": None}}  # type: ignore[operator]
    assert rows_of(result(unknown))[0][3] == "-"


def test_an_engine_that_failed_is_a_row_with_its_last_words_and_no_proof() -> None:
    assert rows_of(result(FAILED))[0][:3] == ["vLLM", "failed: <script>alert(1)</script>", "-"]
    assert is_proved(result(ARM))
    assert not is_proved(result(ARM, FAILED))
    assert not is_proved(result(ARM, resumed={"error": "x"}))


@pytest.mark.parametrize(
    ("resumed", "said"),
    [
        (RESUMED, "killed after 1 of 3 updates, resumed (1 replayed), and ended with equal bits"),
        (RESUMED | {"equal": False}, "other bits"),
        (RESUMED | {"killed": False}, "had ended before"),
        ({"error": "a\nno space"}, "failed: no space"),
    ],
)
def test_how_the_killed_run_went_on_is_said(resumed: dict[str, Any], said: str) -> None:
    assert said in resumption_of(result(ARM, resumed=resumed))


def test_the_page_has_no_markup_but_its_own(tmp_path: Path) -> None:
    write_page(result(ARM, FAILED), tmp_path / "prove.html")
    page = (tmp_path / "prove.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "Linux &lt;b&gt;" in page
    assert "default-src 'none'" in page
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["vLLM", "Packages"]


@pytest.mark.parametrize("option", [["--minutes", "0"], ["--vllm-python", "/nowhere/python"]])
def test_bad_options_are_refused_by_name(tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["prove", "--out", str(tmp_path / "out"), *option]) == 2
    assert option[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
