"""What of the arms is not as in the paper: in all of them, and in some."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from flows.config import IterativeRLConfig
from flows.experiments.report.cells import Grid, setting
from flows.experiments.results import ExperimentResult
from flows.looking.faithful import deviations
from flows.places import Places

__all__ = ["arm_configs", "deviation_tables"]

Row = tuple[str, str, str, str]
"""Field, the paper's value, where it stands, the value here."""


def arm_configs(result: ExperimentResult, places: Places) -> dict[str, IterativeRLConfig]:
    """The configuration of every arm with the first of its seeds that ran; arms that never ran are left out."""
    configs: dict[str, IterativeRLConfig] = {}
    for run in result.runs:
        file = places.runs / run.folder / "config.yaml"
        if run.arm not in configs:
            with contextlib.suppress(OSError, ValueError):
                configs[run.arm] = IterativeRLConfig.from_yaml(file.read_text(encoding="utf-8"), source=str(file))
    return configs


def deviation_tables(result: ExperimentResult, places: Places) -> Iterator[Grid]:
    """Deviations that all arms have, then those of some, with the arms; none where there is nothing to say."""
    configs = arm_configs(result, places)
    found: dict[Row, list[str]] = {}
    for arm, config in configs.items():
        for part in deviations(config):
            found.setdefault((part.key, part.paper, part.where, setting(part.here)), []).append(arm)
    headings = ["field", "paper", "section", "here"]
    everywhere = [list(row) for row, arms in found.items() if len(arms) == len(configs)]
    some = [[*row, ", ".join(arms)] for row, arms in sorted(found.items()) if len(arms) < len(configs)]
    missing = [arm.name for arm in result.arms if arm.name not in configs]
    notes = [f"not looked at, since no run of it is there: {', '.join(missing)}"] if missing else []
    if everywhere or notes:
        yield Grid("In every arm", headings, everywhere, notes, numbers=False)
    if some:
        yield Grid("In some arms", [*headings, "arms"], some, numbers=False)
