"""Tokens that an environment wrote: advantages are those of the same outputs without them, and 0 where they are."""

from __future__ import annotations

import random
from typing import Any

import pytest

from stages.advantage import (
    AdvantageConfig,
    BatchConfig,
    CorrectConfig,
    GAEConfig,
    GroupConfig,
    OneConfig,
    PairsConfig,
    TeacherConfig,
)
from stages.advantage.stage import estimate_advantages
from stages.tables import Logprobs, Rewards, Rollouts, Values
from tests.stages.rows import reward_row, rollout_row

pytestmark = pytest.mark.usefixtures("store")

CONFIGS = [
    OneConfig(), CorrectConfig(), GroupConfig(), GroupConfig(kl_in_reward=0.1), GroupConfig(supervision="process"),
    BatchConfig(kl_in_reward=0.1), BatchConfig(baseline="group_mean"), GAEConfig(gamma=0.9, lam=0.8), GAEConfig(whiten="batch"),
    PairsConfig(), TeacherConfig(),
]  # fmt: skip


def spans(written: list[bool]) -> list[dict[str, int]] | None:
    """Return the runs of True; None where there is nothing else."""
    if all(written):
        return None
    border = [False, *written, False]
    changes = [place for place in range(len(written) + 1) if border[place] != border[place + 1]]
    return [{"start": start, "end": end} for start, end in zip(changes[::2], changes[1::2], strict=True)]


def estimated(config: AdvantageConfig, *, whole: bool) -> tuple[list[Any], list[list[bool]]]:
    """Return the rows of two questions' advantages, with what environments wrote or without; and who wrote each token."""
    rng, rows = random.Random(4), {name: [] for name in ("rollouts", "rewards", "values", "logprobs")}  # type: ignore[var-annotated]
    owners = []
    for number in range(8):
        key = {"question_id": f"q{number // 4}", "sample": number % 4}
        written = [at == 0 or rng.random() < 0.6 for at in range(rng.randrange(3, 9))]
        if number == 2:
            written = [True] * len(written)
        # A step ends with the last token of its line that the policy wrote, so that steps here end at such tokens.
        kept = [at for at, own in enumerate(written) if own or whole]
        ends = sorted({at for at, own in enumerate(written) if own and rng.random() < 0.5} | {0})
        steps = [rng.randrange(8) / 4 for _ in ends]
        ends = [kept.index(at) for at in ends]
        columns = {name: [rng.randrange(-16, 0) / 8 for _ in written] for name in ("value", "policy", "reference")}
        columns = {name: [values[at] for at in kept] for name, values in columns.items()}
        ids = [at for at in range(len(written)) if at in kept]
        rows["rollouts"].append(
            rollout_row(key["question_id"], key["sample"], ids, turns=spans(written) if whole else None)
        )
        reward = {"status": ("ok", "wrong")[number % 2], "step_rewards": steps, "step_ends": ends}
        rows["rewards"].append(reward_row(key["question_id"], key["sample"], rng.randrange(8) / 4, **reward))
        rows["values"].append(key | {"value": columns["value"]})
        rows["logprobs"].append(key | {"policy": columns["policy"], "reference": columns["reference"]})
        owners.append(written)
    made = estimate_advantages(
        Rewards.write(rows["rewards"]),
        Rollouts.write(rows["rollouts"]),
        config,
        Values.write(rows["values"]),
        Logprobs.write(rows["logprobs"]),
    )
    return made.rows(), owners


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_advantages_are_those_of_the_outputs_without_what_was_observed(config: AdvantageConfig) -> None:
    (found, owners), (expected, _) = estimated(config, whole=True), estimated(config, whole=False)
    assert any(row["advantage"] for row in expected)
    for row, without, written in zip(found, expected, owners, strict=True):
        assert row["pair"] == without["pair"]
        for column in ("advantage", "returns"):
            if without[column] is None:
                assert row[column] is None
                continue
            values = iter(without[column])
            assert row[column] == [next(values) if own else 0.0 for own in written]


def test_a_step_ends_with_its_last_token_of_the_policy_and_one_without_any_is_none() -> None:
    written = [True, True, False, False, False, True]
    rows = [rollout_row("q", sample, range(6), turns=spans(written)) for sample in range(2)]
    # Lines: 0-2 (ends observed), 3-4 (all observed), 5. The middle one counts nowhere.
    steps = [reward_row("q", 0, 1.0, step_rewards=[1.0, 99.0, 3.0], step_ends=[2, 4, 5])]
    steps += [reward_row("q", 1, 0.0, step_rewards=[0.0, -99.0, 0.0], step_ends=[2, 4, 5])]
    config = GroupConfig(supervision="process", scale="none")
    first, _ = estimate_advantages(Rewards.write(steps), Rollouts.write(rows), config).rows()
    assert first["advantage"] == [2.0, 2.0, 0.0, 0.0, 0.0, 2.0]  # 1 - 1 and 3 - 1 are still to come, then 3 - 1
