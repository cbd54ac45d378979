"""The probe of an engine's weights, in the model of a trainer that has them, and in one that is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pipeline.residency import evict
from stages.models import Checkpoint, load_model
from stages.rollout import probe
from stages.rollout.probe import Answer, StaleWeightsError, check_answer, probe_ids
from stages.training import TrainingConfig
from stages.training.loop import resident_engine
from tests.stages.rollout.policies import tiny_policy

pytestmark = pytest.mark.usefixtures("store")

SAMPLED = [4, 9, 2]
T = 0.7


class LoadedError(Exception):
    """A model was loaded."""


@pytest.fixture(autouse=True)
def _nothing_resident() -> Iterator[None]:
    evict()
    yield
    evict()


def answer(policy: Checkpoint) -> tuple[Answer, list[int]]:
    """What a right engine says: log softmax(logits) of the prompt, log softmax(logits / T) behind it."""
    prompt = probe_ids(17, 64)
    ids = torch.tensor([[*prompt, *SAMPLED]])
    with torch.no_grad():
        logits = load_model(policy, dtype=torch.float32)(input_ids=ids).logits[0, :-1]
    logp = [row.log_softmax(-1)[token] for row, token in zip(logits, ids[0, 1:], strict=True)]
    cold = [(row / T).log_softmax(-1)[token] for row, token in zip(logits, ids[0, 1:], strict=True)]
    split = len(prompt) - 1
    return Answer([float(x) for x in logp[:split]], SAMPLED, [float(x) for x in cold[split:]]), prompt


def check(policy: Checkpoint, answers: list[Answer], prompt: list[int], dtype: torch.dtype = torch.float32) -> float:
    return check_answer(answers, policy, prompt, dtype=dtype, temperature=T, tolerance=None, engine="vllm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True}, {"adapter": {"r": 2}}])
def test_a_trainer_that_has_the_policy_is_asked_and_nothing_is_loaded(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    policy, other = tiny_policy(0), tiny_policy(1)
    (right, prompt), (stale, _) = answer(policy), answer(other)
    engine = resident_engine(policy, TrainingConfig.parse({"precision": "fp32", **settings}))

    def load(*_: Any, **__: Any) -> Any:
        raise LoadedError

    monkeypatch.setattr(probe, "load_model", load)
    assert check(policy, [right, right], prompt, dtype) < 1e-5
    with pytest.raises(StaleWeightsError, match="engine 1 of 2"):
        check(policy, [right, stale], prompt, dtype)
    engine.holds = None  # it is training
    with pytest.raises(LoadedError):
        check(policy, [right], prompt, dtype)


def test_without_a_trainer_the_policy_is_loaded() -> None:
    policy = tiny_policy(0)
    right, prompt = answer(policy)
    assert check(policy, [right], prompt) < 1e-5
    with pytest.raises(StaleWeightsError, match=r"^vllm: "):
        check(policy, [answer(tiny_policy(1))[0]], prompt)
