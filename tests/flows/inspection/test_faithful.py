"""`cohort check --faithful`: a configuration against the paper's numbers, one field at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from flows.cli import run_command
from flows.config import CurriculumConfig, IterativeRLConfig
from flows.config.methods import METHODS, method_settings
from flows.config.methods import PAPER as TABLE_10
from flows.config.recipes import RECIPES, deepseekmath_7b, gsm8k_cpu, gsm8k_one_gpu
from flows.inspection.faithful import PAPER, SILENT, PaperValue, choices, deviations
from stages.training import LoRAConfig
from tests.flows.short_runs import whole_method

DECISIONS = Path(__file__).parents[3] / "docs" / "decisions.md"

# As in the paper: reinforcement learning of an instructed model that others made, rewards by a learned process model.
RL = gsm8k_cpu().override(
    {
        "policy": {"kind": "pretrained", "path": "deepseek-math-7b-instruct"},
        "sft": None,
        "reward.components": [{"kind": "accuracy"}],
        "reward_model": {"models": [{"kind": "process"}]},
        "reward_model.step_labels": {"kind": "monte_carlo"},
        "evaluation.samples": 64,
    }
)
FAITHFUL = RL.override(
    {p.key: p.value for p in PAPER if not p.key.startswith("sft.") and "grpo" in (p.objectives or "grpo")}
    | {"reward_model.trunk": {"kind": "pretrained", "path": "deepseek-math-7b-base"}}
)

SFT = {"training": {"optimizer": {"kind": "adamw"}}}

OTHER: dict[str, Any] = {
    "update.training.optimizer.learning_rate": 3e-6,
    "update.objective.beta": 0.0,
    "rollout.G": 32,
    "rollout.max_output_tokens": 2048,
    "questions_per_step": 1024,
    "update.mu": 2,
    "update.mini_batches": 4,
    "iterations": 1,
    "update.training.adapter": LoRAConfig(r=16),
    "dynamic_sampling": 1,
    "curriculum": CurriculumConfig(),
    "overlap": 1,
    "update.correction.kind": "truncated",
    "update.objective.divergence": "k3_unbiased",
    "update.objective.aggregation": "token_mean",
    "advantage.baseline": "leave_one_out",
    "advantage.scale": "none",
    "advantage.kl_in_reward": 0.04,
    "prompt.template": "raw",
    "prompt.chat": "none",
    "reward_model.training.training.optimizer.learning_rate": 1e-5,
    "reward_model.trunk": "initial_policy",
    "reward_model.retrain": False,
    "reward_model.replay.share": 0.5,
    "evaluation.temperature": 1.0,
    "evaluation.samples": 128,
    "evaluation.estimates.ks": (1, 64),
    "sft.training.optimizer.learning_rate": 1e-5,
    "sft.training.schedule": "linear",
    "sft.training.adapter": LoRAConfig(r=16),
    "sft.batch_size": 64,
    "sft.max_steps": 10,
    "sft.stop_loss": 0.1,
    "sft.decay_steps": 5,
    "sft.aggregation": "token_mean",
}
"""Another value for each field that can have one in this configuration."""
NEEDS: dict[str, dict[str, Any]] = {
    "advantage.baseline": {"advantage.scale": "none"},
    "advantage.kl_in_reward": {"update.objective.beta": 0.0},
    "dynamic_sampling": {"reward_model": None},
    "overlap": {"update.old_logprobs": "rollout"},
    "sft.training.schedule": {"sft.training.total_steps": 500},
}
"""What must change with a field for the configuration to be valid."""


def keys(config: IterativeRLConfig) -> list[str]:
    return [part.key for part in deviations(config)]


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key a model may have, through all members of unions."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        for inner in models_in(field.annotation):
            yield from fields(inner, f"{prefix}{name}.")


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


KNOWN = dict(fields(IterativeRLConfig))


def test_the_recipe_of_the_paper_s_run_deviates_in_nothing() -> None:
    assert list(deviations(deepseekmath_7b())) == []


def test_the_recipe_of_one_gpu_says_what_it_has_otherwise() -> None:
    assert keys(gsm8k_one_gpu()) == [
        "reward_model",
        "reward.components",
        "rollout.G",
        "rollout.max_output_tokens",
        "questions_per_step",
        "iterations",
        "prompt.chat",
        "evaluation.temperature",
        "evaluation.samples",
        "evaluation.estimates.ks",
    ]
    adapted = gsm8k_one_gpu().override({"update.training.adapter.r": 8})
    assert set(keys(adapted)) - set(keys(gsm8k_one_gpu())) == {"update.training.adapter"}


def test_a_configuration_with_the_papers_numbers_does_not_deviate() -> None:
    assert deviations(FAITHFUL) == []


@pytest.mark.parametrize("paper", PAPER, ids=lambda paper: paper.key)
def test_each_field_that_is_changed_alone_is_listed_alone(paper: PaperValue) -> None:
    if paper.objectives == ("dpo",) or paper.key.endswith(("policy.kind", "data.kind", "step_labels.kind")):
        pytest.skip("has a test of its own")
    start, expected = FAITHFUL, set(NEEDS.get(paper.key, {}))
    if paper.key.startswith("sft."):
        values = {p.key: p.value for p in PAPER if p.key.startswith("sft.")}
        start, expected = FAITHFUL.override({"sft": SFT} | values), {"sft"}
        assert keys(start) == ["sft"]  # what no field can change: examples stand alone
    changed = start.override(NEEDS.get(paper.key, {}) | {paper.key: OTHER[paper.key]})
    assert set(keys(changed)) - expected == {paper.key}
    (found,) = (part for part in deviations(changed) if part.key == paper.key)
    assert found.where == paper.where
    assert found.here == OTHER[paper.key]
    assert found.paper.startswith(str(paper.value) if paper.value is not None else "null")


def test_what_a_section_selects_deviates_by_its_kind() -> None:
    recipe = gsm8k_cpu()
    assert "policy.kind" in keys(recipe)
    assert "data.kind" not in keys(recipe)
    assert "data.kind" in keys(RECIPES["arithmetic_cpu"]())
    by_rules = FAITHFUL.override(
        {"reward_model.step_labels": {"kind": "rules"}, "reward.components": [{"kind": "accuracy"}, {"kind": "steps"}]}
    )
    assert keys(by_rules) == ["reward_model.step_labels.kind"]
    formed = FAITHFUL.override({"reward.components": [{"kind": "accuracy"}, {"kind": "format", "weight": 0.2}]})
    assert keys(formed) == ["reward.components"]


def test_rules_in_place_of_a_reward_model_deviate_for_grpo_only() -> None:
    assert keys(FAITHFUL.override({"reward_model": None})) == ["reward_model"]
    rejection = FAITHFUL.override({"reward_model": None} | method_settings("rft", FAITHFUL))
    assert keys(rejection) == []


@pytest.mark.parametrize("method", [name for name in METHODS if name != "grpo_process"])
def test_rows_of_table_10_are_faithful_and_later_methods_are_named(method: str) -> None:
    base = FAITHFUL.override({"reward_model": None})
    found = keys(base.override(whole_method(method, base)))
    if method in TABLE_10:
        assert set(found) <= {"reward_model"}
    else:
        assert found[0] == "update.objective.kind"


def test_grpo_on_frozen_outputs_deviates_from_its_row() -> None:
    offline = FAITHFUL.override({"data_source": "initial_policy", "update.old_logprobs": "rollout"})
    assert keys(offline) == ["data_source"]


def test_the_base_of_an_instructed_policy_is_no_base() -> None:
    own = FAITHFUL.override({"reward_model.trunk": "base"})
    assert keys(own) == ["reward_model.trunk"]
    tuned = own.override({"sft": SFT} | {p.key: p.value for p in PAPER if p.key.startswith("sft.")})
    assert keys(tuned) == ["sft"]


def test_dpo_has_its_own_equation_and_no_beta_of_the_papers() -> None:
    base = FAITHFUL.override({"reward_model": None})
    dpo = base.override(method_settings("dpo", base))
    assert keys(dpo) == []
    assert keys(dpo.override({"update.objective.length_normalised": False})) == ["update.objective.length_normalised"]
    assert "update.objective.beta" in [choice.key for choice in choices(dpo)]
    assert "update.objective.beta" not in [choice.key for choice in choices(FAITHFUL)]


def test_every_key_of_the_tables_is_one_of_the_configuration() -> None:
    assert {paper.key for paper in PAPER} | set(SILENT) <= KNOWN.keys()
    assert len({paper.key for paper in PAPER}) == len(PAPER)


def test_every_choice_where_the_paper_is_silent_has_a_reason() -> None:
    for key, reason in SILENT.items():
        documented = any(field.description for name, field in fields(IterativeRLConfig) if name == key)
        assert bool(reason) or documented, key
    found = {choice.key: choice for choice in choices(FAITHFUL)}
    assert found["update.objective.eps"].here == 0.2
    assert "PPO" in found["update.objective.eps"].reason
    assert "critic.mu" not in found


def test_what_the_page_of_decisions_calls_silent_is_in_one_of_the_tables() -> None:
    text = DECISIONS.read_text(encoding="utf-8")
    table = text.partition("## Where the paper is silent")[2].partition("Where the paper speaks")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ") and "---" not in line][1:]
    named = {key.partition("=")[0] for row in rows for key in re.findall(r"`([\w.=]+)`", row[3])}
    named = {key for key in named if key in KNOWN}
    ours = {*SILENT, *(paper.key for paper in PAPER), "advantage.kind", "reward.components"}
    assert len(named) > 25
    assert {key for key in named if not any(f"{own}.".startswith(f"{key}.") for own in ours)} == set()


def test_the_command_lists_field_value_and_section(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert run_command(["check", "arithmetic_cpu", "--faithful", "--set", "rollout.G=64"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "rollout.max_output_tokens 1024 (maximal length of 1,024, read as that of the output) 4.2 64" in text
    assert "update.training.optimizer.learning_rate 1e-06 4.2 0.0003" in text
    assert "rollout.G 64 4.2" not in text
    assert "update.objective.eps 0.2 Clip range of the ratio. The paper gives no value; 0.2 is PPO's." in text
    assert run_command(["check", "arithmetic_cpu", "--faithful", "--set", "update.training.adapter.r=4"]) == 0
    assert "r 4, alpha 32, scaling lora, target_modules all-linear" in " ".join(capsys.readouterr().out.split())
    assert run_command(["check", "arithmetic_cpu"]) == 0
    assert "4.2" not in capsys.readouterr().out
