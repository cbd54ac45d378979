"""Small tables for advantage tests, one dictionary a row."""

from __future__ import annotations

from typing import Any

from stages.advantage import AdvantageConfig, GroupConfig, estimate_advantages
from stages.tables import Advantages, Logprobs, Rewards, Rollouts, Values

Row = dict[str, Any]


def row(question_id: str, sample: int, reward: float | None, tokens: int = 2, **changes: Any) -> Row:
    """An output with its reward; status `ok` where the reward is 1. `steps` is a list of (reward, end)."""
    return {"question_id": question_id, "sample": sample, "reward": reward, "tokens": tokens, **changes}


def group(question_id: str, *rewards: float | None, tokens: int = 2) -> list[Row]:
    return [row(question_id, sample, reward, tokens) for sample, reward in enumerate(rewards)]


def rewards_of(rows: list[Row]) -> Rewards:
    return Rewards.write([_scored(each) for each in rows])


def outputs_of(rows: list[Row]) -> Rollouts:
    return Rollouts.write([_sampled(each) for each in rows])


def values_of(rows: list[Row], *values: list[float]) -> Values:
    return Values.write([_key(each) | {"value": value} for each, value in zip(rows, values, strict=True)])


def logprobs_of(rows: list[Row], *k1: list[float]) -> Logprobs:
    """A policy that differs from the reference by `k1` nats at each token."""
    return Logprobs.write(
        [
            _key(each) | {"policy": [-1.0 + d for d in deltas], "reference": [-1.0] * len(deltas)}
            for each, deltas in zip(rows, k1, strict=True)
        ]
    )


def estimate(rows: list[Row], config: AdvantageConfig = GroupConfig(), **tables: Any) -> Advantages:  # noqa: B008 - frozen
    return estimate_advantages(rewards_of(rows), outputs_of(rows), config, **tables)


def advantages(rows: list[Row], config: AdvantageConfig = GroupConfig(), **tables: Any) -> list[Any]:  # noqa: B008 - frozen
    return [found["advantage"] for found in estimate(rows, config, **tables).rows()]


def _key(each: Row) -> Row:
    return {"question_id": each["question_id"], "sample": each["sample"]}


def _scored(each: Row) -> Row:
    reward, steps = each["reward"], each.get("steps")
    return _key(each) | {
        "reward": reward,
        "status": each.get("status", "error" if reward is None else "ok" if reward == 1 else "wrong"),
        "extracted": None,
        "components": [("accuracy", reward)],
        "step_rewards": each.get("step_rewards", None if steps is None else [score for score, _ in steps]),
        "step_ends": each.get("step_ends", None if steps is None else [end for _, end in steps]),
        "scorer": each.get("scorer"),
    }


def _sampled(each: Row) -> Row:
    tokens = each["tokens"]
    return _key(each) | {
        "prompt_ids": [1],
        "output_ids": list(range(tokens)),
        "logprobs": [0.0] * tokens,
        "finish_reason": "length" if each.get("cut") else "stop",
        "text": "x" * tokens,
        "text_ends": list(range(1, tokens + 1)),
        "temperature": 1.0,
        "seed": 0,
    }


# Two outputs of 5 and 4 tokens with two and three steps.
PROCESS = [
    row("a", 0, 1.0, 5, steps=[(0.9, 1), (0.1, 4)]),
    row("a", 1, 0.0, 4, steps=[(0.2, 0), (0.8, 2), (0.5, 3)]),
]
