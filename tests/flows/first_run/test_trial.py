"""The sizes that `cohort init` chooses are those of the plan: what fits the memory, then what fits the time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flows.config import IterativeRLConfig
from flows.config.resolve import choose
from flows.first_run.trial import sizes_for
from flows.planning.plan import plan_of
from flows.planning.request import Request, subject_of
from flows.runs.paths import Places
from pipeline.config import ConfigError

LENGTHS = Request(device="a100-80g", gpus=1, gpu_memory=80, mean_output_tokens=60, prompt_tokens=60)


@pytest.fixture
def half_a_billion() -> IterativeRLConfig:
    """A model of a known shape, that is not here; nothing is evaluated."""
    changes = {
        "rollout": {"max_output_tokens": 128, "backend": {"kind": "hf", "dtype": "float32"}},
        "data.evaluation": {},
        "update.training": {"optimizer": {"kind": "adamw"}, "precision": "fp32"},
        "update.micro_batch_tokens": 4096,
        "reference_pass": "inline",
    }
    return choose("gsm8k_one_gpu").config.override(changes)


def test_the_steps_fill_the_time_by_the_plan(half_a_billion: IterativeRLConfig, tmp_path: Path) -> None:
    found = sizes_for(half_a_billion, Places(tmp_path), LENGTHS, questions=100, minutes=6)
    step, _ = found.plan.of_a_step()
    assert found.plan.seconds <= 6 * 60 < found.plan.seconds + 2 * step
    assert found.plan.counts["step"] == found.settings["steps"]


def test_less_time_makes_steps_smaller_before_it_makes_them_few(
    half_a_billion: IterativeRLConfig, tmp_path: Path
) -> None:
    long, short = (
        sizes_for(half_a_billion, Places(tmp_path), LENGTHS, questions=100, minutes=minutes).settings
        for minutes in (100_000, 0.1)
    )
    assert (long["questions_per_step"], long["rollout.G"]) == (64, 16)
    assert (short["questions_per_step"], short["rollout.G"], short["steps"]) == (8, 8, 1)


def test_no_more_questions_are_drawn_than_there_are(half_a_billion: IterativeRLConfig, tmp_path: Path) -> None:
    found = sizes_for(half_a_billion, Places(tmp_path), LENGTHS, questions=3, minutes=100_000)
    assert found.settings["questions_per_step"] == 3


def test_what_the_plan_advises_is_taken_where_the_memory_is_short(
    half_a_billion: IterativeRLConfig, tmp_path: Path
) -> None:
    def found(gib: float) -> tuple[str, ...]:
        request = replace(LENGTHS, gpu_memory=gib)
        sizes = sizes_for(half_a_billion, Places(tmp_path), request, questions=100, minutes=100)
        config = half_a_billion.override(sizes.settings)
        assert plan_of(subject_of(config, Places(tmp_path), request).given).missing <= 0
        return sizes.remedies

    assert found(80) == ()
    assert found(9) != ()
    with pytest.raises(ConfigError, match="does not fit"):
        found(1)
