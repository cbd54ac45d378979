"""The recipes for GPUs: they are valid, and what the tests run of them is the same flow at another size."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path

import pytest

from flows.cli import run_command
from flows.config.recipes import RECIPES
from pipeline.config import flatten
from tests.flows.tiny import SIZES, VLLM_ON_A_CPU, tiny

NUMBER = re.compile(r'=\(?-?\d|^ {12}"[\w.]+": \d')
SOURCE = re.compile(r"#.*(\b[oO]urs\b|[2-5]\.\d|Fig\. \d|README|Algorithm|questions|--set|\bverl\b|Dr\. GRPO)")


@pytest.mark.parametrize("recipe", SIZES)
def test_a_recipe_is_valid_with_ones_own_folders(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--set", f"data.path={tmp_path}", "--set", f"policy.path={tmp_path}"]
    assert run_command(["check", recipe, *settings]) == 0
    assert f"{recipe} is valid; it differs from {recipe} in" in capsys.readouterr().out
    assert run_command(["check", recipe, *settings, "--set", "update.training.engine.ranks=100000"]) == 2


@pytest.mark.parametrize("recipe", SIZES)
def test_at_tiny_size_a_recipe_differs_in_the_values_listed_only(recipe: str, tmp_path: Path) -> None:
    full = flatten(RECIPES[recipe]().model_dump(mode="json"))
    small = flatten(tiny(recipe, tmp_path, VLLM_ON_A_CPU).model_dump(mode="json"))
    differing = {key for key in full.keys() | small.keys() if full.get(key) != small.get(key)}
    listed = {*SIZES[recipe], *VLLM_ON_A_CPU, "data.path", "policy.path", "reward_model.trunk.path"}
    assert differing <= listed
    # One GPU has 1 already, and no reward model.
    assert listed - differing <= {"rollout.backend.tensor_parallel_size", "reward_model.trunk.path"}
    assert not any(key.endswith("kind") for key in listed)
    with_hf = flatten(tiny(recipe, tmp_path).model_dump(mode="json"))
    also = {key for key in full.keys() | with_hf.keys() if full.get(key) != with_hf.get(key)} - listed
    assert all(key.startswith("rollout.backend.") for key in also)


@pytest.mark.parametrize("module", ["gsm8k", "deepseekmath", "qwen"])
def test_every_number_of_a_recipe_has_its_source_in_its_line_or_above_it(module: str) -> None:
    found = importlib.util.find_spec(f"flows.config.recipes.{module}")
    assert found is not None
    assert found.origin is not None
    lines = Path(found.origin).read_text(encoding="utf-8").splitlines()
    without_reason = [
        line.strip()
        for above, line in itertools.pairwise(lines)
        if NUMBER.search(line) and not SOURCE.search(line) and not SOURCE.search(above)
    ]
    assert without_reason == []
