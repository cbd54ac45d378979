"""A tiny base model, labelled outputs of uneven lengths, and settings whose gradients can be read, for tests of rewards."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from stages.models import WEIGHTS, Checkpoint, RewardKind, copy_description, save, vocabulary_of, write_tensors
from stages.reward_training import RewardModelConfig, RewardTrainingConfig, create_reward_model
from stages.tables import RewardLabels, Rewards, Rollouts
from stages.training import AdamWConfig, TrainingConfig
from tests.stages.rows import label_row, output_row, reward_row
from tests.stages.training.tiny import VOCABULARY, remembered, tiny_checkpoint, tiny_model, tiny_tokenizer

Q, G = 4, 4
RIGHT = ((0, 1), (1, 2, 3), (0, 1, 2, 3), (2,))
"""Which samples of each question are right; of the third all, so that it has no pair."""
EOS = 1


def exact(*, learning_rate: float = 1e-2, **changes: Any) -> RewardTrainingConfig:
    """fp32, gradients that are not clipped, all questions in one update."""
    adamw = AdamWConfig(learning_rate=learning_rate)
    training = TrainingConfig(precision="fp32", max_grad_norm=0.0, optimizer=adamw, threads=1)
    return RewardTrainingConfig(**({"training": training} | changes))


def label_rows(base: Checkpoint, *, steps: bool = True) -> list[dict[str, Any]]:
    """Q x G outputs of 3-8 tokens that end with EOS, in one, two or three steps."""
    rng, vocabulary = random.Random(3), vocabulary_of(base)
    rows = []
    for question in range(Q):
        prompt = [rng.randrange(3, VOCABULARY) for _ in range(2 + question)]
        for sample in range(G):
            ids = [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(2, 7))] + [EOS]
            within = range(1, len(ids) - 1, 2)  # no step of a single token: its line would have no letter
            ends = [*sorted(rng.sample(within, rng.randint(0, min(2, len(within))))), len(ids) - 1]
            cut = {"step_ends": ends, "step_labels": [float(rng.random() < 0.5) for _ in ends]} if steps else {}
            known = {"prompt_ids": prompt, "origin": base.digest, "vocabulary": vocabulary, **cut}
            rows.append(label_row(f"q{question}", sample, ids, float(sample in RIGHT[question]), **known))
    return rows


def labels(base: Checkpoint, **settings: Any) -> RewardLabels:
    return RewardLabels.write(label_rows(base, **settings))


def tiny_reward_model(kind: RewardKind, base: Checkpoint | None = None) -> Checkpoint:
    return create_reward_model(base or tiny_checkpoint(), RewardModelConfig(kind=kind))


@remembered
def outspoken(kind: RewardKind, base: Checkpoint | None = None) -> Checkpoint:
    """A tiny reward model whose head is not zero: its scores differ from output to output."""
    model = tiny_reward_model(kind, base)
    weights = load_file(model.path / WEIGHTS)
    generator = torch.Generator().manual_seed(5)
    weights["score.weight"] = torch.randn(weights["score.weight"].shape, generator=generator)

    def fill(folder: Path) -> None:
        copy_description(model.path, folder)
        write_tensors(folder / WEIGHTS, weights)

    return Checkpoint.write(fill)


def base_with_pad_as_eos() -> Checkpoint:
    """Padding and end of sequence are one token, in tokenizer and config, as many released models have it."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny_model(pad_token_id=EOS, eos_token_id=EOS)
    return Checkpoint.write(lambda folder: save(folder, model, tokenizer))


def outputs_of(rows: list[dict[str, Any]]) -> Rollouts:
    """Rollouts whose text has a letter for each token, and a newline for the token that ends a step."""
    kept = ("prompt_ids", "output_ids")
    return Rollouts.write(
        [
            output_row(row["question_id"], row["sample"], _lines(row), cut=True, logprobs=None)
            | {"finish_reason": "stop", **{name: row[name] for name in kept}}
            for row in rows
        ]
    )


def rules_of(rows: list[dict[str, Any]], **changes: Any) -> Rewards:
    return Rewards.write(
        [
            reward_row(row["question_id"], row["sample"], row["label"], extracted=str(row["sample"]))
            | {"step_rewards": row["step_labels"], "step_ends": row["step_ends"], **changes}
            for row in rows
        ]
    )


def _lines(row: dict[str, Any]) -> str:
    return "".join("\n" if place in row["step_ends"][:-1] else "x" for place in range(len(row["output_ids"])))
