from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import plan


@pytest.mark.slow
def test_the_memory_of_the_demos_stages_is_planned_within_15_percent(tmp_path: Path) -> None:
    """Three stages of 0.35 M parameters in processes of their own, as `python -m benchmarks.plan --quick --no-bench`."""
    plan.main(["--quick", "--no-bench", "--scratch", str(tmp_path), "--out", str(tmp_path / "found.json")])
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert {row["case"] for row in rows} == {"sft, 0.35 M", "update, 0.35 M", "rollout, 0.35 M"}
    for row in rows:
        assert row["mib"] > 20
        assert row["planned_mib"] == pytest.approx(row["mib"], rel=0.15), row["case"]
