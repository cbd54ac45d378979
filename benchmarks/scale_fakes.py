"""Stand-ins at the seams of the flow: a policy, a sampler and an update that cost nothing, so that what is left is ours.

They are stages like the real ones, under the same names, and write tiny artifacts of the same types: a policy is a folder with
one line, its outputs are numbers drawn from the seed, an update hashes what it was given. Everything around them is real.
"""

from __future__ import annotations

import hashlib
import importlib
import random
from typing import Any, Final

from pipeline.artifact import Artifact
from pipeline.stage import record_metrics, stage
from stages.models import Checkpoint
from stages.rollout import RolloutConfig
from stages.sft import PolicyConfig
from stages.tables import Advantages, Demonstrations, Questions, Rollouts
from stages.text import PromptConfig
from stages.update import UpdateConfig

__all__ = ["create_policy", "rollout", "take_the_place_of_models", "update_policy"]

_PLACES: Final = (
    "flows.algorithm.data:create_policy",
    "flows.algorithm.sampling:rollout",
    "flows.iterative_rl:rollout",
    "flows.iterative_rl:update_policy",
)
"""Where the flow names what is replaced."""

_METRICS: Final = 32
"""About as many as a real update and a real rollout record."""


@stage(version="fake")
def create_policy(config: PolicyConfig, demonstrations: Demonstrations | None, prompt: PromptConfig) -> Checkpoint:
    """A policy that holds one line."""
    return _policy("initial")


@stage(version="fake")
def rollout(
    policy: Checkpoint, questions: Questions, prompt: PromptConfig, config: RolloutConfig, *, seed: int
) -> Rollouts:
    """Right for one output in two, at random."""
    drawn = random.Random(f"{seed}/{policy.digest}")
    rows: list[dict[str, Any]] = []
    for question in questions.rows():
        for sample in range(config.G):
            answer = question["answer"] if drawn.random() < 0.5 else str(drawn.randrange(100))
            text = f"#### {answer}"
            rows.append(_row(question["question_id"], sample, text, seed))
    tokens = sum(len(row["output_ids"]) for row in rows)
    record_metrics({"rollout/samples": len(rows), "rollout/tokens": tokens, "rollout/seconds": 0.0})
    return Rollouts.write(rows)


@stage(version="fake")
def update_policy(
    policy: Checkpoint,
    reference: Artifact,
    outputs: Rollouts,
    advantages: Advantages,
    config: UpdateConfig,
    *,
    seed: int,
) -> Checkpoint:
    """Another policy that holds one line."""
    drawn = random.Random(seed)
    record_metrics({f"policy/figure_{number:02d}": drawn.random() for number in range(_METRICS)})
    return _policy(f"{policy.digest} {advantages.digest}")


def take_the_place_of_models() -> None:
    """Let the flow of this process call the stand-ins."""
    for place in _PLACES:
        module, name = place.split(":")
        setattr(importlib.import_module(module), name, globals()[name])


def _policy(content: str) -> Checkpoint:
    line = hashlib.sha256(content.encode()).hexdigest()
    return Checkpoint.write(lambda folder: (folder / "weights").write_text(line) and None)


def _row(question_id: str, sample: int, text: str, seed: int) -> dict[str, Any]:
    ids = [ord(letter) for letter in text]
    return {
        "question_id": question_id,
        "sample": sample,
        "prompt_ids": [0],
        "output_ids": ids,
        "logprobs": [-0.5] * len(ids),
        "finish_reason": "stop",
        "text": text,
        "text_ends": list(range(1, len(ids) + 1)),
        "temperature": 1.0,
        "seed": seed,
    }
