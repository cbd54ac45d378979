"""TRL's side of the step benchmark, in the environment of its own: one training step for each line on standard input.

    python -m benchmarks.trl_worker WORKLOAD.json ATTENTION MICRO_BATCH

Answers with one JSON object a line: wall seconds and processor seconds of `on_step_begin .. on_step_end`, and where they went.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.floor import Group, step_work
from benchmarks.timing import Clock, Device, cpu_seconds
from benchmarks.workload import REWARD_PATTERN, Workload


def main() -> None:
    workload, attention, micro_batch = Workload.load(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    # Whatever a library prints goes to standard error; standard output carries the protocol.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(workload.threads)
    device = Device()
    clock = Clock(device.settle)

    class OneStepPerLine(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not sys.stdin.readline():
                raise SystemExit
            clock.take()
            device.begin()
            self.started, self.cpu = time.perf_counter(), cpu_seconds()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            device.settle()
            seconds, cpu = time.perf_counter() - self.started, cpu_seconds() - self.cpu
            found = {"seconds": seconds, "cpu_seconds": cpu, "device_mib": device.peak_mib(), "phases": clock.take()}
            found |= step_work(workload, sampled.groups, sampled.rewards)
            answers.write(json.dumps(found) + "\n")

    sampled = Sampled(workload.group)
    trainer = make_trainer(workload, attention, micro_batch, OneStepPerLine())
    trainer._generate_single_turn = sampled.noting_ids(trainer._generate_single_turn)
    trainer._calculate_rewards = sampled.noting_rewards(trainer._calculate_rewards)
    clock.watch("generation", trainer, "_generate_single_turn")
    clock.watch("reward_advantage", trainer, "_calculate_rewards")
    # What is left of it: the reference's log-probabilities, padding, advantages.
    clock.watch("reference", trainer, "_generate_and_score_completions")
    clock.watch("update", trainer, "training_step")
    answers.write(json.dumps({"ready": True}) + "\n")
    trainer.train()


def make_trainer(workload: Workload, attention: str, micro_batch: int, callback: Any, **changes: Any) -> Any:
    """A GRPOTrainer for the workload: the paper's loss, nothing logged, nothing saved.

    Args:
        changes: arguments of `GRPOConfig` in place of those here.
    """
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = json.loads(workload.prompt_file.read_text())
    outputs = workload.questions * workload.group
    settings: dict[str, Any] = {
        "output_dir": f"{workload.folder}/trl",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": workload.precision == "bf16",
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": outputs // micro_batch,
        "num_generations": workload.group,
        "max_completion_length": workload.tokens,
        "shuffle_dataset": False,
        "max_steps": workload.steps,
        "beta": workload.beta,
        # TRL's default multiplies k3 by the ratio and differentiates through it (DeepSeek-V3.2): another gradient than Eq. 4's.
        "use_bias_correction_kl": False,
        "num_iterations": 1,
        "loss_type": "grpo",
        "scale_rewards": "group",
        "epsilon": 0.2,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "learning_rate": workload.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "use_vllm": False,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": workload.seed,
        "model_init_kwargs": {"attn_implementation": attention, "dtype": "float32"},
    }
    return GRPOTrainer(
        model=str(workload.policy),
        reward_funcs=ending_reward if workload.kind == "random" else answer_reward(workload.answer_pattern),
        args=GRPOConfig(**settings | changes),
        train_dataset=Dataset.from_list(rows),
        callbacks=[callback],
    )


def ending_reward(completions: list[str], **_: Any) -> list[float]:
    """The same rule as ours with random weights."""
    return [float(re.search(REWARD_PATTERN, text) is not None) for text in completions]


def answer_reward(pattern: str) -> Callable[..., list[float]]:
    """The same rule as ours with questions: the last answer is right."""

    def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        found = [re.findall(pattern, text, re.MULTILINE) for text in texts]
        return [float(lines[-1:] == [right]) for lines, right in zip(found, answer, strict=True)]

    return reward


class Sampled:
    """The outputs and rewards of the last step, noted as they pass."""

    def __init__(self, group: int) -> None:
        self._group = group
        self.groups: list[Group] = []
        self.rewards: list[float] = []

    def noting_ids(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`_generate_single_turn`, which is given the prompt of each output."""

        def noted(prompt_ids: Any, *others: Any) -> Any:
            found = generate(prompt_ids, *others)
            size, ids = self._group, found[0]
            self.groups = [(len(prompt_ids[at]), ids[at : at + size]) for at in range(0, len(ids), size)]
            return found

        return noted

    def noting_rewards(self, calculate: Callable[..., Any]) -> Callable[..., Any]:
        """`_calculate_rewards`."""

        def noted(*given: Any) -> Any:
            found = calculate(*given)
            self.rewards = found.flatten().tolist()
            return found

        return noted


if __name__ == "__main__":
    main()
