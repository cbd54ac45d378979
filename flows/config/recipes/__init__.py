"""Recipes: complete configs, each number with its source. A recipe is a function; `cohort recipes NAME` prints its YAML.

Sources: "4.2" and the like are sections of DeepSeekMath; "ours" is our choice, measured in docs/lab; qwen.py has others.
"""

from __future__ import annotations

from collections.abc import Callable

from flows.config import IterativeRLConfig
from flows.config.recipes.arithmetic import (
    STUDENT,
    arithmetic_cpu,
    arithmetic_distillation,
    arithmetic_learned_reward,
    arithmetic_smoke,
    arithmetic_tools,
    smollm2_arithmetic,
)
from flows.config.recipes.deepseekmath import deepseekmath_7b
from flows.config.recipes.gsm8k import gsm8k_cpu, gsm8k_one_gpu
from flows.config.recipes.qwen import BY_REASONING, gsm8k_tools, qwen_0_5b_gsm8k, qwen_1_5b_math

__all__ = [
    "BY_REASONING",
    "RECIPES",
    "STUDENT",
    "arithmetic_cpu",
    "arithmetic_distillation",
    "arithmetic_learned_reward",
    "arithmetic_smoke",
    "arithmetic_tools",
    "deepseekmath_7b",
    "gsm8k_cpu",
    "gsm8k_one_gpu",
    "gsm8k_tools",
    "qwen_0_5b_gsm8k",
    "qwen_1_5b_math",
    "smollm2_arithmetic",
]

RECIPES: dict[str, Callable[[], IterativeRLConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        arithmetic_cpu,
        arithmetic_learned_reward,
        arithmetic_distillation,
        arithmetic_tools,
        arithmetic_smoke,
        smollm2_arithmetic,
        gsm8k_cpu,
        gsm8k_one_gpu,
        gsm8k_tools,
        qwen_0_5b_gsm8k,
        qwen_1_5b_math,
        deepseekmath_7b,
    )
}
"""Every recipe by name; the first line of its docstring describes it."""
