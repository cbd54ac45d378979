"""All combinations of what makes a method: each is refused with a reason, or has its gradient compared with the papers'."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from flows.config import IterativeRLConfig
from pipeline.store import Store
from stages.advantage import AdvantageConfig, estimate_advantages
from stages.tables import Advantages, Logprobs, Rewards, Rollouts, Values
from stages.training.batching import deal
from stages.update import UpdateConfig
from stages.update.loss import Example
from stages.update.stage import join
from tests.flows import formulas
from tests.flows.combinations import Space, space
from tests.flows.formulas import Known, Output
from tests.stages.training.tiny import VOCABULARY, random_rows
from tests.stages.update.exact import gradient_of, logprobs, relative, trained_gradient

POLICY, REFERENCE, EARLIER = 0, 1, 2
PAGE = Path(__file__).parents[3] / "docs" / "correctness.md"


class Counted(NamedTuple):
    """What an enumeration found."""

    size: int
    allowed: int
    updates: dict[str, IterativeRLConfig]
    """One combination for each distinct way from advantages to the gradient."""
    advantages: dict[str, AdvantageConfig]
    """Each distinct advantage."""


def counted(given: Space) -> Counted:
    allowed, updates, advantages = 0, {}, {}
    for config in given.allowed():
        allowed += 1
        if config.environment is not None:  # which changes neither advantage nor objective
            continue
        updates.setdefault(way(config), config)
        advantages.setdefault(repr(config.advantage), config.advantage)
    return Counted(given.size, allowed, updates, advantages)


def way(config: IterativeRLConfig) -> str:
    """All that decides the gradient once the advantages are numbers: two combinations of one way have one gradient."""
    update = config.update
    several = update.mu * update.mini_batches > 1
    return repr((update.objective, shape(config.advantage), several, update.old_logprobs, update.correction))


def shape(advantage: Any) -> str:
    """How the advantages of an output's tokens are related."""
    if advantage.kind == "group":
        return "tokens" if advantage.supervision == "process" else "outputs"
    return {"batch": "tokens", "gae": "tokens", "teacher": "tokens"}.get(advantage.kind, advantage.kind)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are tiny here: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def found() -> Counted:
    return counted(space(whole=False))


def test_the_page_of_correctness_says_how_many_combinations_there_are(found: Counted) -> None:
    said = (
        f"Of {found.size:,} combinations {found.allowed:,} are allowed: {len(found.advantages)} advantages and "
        f"{len(found.updates)} ways to the gradient"
    )
    assert said in PAGE.read_text(encoding="utf-8")


def test_every_objective_and_every_advantage_is_allowed_somewhere(found: Counted) -> None:
    given = space(whole=False)
    used = {repr(config.update.objective) for config in found.updates.values()}
    assert used == {repr(objective) for objective in given.objectives if objective is not None}
    assert set(found.advantages) == {repr(advantage) for advantage in given.advantages if advantage is not None}


# ------------------------------------------------------------------------------------------------ one exploration


def outputs() -> list[Output]:
    """Three questions of four outputs: one of unequal rewards, one of equal ones, one with an output without a verdict."""
    rng = random.Random(11)
    rewards: list[float | None] = [1.0, 0.0, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, None, 0.25]
    made = []
    for place, (row, reward) in enumerate(zip(random_rows(12, seed=3), rewards, strict=True)):
        length = len(row.output_ids)
        ends = sorted({rng.randrange(length), length - 1})
        steps = [(0.5 if 4 <= place < 8 else rng.randrange(4) / 4, end) for end in ends]
        k1, value = ([rng.uniform(-1, 1) for _ in range(length)] for _ in range(2))
        rollout = [rng.uniform(-4, -2) for _ in range(length)]
        key = f"q{place // 4}", place % 4
        made.append(
            Output(*key, [*row.prompt_ids], [*row.output_ids], reward, place in (1, 9), steps, k1, value, rollout)
        )
    return made


def estimated(config: AdvantageConfig) -> tuple[Rollouts, Advantages]:
    """The tables of the exploration, through the stages' own."""
    rows = outputs()
    keys = [{"question_id": each.question, "sample": each.sample} for each in rows]
    sampled = Rollouts.write(
        [
            key
            | {
                "prompt_ids": each.prompt,
                "output_ids": each.ids,
                "logprobs": each.rollout,
                "finish_reason": "length" if each.cut else "stop",
                "text": "",
                "text_ends": [0] * len(each.ids),
                "temperature": 1.0,
                "seed": 0,
            }
            for key, each in zip(keys, rows, strict=True)
        ]
    )
    scored = Rewards.write(
        [
            key
            | {
                "reward": each.reward,
                "status": "error" if each.reward is None else "ok" if each.right else "wrong",
                "extracted": None,
                "components": [("accuracy", each.reward)],
                "step_rewards": None if each.reward is None else [reward for reward, _ in each.steps],
                "step_ends": None if each.reward is None else [end for _, end in each.steps],
                "scorer": None,
            }
            for key, each in zip(keys, rows, strict=True)
        ]
    )
    values = Values.write([key | {"value": each.value} for key, each in zip(keys, rows, strict=True)])
    both = [{"policy": [k1 - 1.0 for k1 in each.k1], "reference": [-1.0] * len(each.k1)} for each in rows]
    compared = Logprobs.write([key | pair for key, pair in zip(keys, both, strict=True)])
    return sampled, estimate_advantages(scored, sampled, config, values, compared)


@pytest.mark.claim("settings that mean nothing together")
def test_every_allowed_advantage_is_that_of_its_paper(store: Store, found: Counted) -> None:
    """Through float32 tables, hence 1e-6."""
    assert len(found.advantages) > 10
    for name, config in found.advantages.items():
        _, table = estimated(config)
        compare_advantages(name, table, config)


def compare_advantages(name: str, table: Advantages, config: AdvantageConfig) -> None:
    for row, expected in zip(table.rows(), formulas.advantages(outputs(), config), strict=True):
        assert (row["advantage"] is None) == (expected is None), (name, row)
        assert row["advantage"] is None or row["advantage"] == pytest.approx(expected, rel=1e-5, abs=1e-6), name


# ------------------------------------------------------------------------------------------------ gradients


class Bigram(torch.nn.Module):
    """A language model whose next token depends on the last one alone: thousands of gradients take seconds."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 6, dtype=torch.float64)
        self.head = torch.nn.Linear(6, VOCABULARY, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def get_output_embeddings(self) -> torch.nn.Module:
        """The head, which the trainer asks for."""
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        """Logits, as transformers returns them."""
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)))


@functools.cache
def fixed(seed: int, prompt_ids: tuple[int, ...], output_ids: tuple[int, ...]) -> Tensor:
    """log pi of an output under a model that stays as it is."""
    with torch.no_grad():
        return logprobs(Bigram(seed), Example("", prompt_ids, output_ids, (), 1.0))


def gradient_by_formula(examples: Sequence[Example], update: UpdateConfig) -> Tensor:
    """dJ/dtheta, every output by itself: without padding, micro-batches, weights or masks."""
    policy, several, known = Bigram(POLICY), update.mu * update.mini_batches > 1, []
    for each in examples:
        logp = logprobs(policy, each)
        ref, earlier = (fixed(seed, each.prompt_ids, each.output_ids) for seed in (REFERENCE, EARLIER))
        # The tables keep float32.
        engine = torch.tensor(each.rollout_logp or [0.0] * len(logp), dtype=torch.float32).double()
        old = engine if update.old_logprobs == "rollout" else earlier if several else logp.detach()
        known.append(Known(logp, old, ref, engine, torch.tensor(each.advantage, dtype=torch.float64), each.pair))
    formulas.objective(known, update.objective, update.correction).backward()
    return gradient_of(policy)


def difference(update: UpdateConfig, tables: tuple[Rollouts, Advantages]) -> float:
    """Distance of the trainer's gradient from the formula's, for one way from advantages to the gradient."""
    examples = join(*tables, with_logprobs=update.reads_rollout_logprobs)
    if update.mini_batches > 1:
        examples = deal(examples, mini_batches=update.mini_batches, seed=1)[0]
    several = update.mu * update.mini_batches > 1
    trained, _ = trained_gradient(
        examples,
        update.override({"micro_batch_tokens": 64}),  # several micro-batches
        policy=Bigram(POLICY),
        reference=Bigram(REFERENCE),
        old=Bigram(EARLIER) if several and update.old_logprobs == "trainer" else None,
    )
    return relative(trained, gradient_by_formula(examples, update))


@pytest.mark.claim("settings that mean nothing together")
def test_every_allowed_way_to_the_gradient_is_that_of_its_paper(store: Store, found: Counted) -> None:
    assert len(found.updates) > 100
    tables: dict[str, tuple[Rollouts, Advantages]] = {}
    for name, config in found.updates.items():
        kind = repr(config.advantage)
        if kind not in tables:
            tables[kind] = estimated(config.advantage)
        assert difference(config.update, tables[kind]) < 1e-9, name


@pytest.mark.claim("settings that mean nothing together")
@pytest.mark.slow
def test_the_whole_space_is_allowed_in_no_other_way(store: Store, found: Counted) -> None:
    """With every field of advantages: more advantages, each that of its paper, and the same ways from there."""
    whole = counted(space(whole=True))
    print(f"{whole.size} combinations, {whole.size - whole.allowed} refused, {len(whole.advantages)} advantages")
    assert set(whole.updates) == set(found.updates)
    for name, config in whole.advantages.items():
        compare_advantages(name, estimated(config)[1], config)
