"""Instructed Qwen2.5 models on one GPU: the usual settings of the field where those are not the paper's, and Python within
outputs. Never run here.

Sources: "verl" is its examples/grpo_trainer (run_qwen2-7b_math.sh, run_qwen2_5-3b_gsm8k_grpo_lora.sh), for 8 GPUs; "Dr. GRPO"
is sail-sg/understand-r1-zero, examples/qwen2.5-math-1.5b.sh; "Qwen" is the README of QwenLM/Qwen2.5-Math; all as read in
2026. What is not named is `gsm8k_one_gpu`'s.
"""

from __future__ import annotations

from typing import Any, Final

from flows.config import IterativeRLConfig
from flows.config.recipes.gsm8k import gsm8k_one_gpu


def qwen_0_5b_gsm8k() -> IterativeRLConfig:
    """GSM8K as verl trains it, with Qwen2.5-0.5B-Instruct: many questions of few outputs, a small beta; never run here."""
    return gsm8k_one_gpu().override(
        {
            "name": "qwen_0_5b_gsm8k",
            "prompt.template": "raw",
            "prompt.instruction": 'Let\'s think step by step and output the final answer after "####".',  # verl's data
            "steps": 420,  # verl: 105 steps of four updates, 15 passes over the training questions
            "questions_per_step": 256,  # verl: mini-batches of 256, of 1,024 questions; ours: one update a step, as 4.2
            "rollout.G": 5,  # verl
            "rollout.max_output_tokens": 1024,  # verl
            "rollout.backend.max_model_len": 1536,  # verl: prompts of at most 512
            "reward.components": [{"kind": "accuracy", "verifier": "exact"}],  # ours: verl reads `####` only
            "update.objective.beta": 0.001,  # verl
            "update.objective.aggregation": "token_mean",  # verl
            "update.training.optimizer.weight_decay": 0.01,  # verl
            "evaluation.every": 20,  # verl: every 5 steps of four updates
            "evaluation.samples": 0,  # verl: greedy only
        },
        source="recipe qwen_0_5b_gsm8k",
    )


def qwen_1_5b_math() -> IterativeRLConfig:
    """MATH by Dr. GRPO with Qwen2.5-1.5B-Instruct and no reference, for a GPU of 80 GB; never run here."""
    columns = {"question": "problem"}  # as MATH has it; answers of their own, as MATH-500 and PRM800K have them
    return gsm8k_one_gpu().override(
        {
            "name": "qwen_1_5b_math",
            "experiment": "math",
            # The 12,000 questions of MATH that are not in MATH-500, and those: the split of PRM800K, as Dr. GRPO has it.
            "data.train": {"path": "math_train.jsonl", "columns": columns, "duplicates": "first"},
            "data.evaluation": {"math500": {"path": "math500.jsonl", "columns": columns}},
            "policy.path": "Qwen/Qwen2.5-1.5B-Instruct",  # ours; Dr. GRPO: Qwen2.5-Math-1.5B, whose window is 4,096
            "steps": 282,  # ours: three passes over the training questions; Dr. GRPO: up to 20
            "questions_per_step": 128,  # Dr. GRPO
            "rollout.G": 8,  # Dr. GRPO
            "rollout.max_output_tokens": 3000,  # Dr. GRPO
            "rollout.backend.max_model_len": 4096,  # Dr. GRPO: prompts of at most 1,024
            "reward.components": [{"kind": "accuracy", "verifier": "math_verify"}],  # Dr. GRPO: right or wrong
            "reward.workers": 8,  # ours
            "advantage.scale": "none",  # Dr. GRPO
            "update.objective": {"kind": "dr_grpo", "length": 3000},  # Dr. GRPO: no KL term
            "reference_pass": "inline",
            "evaluation.every": 16,  # Dr. GRPO
            "evaluation.samples": 0,  # Dr. GRPO: greedy only
        },
        source="recipe qwen_1_5b_math",
    )


BY_REASONING: Final[dict[str, Any]] = {
    "environment": None,
    "prompt.system": "Please reason step by step, and put your final answer within \\boxed{}.",  # Qwen
}
"""What of `gsm8k_tools` is chain of thought: the other column of the paper's Table 5."""


def gsm8k_tools() -> IterativeRLConfig:
    """GSM8K with Python in a sandbox: Qwen2.5-Math-1.5B-Instruct, which reasons with and without, on 80 GB; never run here."""
    return gsm8k_one_gpu().override(
        {
            "name": "gsm8k_tools",
            "policy.path": "Qwen/Qwen2.5-Math-1.5B-Instruct",  # ours: small, and instructed in both, as the paper's is
            "prompt.template": "raw",
            "prompt.system": "Please integrate natural language reasoning with programs to solve the problem above, and put "
            "your final answer within \\boxed{}.",  # Qwen, and the authors' README
            "environment": {"kind": "python"},  # ToRA's form, as Qwen
            "steps": 116,  # ours: one pass over the training questions
            "rollout.max_output_tokens": 1024,  # 4.2; what programs print counts
            "rollout.backend.max_model_len": 2048,  # ours: half of the model's window
            "evaluation.every": 29,  # ours: four times
        },
        source="recipe gsm8k_tools",
    )
