"""Names of reward components: none of another metric's, as the code logs them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stages.reward import AccuracyConfig, FormatConfig, LanguageConfig, RewardConfig, StepsConfig
from stages.reward.composition import Tally
from stages.reward_metrics import RESERVED, STATUSES

REPOSITORY = Path(__file__).parents[2]
_METRIC = re.compile(r"""["']reward/([a-z][a-z_]*)["'{]""")


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_no_component_takes_the_name_of_another_metric(name: str) -> None:
    with pytest.raises(ValueError, match=f"a component is named '{name}', and reward/{name} is another metric"):
        RewardConfig(components=(AccuracyConfig(), FormatConfig(name=name)))


def test_every_metric_of_rewards_in_the_code_is_reserved() -> None:
    files = [file for folder in ("stages", "flows") for file in (REPOSITORY / folder).rglob("*.py")]
    named = {name for file in files for name in _METRIC.findall(file.read_text(encoding="utf-8"))}
    assert {"mean", "faults", "frac_masked", "status_ok", "rule"} <= named
    beginnings = {name for name in named if name.endswith("_") and any(full.startswith(name) for full in RESERVED)}
    assert named - beginnings <= RESERVED


def test_what_the_stage_logs_of_itself_is_reserved() -> None:
    logged = {name.removeprefix("reward/") for name in Tally([]).metrics()}
    assert {f"status_{status}" for status in STATUSES} <= logged <= RESERVED


def test_the_default_names_of_components_and_similar_ones_are_allowed() -> None:
    names = ("means", "status", "status-ok", "frac", "models", "mean_length")
    own = tuple(FormatConfig(name=name) for name in names)
    made = RewardConfig(components=(AccuracyConfig(), LanguageConfig(), StepsConfig(), *own))
    assert {part.name for part in made.components}.isdisjoint(RESERVED)
