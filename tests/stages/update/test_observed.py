"""Tokens that an environment wrote: the gradient of every objective is that of the tokens the policy wrote, in float64."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.tables import Advantages, Rollouts
from stages.update import (
    CISPOConfig,
    DAPOConfig,
    DistillationConfig,
    DPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    ObjectiveConfig,
    OnlineRFTConfig,
    PPOConfig,
    ReinforcePlusPlusConfig,
    RLOOConfig,
    SFTObjectiveConfig,
    TruncatedCorrectionConfig,
    UpdateConfig,
)
from stages.update.loss import Example
from stages.update.objectives import method_of
from stages.update.objectives.method import Tokens
from stages.update.stage import join, merge_equal
from tests.stages.rows import advantage_row, rollout_row
from tests.stages.training.tiny import random_rows
from tests.stages.update.exact import gradient_of, logprobs, policy_model, relative, trained_gradient

EXACT = 1e-9
OBJECTIVES = [
    SFTObjectiveConfig(), OnlineRFTConfig(), DPOConfig(), DPOConfig(length_normalised=False), PPOConfig(),
    GRPOConfig(beta=0.04), GRPOConfig(beta=0.04, divergence="k3_unbiased"), DAPOConfig(), DrGRPOConfig(), GSPOConfig(),
    CISPOConfig(), RLOOConfig(), ReinforcePlusPlusConfig(), DistillationConfig(),
]  # fmt: skip


def dialogues(objective: ObjectiveConfig, *, garbage: float = 0.0) -> list[Example]:
    """Return eight outputs of two questions, six of them with tokens of an environment; `garbage` is what those have."""
    rng = random.Random(2)
    made = []
    for number, row in enumerate(random_rows(8, seed=3)):
        ids = [*row.output_ids, *random_rows(1, seed=number)[0].output_ids]
        written = tuple(at == 0 or at == len(ids) - 1 or rng.random() < 0.5 for at in range(len(ids)))
        sign = 1.0 if number % 2 == 0 else -1.0
        values = [sign if objective.kind == "dpo" else rng.randrange(-8, 8) / 4 for _ in ids]
        engine = [rng.randrange(-32, -8) / 8 for _ in ids]
        if number in (3, 6):
            written = (True,) * len(ids)
        made.append(
            Example(
                f"q{number // 4}",
                tuple(row.prompt_ids),
                tuple(ids),
                tuple(value if own else garbage for value, own in zip(values, written, strict=True)),
                1.0,
                tuple(value if own else garbage for value, own in zip(engine, written, strict=True)),
                number // 2 if objective.kind == "dpo" else None,
                written=None if number in (3, 6) else written,
            )
        )
    return made


def of_written_tokens(given: list[Example], config: UpdateConfig, old: Any, reference: Any) -> Tensor:
    """Return the gradient of J by its definition, an output at a time: what the policy did not write is cut out first."""
    model, method = policy_model(), method_of(config.objective)
    outputs, tokens = len(given), sum(sum(example.written or [True] * len(example.output_ids)) for example in given)
    step = 2 if method.pairs else 1
    for first in range(0, len(given), step):
        rows = []
        for example in given[first : first + step]:
            own = torch.tensor(example.written or [True] * len(example.output_ids))
            logp = logprobs(model, example)[own]
            with torch.no_grad():
                before, ref = logprobs(old, example)[own], logprobs(reference, example)[own]
            engine = torch.tensor(example.rollout_logp, dtype=torch.float64)[own]
            rows.append((logp, before, ref, torch.tensor(example.advantage, dtype=torch.float64)[own], engine))
        longest = max(len(row[0]) for row in rows)
        logp, before, ref, advantage, engine = (
            torch.stack([torch.nn.functional.pad(row[part], (0, longest - len(row[part]))) for row in rows])
            for part in range(5)
        )
        mask = torch.stack([torch.arange(longest) < len(row[0]) for row in rows]).double()
        value = method.surrogate(Tokens(logp, before, ref, advantage, mask.bool())).value_BT
        if config.correction.kind == "truncated":
            ratio = (before - engine).exp()
            if config.correction.level == "sequence":
                ratio = (mask * (before - engine)).sum(-1, keepdim=True).exp().expand_as(value)
            value = ratio.clamp(max=config.correction.cap) * value
        if method.beta:
            k3 = torch.expm1(ref - logp) - (ref - logp)
            value = value - method.beta * (k3 if method.divergence == "k3" else (logp - before).exp() * k3)
        share = {
            "sequence_mean": 1 / (outputs * mask.sum(-1, keepdim=True)),
            "token_mean": torch.tensor(1 / tokens, dtype=torch.float64),
            "constant": torch.tensor(1 / (outputs * method.length), dtype=torch.float64),
        }[method.aggregation]
        (mask * share * value).sum().backward()
    return gradient_of(model)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.kind)
def test_the_gradient_is_that_of_the_tokens_that_the_policy_wrote(objective: ObjectiveConfig) -> None:
    config = UpdateConfig(objective=objective, micro_batch_tokens=40)
    given, old, reference = dialogues(objective), policy_model(2), policy_model(1)
    found, noted = trained_gradient(given, config, reference=reference, old=old)
    assert relative(found, of_written_tokens(given, config, old, reference)) < EXACT
    every = [
        dataclasses.replace(example, written=None, advantage=(example.advantage[0],) * len(example.output_ids))
        for example in given
    ]
    assert relative(trained_gradient(every, config, reference=reference, old=old)[0], found) > 0.01
    # Whatever is noted where the environment wrote changes nothing, numbers that overflow an exponential included.
    wild, same = trained_gradient(dialogues(objective, garbage=-900.0), config, reference=reference, old=old)
    assert torch.equal(wild, found)
    assert same.sums == noted.sums
    assert (same.ratio_max, same.ratio_min) == (noted.ratio_max, noted.ratio_min)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_correction_weighs_the_tokens_that_the_policy_wrote(level: str) -> None:
    correction = TruncatedCorrectionConfig(level=level, cap=1.5)
    config = UpdateConfig(objective=GRPOConfig(beta=0.04), micro_batch_tokens=40, correction=correction)
    given, old, reference = dialogues(config.objective), policy_model(2), policy_model(1)
    found, _ = trained_gradient(given, config, reference=reference, old=old)
    assert relative(found, of_written_tokens(given, config, old, reference)) < EXACT


def test_records_are_read_where_the_policy_wrote_and_rows_are_equal_only_with_equal_turns(store: object) -> None:
    turns = [{"start": 0, "end": 1}, {"start": 2, "end": 4}]
    rows = [
        rollout_row("q", 0, [5, 6, 7, 8], logprobs=[-1.0, None, -3.0, -4.0], turns=turns),
        rollout_row("q", 1, [5, 6, 7, 8], logprobs=[-1.0, None, -3.0, -4.0], turns=turns),
        rollout_row("q", 2, [5, 6, 7, 8], logprobs=[-1.0, -2.0, -3.0, -4.0], turns=None),
    ]
    advantages = Advantages.write([advantage_row("q", sample, [1.0, 0.0, 1.0, 1.0]) for sample in range(3)])
    examples = join(Rollouts.write(rows), advantages, with_logprobs=True)
    assert [example.written for example in examples] == [(True, False, True, True)] * 2 + [None]
    assert examples[0].rollout_logp == (-1.0, 0.0, -3.0, -4.0)
    assert [example.length for example in examples] == [3, 3, 4]
    assert [example.weight for example in merge_equal(examples)] == [2.0, 1.0]
    lacking = Rollouts.write([rows[0] | {"logprobs": [-1.0, None, None, -4.0]}])
    with pytest.raises(ValueError, match=r"output \('q', 0\).*token 2"):
        join(lacking, Advantages.write([advantage_row("q", 0, [1.0] * 4)]), with_logprobs=True)
