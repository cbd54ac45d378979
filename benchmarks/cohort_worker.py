"""Cohort's side of the step benchmark: one pass through lines 5-10 of Algorithm 1 for each line on standard input.

    python -m benchmarks.cohort_worker WORKLOAD.json inline|prefect ATTENTION MICRO_BATCH_TOKENS

The real stages on a real store; `prefect` adds a Prefect server, a task for each stage call, and MLflow. Answers with one JSON
object a line: wall and processor seconds of the step, and where they went.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from benchmarks.floor import Group, step_work
from benchmarks.timing import Clock, Device, cpu_seconds
from benchmarks.workload import REWARD_PATTERN, Workload
from flows.algorithm.sampling import derived_seed
from flows.runs.curve import Points, step_done
from pipeline.event_log import EventLog
from pipeline.events import recording
from pipeline.stage import flow
from pipeline.store import Store, use_store
from pipeline.store.context import use_engine
from stages.advantage import GroupConfig, estimate_advantages
from stages.data import QuestionFileConfig, read_questions, sample_batch
from stages.models import Checkpoint, ExternalCheckpointConfig, import_checkpoint
from stages.reward import RewardConfig, score
from stages.rollout import RolloutConfig, rollout
from stages.tables import Questions, Rewards, Rollouts
from stages.text import PromptConfig
from stages.update import UpdateConfig, update_policy

Configs = tuple[PromptConfig, RolloutConfig, RewardConfig, UpdateConfig]

_WATCHED = {
    "generation": ["stages.rollout.hf:HFGenerator.generate"],
    "reference": ["stages.update.loss:MiniBatch.logprobs"],
    "update": ["stages.training.loop:optimizer_step"],
    "load weights": ["stages.rollout.engines:load_weights"],
    "load tokenizer": ["stages.rollout.stage:load_tokenizer"],
    "store": [
        f"pipeline.store.store:Store.{name}" for name in ("publish", "find", "record", "path", "manifest", "action")
    ],
    "tables": ["pipeline.artifact:Table.read", "pipeline.artifact:Table.write"],
    "tracking": ["flows.runs.curve:Points.take"],
}
"""What is timed, by phase. The rest of a stage's body is booked under its name, the rest of the step under `flow`."""


def main() -> None:
    workload, engine, attention, tokens = Workload.load(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    # Whatever a library prints goes to standard error; standard output carries the protocol.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(workload.threads)
    root = Path(workload.folder) / f"cohort-{engine}"
    with use_store(Store(root / "store")), _surroundings(engine, root):
        serve(workload, attention, tokens, answers)


@contextlib.contextmanager
def _surroundings(engine: str, root: Path) -> Iterator[None]:
    """Plain calls without tracking, or all that `cohort run` has: Prefect's server, MLflow's run."""
    if engine == "inline":
        with recording(Points().take):
            yield
        return
    from flows.tracking.delivery import tracked_study
    from flows.tracking.sender import folder_of
    from pipeline.orchestration.server import ensure_server, keep_server, stop_server

    ensure_server(root / "prefect")
    try:
        with (
            keep_server(root / "prefect"),
            tracked_study(root, experiment="benchmark", name="step", key="step", config={}),
            recording(EventLog(folder_of(root) / "step").take, Points().take),
            use_engine("prefect"),
        ):
            yield
    finally:
        stop_server(root / "prefect")


@flow
def serve(workload: Workload, attention: str, micro_batch_tokens: int, answers: TextIO) -> None:
    """Steps for as long as lines come in."""
    configs = _configs(workload, attention, micro_batch_tokens)
    questions = read_questions(QuestionFileConfig(path=str(workload.question_file)))
    policy = reference = import_checkpoint(ExternalCheckpointConfig(path=workload.policy))
    device = Device()
    clock = watch(device)
    answers.write(json.dumps({"ready": True}) + "\n")
    for step, _ in enumerate(sys.stdin):
        clock.take()
        device.begin()
        started, cpu = time.perf_counter(), cpu_seconds()
        batch = sample_batch(questions, size=workload.questions, step=step, seed=workload.seed)
        policy, outputs, rewards = one_step(policy, reference, batch, configs, step)
        device.settle()
        seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
        phases = clock.take()
        phases["flow"] = seconds - sum(phases.values())
        found = {"seconds": seconds, "cpu_seconds": cpu, "device_mib": device.peak_mib(), "phases": phases}
        found |= step_work(workload, groups_of(outputs), rewards.read()["reward"].to_pylist())
        answers.write(json.dumps(found) + "\n")


def _configs(workload: Workload, attention: str, micro_batch_tokens: int) -> Configs:
    learning = {"kind": "adamw", "learning_rate": workload.learning_rate}
    training = {"precision": workload.precision, "attention": attention, "optimizer": learning}
    dtype = "bfloat16" if workload.precision == "bf16" else "float32"
    backend = {"kind": "hf", "dtype": dtype, "attention": attention}
    forced = workload.kind == "random"
    if forced:
        rule = {"kind": "format", "weight": 1.0, "form": "pattern", "pattern": REWARD_PATTERN}
    else:
        rule = {"kind": "accuracy", "conventions": ["number" if workload.chat else "hashes"], "verifier": "exact"}
    update = {"objective": {"kind": "grpo", "beta": workload.beta}, "micro_batch_tokens": micro_batch_tokens}
    return (
        prompt_of(workload),
        RolloutConfig.model_validate(
            {"G": workload.group, "max_output_tokens": workload.tokens, "stop": not forced, "backend": backend}
        ),
        RewardConfig.model_validate({"truncated": "as_is", "components": [rule]}),
        UpdateConfig.model_validate({**update, "training": training}),
    )


def prompt_of(workload: Workload) -> PromptConfig:
    """What is around a question; `Workload.peer_row` has the same for the peer."""
    return PromptConfig(chat="tokenizer") if workload.chat else PromptConfig(suffix="\n")


def one_step(
    policy: Checkpoint, reference: Checkpoint, batch: Questions, configs: Configs, step: int
) -> tuple[Checkpoint, Rollouts, Rewards]:
    """Lines 6-10 as in `flows.iterative_rl`."""
    prompt, sampling, reward, update = configs
    seed = derived_seed(0, step)
    outputs = rollout(policy, batch, prompt, sampling, seed=seed)
    rewards = score(outputs, batch, reward)
    advantages = estimate_advantages(rewards, outputs, GroupConfig())
    policy = update_policy(policy, reference, outputs, advantages, update, seed=seed)
    step_done(step + 1, 0, policy, outputs, rewards, advantages)
    return policy, outputs, rewards


def groups_of(outputs: Rollouts) -> list[Group]:
    """The outputs by question."""
    groups: dict[str, tuple[int, list[list[int]]]] = {}
    for row in outputs.read(["question_id", "prompt_ids", "output_ids"]).to_pylist():
        groups.setdefault(row["question_id"], (len(row["prompt_ids"]), []))[1].append(row["output_ids"])
    return list(groups.values())


def watch(device: Device) -> Clock:
    """A clock on all of `_WATCHED`, and on the stages' bodies."""
    import pipeline.stage
    import stages.rollout.hf
    import stages.training.loop
    import stages.update.loss  # noqa: F401 - so that their functions can be replaced

    clock = Clock(device.settle)
    for phase, paths in _WATCHED.items():
        for path in paths:
            clock.watch_path(phase, path)
    clock.watch(lambda store, key, call, *_: f"rest of {call.stage}", pipeline.stage, "_execute")
    return clock


if __name__ == "__main__":
    main()
