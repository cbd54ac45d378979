from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flows.config.methods import method_settings
from flows.planning.plan import plan_of
from flows.planning.request import Request, subject_of
from flows.planning.stages import bytes_sent, checkpoint_bytes
from flows.runs.paths import Places
from tests.flows.planning.conftest import SEVEN_B, Planned, config, one
from tests.flows.short_runs import BASE, Run, copied, train

SIZES = {
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "vocab_size": 26,
}


def test_a_checkpoint_holds_weights_and_two_moments_in_float32() -> None:
    assert checkpoint_bytes(SEVEN_B, config()) == 12 * SEVEN_B.parameters
    none = {"optimizer_state": "none"}
    assert checkpoint_bytes(SEVEN_B, config(**none)) == 4 * SEVEN_B.parameters
    adapted = (
        checkpoint_bytes(SEVEN_B, config(adapter={"r": 8})),
        checkpoint_bytes(SEVEN_B, config(adapter={"r": 8}, **none)),
    )
    assert adapted[0] - adapted[1] == 8 * SEVEN_B.adapter(8)
    muon = checkpoint_bytes(SEVEN_B, config(optimizer={"kind": "muon"}))
    assert muon == 12 * SEVEN_B.parameters - 4 * SEVEN_B.matrices  # one momentum for each matrix


@pytest.mark.parametrize("method", ["grpo", "ppo", "sft", "distillation"])
def test_a_plan_has_as_many_stage_calls_as_a_run_makes(
    method: str, supervised: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Evaluated before, after step 1 and at the end, greedy and sampled; what makes data, policy and critic is not planned."""
    evaluation = {"every": 1, "samples": 2, "greedy": True, "estimates": {"ks": [1]}}
    taught = {"teacher": {"path": str(supervised.store.path(supervised.digest))}} if method == "distillation" else {}
    run = train(copied(supervised.store, tmp_path_factory), method, evaluation=evaluation, **taught)
    made = Counter(name for name, _ in run.calls)
    config = BASE.override(method_settings(method, BASE) | {"steps": 2, "evaluation": evaluation} | taught)
    plan = plan_of(subject_of(config, Places(tmp_path), Request()).given)
    planned = {stage.name: stage.calls * plan.counts[stage.when] for stage in plan.stages}
    assert (
        planned["evaluation (greedy)"] == planned["evaluation (sampled)"] == 3 * 4
    )  # rollout, score, count_votes, evaluate
    assert made["count_votes"] == made["evaluate"] == 3 + 3
    unplanned = (
        "arithmetic_questions",
        "arithmetic_demonstrations",
        "create_policy",
        "create_critic",
        "import_checkpoint",
    )
    assert sum(planned.values()) == sum(made.values()) - sum(made[name] for name in unplanned)


def test_a_teacher_is_planned_by_its_own_size(planned: Planned, tmp_path: Path) -> None:
    """On a machine of one speed: the pass of policy and teacher is above that of two policies; SFT samples from the teacher."""
    small, large = ({"model_type": "qwen2", **SIZES, "hidden_size": size} for size in (48, 768))
    for name, described in (("small", small), ("large", large)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(described))
    passes = [
        one(planned("arithmetic_distillation", f"teacher.path={tmp_path / name}"), "teacher")
        for name in ("small", "large")
    ]
    assert passes[1].seconds > 3 * passes[0].seconds
    assert passes[1].keeps["reference"] > 50 * passes[0].keeps["reference"]
    sft = ("advantage.kind=one", "update.objective.kind=sft", "data_source=teacher")
    sampled = [
        one(planned("arithmetic_distillation", f"teacher.path={tmp_path / name}", *sft), "rollout").work.flops
        for name in ("small", "large")
    ]
    assert sampled[1] > 50 * sampled[0]


def test_engines_on_gpus_of_their_own_take_the_time_of_their_share(planned: Planned) -> None:
    """By hand: 16 questions by 8 engines are 2 each; `auto` is as many as there are GPUs. On a CPU they share the cores."""
    gpus: dict[str, Any] = {"gpus": 8, "gpu_memory": 80.0}
    single = ("rollout.backend.tensor_parallel_size=1", "rollout.backend.between_calls=warm")
    eight, auto, one_with_two = (
        one(planned("deepseekmath_7b", *single, *more, **gpus), "rollout").seconds
        for more in (
            ["rollout.backend.data_parallel=8"],
            ["rollout.backend.data_parallel=auto"],
            ["questions_per_step=2"],
        )
    )
    assert eight == auto == pytest.approx(one_with_two)
    assert one(planned("deepseekmath_7b", *single, **gpus), "rollout").seconds > 2 * eight
    cpu = [
        one(
            planned("arithmetic_smoke", "rollout.backend.kind=vllm", f"rollout.backend.data_parallel={count}"),
            "rollout",
        )
        for count in (1, 2)
    ]
    assert cpu[0].seconds == cpu[1].seconds
    assert sum(cpu[1].memory.values()) == pytest.approx(2 * sum(cpu[0].memory.values()))


@pytest.mark.parametrize(
    ("stage", "precision", "size"),
    [(1, "bf16", 8.0), (2, "bf16", 4 * 3 + 4), (3, "fp32", 3 * 12), (3, "bf16", 3 * (4 + 2 * 2))],
)
def test_bytes_sent_are_gradients_in_float32_and_weights_as_computed(stage: int, precision: str, size: float) -> None:
    """Six passes on two ranks, of which each computes three: half of 100 parameters is others', at `size` bytes each."""
    engine = {"kind": "deepspeed", "ranks": 2, "zero_stage": stage}
    assert bytes_sent(100, config(precision=precision, engine=engine), 6) == 50 * size
    assert bytes_sent(100, config(), 6) == 0


def test_worker_processes_share_what_the_exact_path_leaves_open(planned: Planned) -> None:
    def verdicts(verifier: str, workers: int) -> float:
        component = {"kind": "accuracy", "verifier": verifier}
        settings = {"reward.components": [component], "reward.workers": workers}
        plan = planned("arithmetic_cpu", *(f"{key}={json.dumps(value)}" for key, value in settings.items()))
        return float(one(plan, "rules, advantages").seconds)

    assert verdicts("math_verify", 4) - verdicts("math_verify", 8) == pytest.approx(64 * 16 * 5e-3 / 8)
    assert verdicts("exact", 4) == verdicts("exact", 8)
