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
from typing import Any

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
            answers.write(json.dumps(found) + "\n")

    trainer = make_trainer(workload, attention, micro_batch, OneStepPerLine())
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

    prompts = json.loads(workload.prompt_file.read_text())
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
        reward_funcs=reward,
        args=GRPOConfig(**settings | changes),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        callbacks=[callback],
    )


def reward(completions: list[str], **_: Any) -> list[float]:
    """The same rule as ours."""
    return [float(re.search(REWARD_PATTERN, text) is not None) for text in completions]


if __name__ == "__main__":
    main()
