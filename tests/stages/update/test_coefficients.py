"""Each row of Table 10: the gradient of the loss the trainer uses is (1/|o|) sum GC grad log pi, to 1e-9 in float64."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

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
    RFTConfig,
    RLOOConfig,
    SFTObjectiveConfig,
    TruncatedCorrectionConfig,
    UpdateConfig,
)
from stages.update.loss import Example
from tests.stages.training.tiny import random_rows
from tests.stages.update import coefficients
from tests.stages.update.exact import defined_gradient, gradient_of, logprobs, policy_model, relative, trained_gradient

ROWS = random_rows(8, seed=3)
EXACT = 1e-9


def examples(advantages: str, *, rollout: bool = False) -> list[Example]:
    """Eight outputs of two questions, of 1 to 9 tokens, with advantages of one kind."""
    rng = random.Random(5)
    made = []
    for number, row in enumerate(ROWS):
        length = len(row.output_ids)
        match advantages:
            case "ones":
                values = [1.0] * length
            case "correct":
                values = [float(number % 3 == 0)] * length
            case "outputs":
                values = [[1.5, -0.5, 0.25, -1.25][number % 4]] * length
            case "pairs":
                values = [1.0 if number % 2 == 0 else -1.0] * length
            case _:
                values = [rng.randrange(-8, 8) / 4 for _ in range(length)]
        engine = tuple(rng.uniform(-4, -1) for _ in range(length)) if rollout else None
        pair = number // 2 if advantages == "pairs" else None
        made.append(
            Example(f"q{number // 4}", tuple(row.prompt_ids), tuple(row.output_ids), tuple(values), 1.0, engine, pair)
        )
    return made


def update(objective: ObjectiveConfig, **changes: object) -> UpdateConfig:
    return UpdateConfig(objective=objective, micro_batch_tokens=40, **changes)  # several micro-batches


def own(example: Example, _: Tensor) -> Tensor:
    return torch.tensor(example.advantage, dtype=torch.float64)


@pytest.mark.claim("Eq. 6-7", "SFT", "Eq. 5")
def test_sft_has_coefficient_one() -> None:
    given = examples("ones")
    found, _ = trained_gradient(given, update(SFTObjectiveConfig()))
    assert relative(found, defined_gradient(given, lambda _, logp: coefficients.sft(logp))) < EXACT


def grpo_coefficient(reference: Any, beta: float, temperature: float = 1.0) -> Callable[[Example, Tensor], Tensor]:
    """Eq. 21, with log pi_ref by one forward a row."""

    def coefficient(example: Example, logp: Tensor) -> Tensor:
        with torch.no_grad():
            ref = logprobs(reference, example, temperature)
        return coefficients.grpo(own(example, logp), logp, ref, beta=beta)

    return coefficient


@pytest.mark.claim("Eq. 8-10", "RFT", "Online RFT", "Eq. 5")
@pytest.mark.parametrize("objective", [RFTConfig(), OnlineRFTConfig()])
def test_rft_and_online_rft_have_coefficient_one_where_right(
    objective: ObjectiveConfig,
) -> None:
    given = examples("correct")
    found, _ = trained_gradient(given, update(objective))

    def gc(example: Example, logp: Tensor) -> Tensor:
        return coefficients.online_rft(torch.tensor([example.advantage[0] == 1.0]), logp[None])[0]

    assert relative(found, defined_gradient(given, gc)) < EXACT


@pytest.mark.claim("Eq. 13-14", "DPO", "Eq. 5")
def test_dpo_has_the_coefficient_of_eq_14_times_beta() -> None:
    given, reference, beta = examples("pairs"), policy_model(1), 0.5
    found, _ = trained_gradient(given, update(DPOConfig(beta=beta)), reference=reference)
    policy = policy_model()
    with torch.no_grad():
        m = torch.stack([(logprobs(policy, e) - logprobs(reference, e)).mean() for e in given])
    gc_P = coefficients.dpo(m[0::2], m[1::2], beta=beta)

    def gc(example: Example, logp: Tensor) -> Tensor:
        return gc_P[example.pair] * example.advantage[0] * torch.ones_like(logp)

    # The mean is over pairs, half as many as outputs; the paper's coefficient lacks the factor beta.
    expected = beta * defined_gradient(given, gc, weight=lambda e: 1 / (len(given) / 2 * len(e.output_ids)))
    assert relative(found, expected) < EXACT


@pytest.mark.claim("Eq. 18", "PPO", "Eq. 5")
def test_ppo_has_the_advantage_of_each_token_its_critic_detached() -> None:
    given = examples("tokens")
    found, _ = trained_gradient(given, update(PPOConfig()))
    assert relative(found, defined_gradient(given, lambda e, _: coefficients.ppo(own(e, _)))) < EXACT


@pytest.mark.claim("KL twice", "Eq. 21", "GRPO", "Eq. 5")
@pytest.mark.parametrize("beta", [0.04, 1.0])
def test_grpo_has_the_coefficient_of_eq_21(beta: float) -> None:
    given, reference = examples("tokens"), policy_model(1)
    found, _ = trained_gradient(given, update(GRPOConfig(beta=beta)), reference=reference)
    assert relative(found, defined_gradient(given, grpo_coefficient(reference, beta))) < EXACT


@pytest.mark.claim("sampled at T, scored at 1")
def test_the_temperature_divides_the_logits_of_policy_and_reference() -> None:
    given, reference = examples("tokens"), policy_model(1)
    found, _ = trained_gradient(given, update(GRPOConfig(beta=1.0)), reference=reference, temperature=0.7)
    expected = defined_gradient(given, grpo_coefficient(reference, 1.0, 0.7), temperature=0.7)
    assert relative(found, expected) < EXACT


@pytest.mark.claim("equal groups that lose their KL term")
def test_degenerate_groups_keep_the_gradient_of_their_kl_term() -> None:
    """And have exactly none without it."""
    given = [dataclasses.replace(e, advantage=(0.0,) * len(e.output_ids)) for e in examples("ones")]
    reference = policy_model(1)
    found, _ = trained_gradient(given, update(GRPOConfig(beta=0.04)), reference=reference)
    assert found.norm() > 0
    assert relative(found, defined_gradient(given, grpo_coefficient(reference, 0.04))) < EXACT
    assert not trained_gradient(given, update(GRPOConfig(beta=0.0)))[0].any()


TOKENS = sum(len(row.output_ids) for row in ROWS)


@pytest.mark.claim("Dr. GRPO", "DAPO: clip-higher, token mean")
@pytest.mark.parametrize(
    ("objective", "weight"),
    [
        (DrGRPOConfig(length=64), lambda _: 1 / (len(ROWS) * 64)),
        (DAPOConfig(), lambda _: 1 / TOKENS),
        (GSPOConfig(), lambda e: 1 / (len(ROWS) * len(e.output_ids))),
        (CISPOConfig(), lambda _: 1 / TOKENS),
        (RLOOConfig(), lambda _: 1 / len(ROWS)),
        (ReinforcePlusPlusConfig(), lambda _: 1 / TOKENS),
        (DistillationConfig(), lambda _: 1 / TOKENS),
        (GRPOConfig(beta=0.0, aggregation="token_mean"), lambda _: 1 / TOKENS),
        (GRPOConfig(beta=0.0, aggregation="constant", length=8), lambda _: 1 / (len(ROWS) * 8)),
    ],
)
def test_later_methods_have_the_advantage_under_their_own_mean(objective: ObjectiveConfig, weight: object) -> None:
    given = examples("outputs")
    found, _ = trained_gradient(given, update(objective))
    assert relative(found, defined_gradient(given, own, weight=weight)) < EXACT  # type: ignore[arg-type]


def judged(given: list[Example], teacher: Any, policy: Any, temperature: float = 1.0) -> list[Example]:
    """The examples with log pi_teacher - log pi of each token as its advantage, each from a forward of its own."""
    with torch.no_grad():
        values = [logprobs(teacher, e, temperature) - logprobs(policy, e, temperature) for e in given]
    return [dataclasses.replace(e, advantage=tuple(value.tolist())) for e, value in zip(given, values, strict=True)]


@pytest.mark.claim("on-policy distillation")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_distillation_has_the_log_ratio_of_teacher_and_policy(temperature: float) -> None:
    teacher, policy = policy_model(1), policy_model()
    given = judged(examples("ones"), teacher, policy, temperature)
    found, _ = trained_gradient(given, update(DistillationConfig()), temperature=temperature)

    def gc(example: Example, logp: Tensor) -> Tensor:
        with torch.no_grad():
            ratio = coefficients.distillation(logp, logprobs(teacher, example, temperature))
        return ratio.float().double()  # the table keeps float32

    expected = defined_gradient(given, gc, weight=lambda _: 1 / TOKENS, temperature=temperature)
    assert relative(found, expected) < EXACT
    assert not trained_gradient(judged(given, policy, policy), update(DistillationConfig()))[0].any()


@pytest.mark.claim("on-policy distillation")
def test_every_first_token_by_its_chance_gives_the_gradient_of_the_reverse_kl() -> None:
    """One output for each token of the vocabulary, weighed by its chance: the expectation, without sampling."""
    teacher, policy, prompt = policy_model(1), policy_model(), (3, 5, 7)
    table = [model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for model in (policy, teacher)]
    divergence = (table[0].exp() * (table[0] - table[1].detach())).sum()
    (-divergence).backward()
    chances = table[0].detach().exp().tolist()
    given = [Example("q", prompt, (token,), (), chance) for token, chance in enumerate(chances)]
    found, _ = trained_gradient(judged(given, teacher, policy_model()), update(DistillationConfig()))
    assert divergence > 0.01
    assert relative(found, gradient_of(policy)) < 1e-6  # advantages are kept in float32


@pytest.mark.claim("the engine's log-probabilities as log pi_old", "truncated importance weights")
def test_a_correction_multiplies_the_advantage_and_not_the_kl_term() -> None:
    given, reference = examples("tokens", rollout=True), policy_model(1)
    config = update(GRPOConfig(beta=0.5), correction=TruncatedCorrectionConfig(level="token", cap=1.5))
    found, noted = trained_gradient(given, config, reference=reference)
    assert noted.sums["correction_mean"] > 0

    def gc(example: Example, logp: Tensor) -> Tensor:
        # The table keeps float32.
        engine = torch.tensor(example.rollout_logp, dtype=torch.float32).double()
        with torch.no_grad():
            ref = logprobs(reference, example)
        weight = (logp - engine).exp().clamp(max=1.5)
        return coefficients.grpo(weight * own(example, logp), logp, ref, beta=0.5)

    assert relative(found, defined_gradient(given, gc)) < EXACT


def test_outputs_of_an_earlier_policy_are_weighed_by_the_ratio_to_it() -> None:
    given, earlier = examples("tokens"), policy_model(2)
    found, noted = trained_gradient(given, update(GRPOConfig(beta=0.0, eps=0.2)), old=earlier)

    def gc(example: Example, logp: Tensor) -> Tensor:
        with torch.no_grad():
            ratio = (logp - logprobs(earlier, example)).exp()
        advantage = own(example, logp)
        active = ratio * advantage <= ratio.clamp(0.8, 1.2) * advantage
        return torch.where(active, ratio * advantage, 0.0)

    assert 0 < noted.sums["clip_fraction"] < 1
    assert relative(found, defined_gradient(given, gc)) < EXACT
