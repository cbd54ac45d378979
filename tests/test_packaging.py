"""What an installation gets: every file that the packages read, and nothing of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("pipeline", "stages", "flows")


def test_a_wheel_holds_templates_and_styles_beside_the_code() -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling builds the wheel")
    packed = {file.distribution_path for file in wheel.WheelBuilder(str(REPOSITORY)).recurse_included_files()}
    assert {"flows/experiments/report/report.html.j2", "flows/experiments/report/style.css"} <= packed
    there = {
        file.relative_to(REPOSITORY).as_posix()
        for package in PACKAGES
        for file in (REPOSITORY / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert packed == there
