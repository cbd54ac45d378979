"""The built-in arithmetic world on a CPU: the demo, with a learned reward, at its smallest, and with a real model."""

from __future__ import annotations

from typing import Any, Final

from flows.config import ArithmeticData, EvaluationPlan, IterativeRLConfig
from stages.data import ArithmeticConfig, DemonstrationConfig
from stages.evaluation import EvaluationConfig
from stages.reward import AccuracyConfig, RewardConfig
from stages.rollout import HFBackendConfig, RolloutConfig
from stages.sft import PolicyConfig, SFTConfig
from stages.text import PromptConfig
from stages.training import AdamWConfig, DeepSpeedEngineConfig, MuonConfig, TrainingConfig
from stages.update import GRPOConfig, UpdateConfig


def arithmetic_cpu() -> IterativeRLConfig:
    """The demo: SFT on a mixture of authors, then GRPO, on chain arithmetic; minutes on a laptop's CPU."""
    return IterativeRLConfig(
        name="arithmetic_cpu",
        experiment="arithmetic",
        data=ArithmeticData(
            demonstrations=DemonstrationConfig(chains=ArithmeticConfig(count=50_000, shortest=2, longest=6)),  # ours
            train=ArithmeticConfig(count=8192, shortest=3, longest=5),  # ours
            evaluation={
                "in_domain": ArithmeticConfig(count=512, shortest=3, longest=5),  # ours
                "out_of_domain": ArithmeticConfig(
                    count=256, shortest=6, longest=6
                ),  # ours: SFT saw such chains, RL did not
            },
        ),
        prompt=PromptConfig(suffix="\n"),  # ours: the solution begins on a line of its own
        policy=PolicyConfig(),  # ours: 0.36 M parameters, one token per character
        sft=SFTConfig(
            training=TrainingConfig(
                optimizer=MuonConfig(learning_rate=3e-3),  # ours: AdamW alone was far slower
                warmup_steps=40,  # ours
                threads=1,  # ours: a second thread gains little and suffers from every other process
            ),
            batch_size=64,  # ours
            stop_loss=0.10,  # ours: an SFT stopped before the arithmetic is learned caps RL
            decay_steps=150,  # ours
            length_pool=8,  # ours
        ),
        iterations=1,  # ours; 5.2.1 has two more
        steps=40,  # ours
        questions_per_step=64,  # ours: many short questions; 4.2 has 16 questions of 64 outputs
        rollout=RolloutConfig(
            G=16, max_output_tokens=64, backend=HFBackendConfig(threads=1)
        ),  # ours; 4.2: 64 outputs of 1,024 tokens
        reward=RewardConfig(components=(AccuracyConfig(conventions=("hashes",), verifier="exact"),)),  # ours
        update=UpdateConfig(
            objective=GRPOConfig(eps=0.2, beta=0.04),  # eps ours, beta 4.2
            mu=1,  # 4.2
            micro_batch_tokens=4096,  # ours: larger ones are slower on a CPU
            training=TrainingConfig(
                engine=DeepSpeedEngineConfig(zero_stage=1),  # ours
                optimizer=AdamWConfig(learning_rate=3e-4),  # ours; 4.2: 1e-6 for 7 B parameters
                threads=1,  # ours: a second thread gains little and suffers from every other process
            ),
        ),
        evaluation=EvaluationPlan(
            every=10,  # ours
            samples=8,  # ours; Fig. 7 has up to 64
            estimates=EvaluationConfig(ks=(4, 8)),  # Fig. 7: 1, 4, 8, 16, 32, 64; K = 1 is the accuracy
        ),
    )


def arithmetic_learned_reward() -> IterativeRLConfig:
    """The demo with rewards by a learned outcome model alone: four iterations, after each of which it is trained on."""
    return arithmetic_cpu().override(
        {
            "name": "arithmetic_learned_reward",
            "data.train.count": 16384,  # ours: questions to label, and questions to explore
            "iterations": 4,  # ours; 5.2.1 has three
            "steps": 10,  # ours: without retraining the AUC falls from 0.99 to 0.95 in ten steps, to 0.87 in twenty
            "reward_model": {
                "models": [{"kind": "outcome"}],  # 4.1.2
                "trunk": "initial_policy",  # ours: a base made from scratch knows nothing; 4.2 begins with the base model
                "questions": 2048,  # ours: AUC 0.99; with half as many and a higher rate the model is hacked in three steps
                "training": {
                    "epochs": 4,  # ours
                    "questions_per_update": 16,  # ours
                    "training": {
                        "optimizer": {"kind": "muon", "learning_rate": 2e-3},  # ours; 4.2: 2e-5 for 7 B parameters
                        "warmup_steps": 10,  # ours
                        "threads": 1,
                    },
                },
                "scoring": {"threads": 1},
                "replay": {"share": 0.1},  # 4.1.4
            },
            "update.objective.beta": 0.1,  # ours; 4.2: 0.04
            "update.training.optimizer.learning_rate": 1e-4,  # ours: rules bear 3e-4, a learned reward does not
        },
        source="recipe arithmetic_learned_reward",
    )


STUDENT: Final[dict[str, Any]] = {
    "policy.settings.hidden_size": 48,  # ours; the demo's policy, the teacher, has 96
    "policy.settings.intermediate_size": 128,  # ours; 256
    "policy.settings.num_hidden_layers": 2,  # ours; 3
    "sft.max_steps": 400,  # ours: so few parameters reach no loss of 0.10
    "sft.stop_loss": None,
}
"""A policy of a sixth of the demo's parameters, which supervised fine-tuning leaves far behind it."""


def arithmetic_distillation() -> IterativeRLConfig:
    """On-policy distillation of the demo's policy, exported to ./arithmetic_teacher, into one of a sixth of its size.

    First `cohort run arithmetic_cpu` and `cohort export arithmetic_cpu arithmetic_teacher --dtype float32`.
    """
    return arithmetic_cpu().override(
        {
            "name": "arithmetic_distillation",
            **STUDENT,
            "teacher": {"path": "arithmetic_teacher"},
            "advantage": {"kind": "teacher"},
            "update.objective": {"kind": "distillation"},
        },
        source="recipe arithmetic_distillation",
    )


def arithmetic_tools() -> IterativeRLConfig:
    """Numbers beyond what the demo's policy can compute, and a calculator: SFT on authors some of whom call it, then GRPO."""
    large = {"shortest": 2, "longest": 3, "numbers": "large"}  # ours: a product of two, or of two and one sum
    return arithmetic_cpu().override(
        {
            "name": "arithmetic_tools",
            "data.demonstrations.chains": {"count": 50_000, **large},
            "data.demonstrations.authors": {  # ours: half of them call, and most of these leave something out
                "careful": 0.45,
                "calls": 0.25,
                "calls_early": 0.3,
                "drops_carries_and_borrows": 0.0,
                "drops_borrows": 0.0,
                "stops_early": 0.0,
            },
            "data.train": {"count": 8192, **large},
            "data.evaluation": {"in_domain": {"count": 512, **large}},
            "environment": {"kind": "calculator"},
        },
        source="recipe arithmetic_tools",
    )


def arithmetic_smoke() -> IterativeRLConfig:
    """The demo's flow at its smallest: two iterations of two steps in seconds, to try the machinery; learns little."""
    demo = arithmetic_cpu()
    return demo.override(
        {
            "name": "arithmetic_smoke",
            "data.demonstrations.chains.count": 512,
            "data.train.count": 64,
            "data.evaluation": {"in_domain": {"count": 16}},
            "policy.settings.hidden_size": 32,
            "policy.settings.intermediate_size": 64,
            "policy.settings.num_hidden_layers": 1,
            "policy.settings.num_attention_heads": 2,
            "policy.settings.num_key_value_heads": 2,
            "sft.training.threads": 1,
            "sft.training.precision": "fp32",
            "sft.max_steps": 20,
            "sft.stop_loss": None,
            "sft.decay_steps": 5,
            "iterations": 2,
            "steps": 2,
            "questions_per_step": 4,
            "reward.components": [
                {"kind": "format", "form": "pattern", "pattern": r"\d\s*$"},
                {"kind": "accuracy", "verifier": "exact"},
            ],
            "rollout.G": 4,
            "rollout.max_output_tokens": 24,
            "rollout.backend.threads": 1,
            "rollout.backend.dtype": "float32",
            "update.training.engine.kind": "torch",
            "update.training.threads": 1,
            "update.training.precision": "fp32",
            "evaluation.every": 2,
            "evaluation.samples": 2,
            "evaluation.estimates.ks": [1, 2],
            # Its policy answers nothing rightly; what it tries is the machinery.
            "preflight": {"truncated": None, "unreadable": None, "without_signal": None},
        },
        source="recipe arithmetic_smoke",
    )


def smollm2_arithmetic() -> IterativeRLConfig:
    """The demo with a real model, SmolLM2-135M-Instruct: its chat template, a short SFT, GRPO with LoRA."""
    chains = {"shortest": 3, "longest": 4}  # ours: outputs of 20 to 30 tokens
    return arithmetic_cpu().override(
        {
            "name": "smollm2_arithmetic",
            "data.demonstrations.chains": {"count": 4096, "shortest": 2, "longest": 4},  # ours
            "data.train": {"count": 4096, **chains},  # ours
            "data.evaluation": {"in_domain": {"count": 128, **chains}},  # ours
            "prompt": {"chat": "tokenizer", "instruction": "Write one operation a line, then #### and the result."},
            "policy": {"kind": "pretrained", "path": "HuggingFaceTB/SmolLM2-135M-Instruct"},  # or a GGUF file of it
            # Ours: the model knows sums, so that SFT has the form and the habits of the authors to teach.
            "sft.training": {"optimizer": {"kind": "adamw", "learning_rate": 1e-4}, "warmup_steps": 4, "threads": 1},
            "sft.batch_size": 8,  # ours
            "sft.max_steps": 24,  # ours
            "sft.decay_steps": 8,  # ours
            "sft.stop_loss": None,
            "steps": 20,  # ours
            "questions_per_step": 16,  # 4.2
            "rollout.G": 8,  # ours; 4.2: 64
            "rollout.max_output_tokens": 48,  # ours
            "update.training": {
                "optimizer": {"kind": "adamw", "learning_rate": 3e-4},  # ours, of an adapter
                "adapter": {"r": 16},  # ours
                "threads": 1,
            },
            "evaluation.every": 10,  # ours
            "evaluation.samples": 2,  # ours
            "evaluation.estimates.ks": [2],  # ours
        },
        source="recipe smollm2_arithmetic",
    )
