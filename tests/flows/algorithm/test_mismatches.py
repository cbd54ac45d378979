"""`update.mismatch.max_kl=auto` at each step of a run: a number for vLLM, none where stale weights cannot be or show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from flows.algorithm.sampling import Mismatches
from flows.config.recipes import RECIPES
from flows.iterative_rl import naming
from stages.models import Checkpoint
from stages.tables import Rollouts
from stages.update import MismatchError

VLLM: dict[str, Any] = {"rollout.backend": {"kind": "vllm", "dtype": "bfloat16"}}
OUTPUTS = Rollouts("ab" * 32)


def of(**settings: Any) -> Mismatches:
    return Mismatches(RECIPES["arithmetic_smoke"]().override(VLLM | settings))


def policy(divergence: float | None) -> Checkpoint:
    """What a check reads of an updated policy."""
    metrics = {} if divergence is None else {"rollout/mismatch_kl": divergence}
    return cast(Checkpoint, SimpleNamespace(metrics=metrics))


def test_the_first_update_that_measured_decides_the_later_limits() -> None:
    run, limits = of(), []
    for divergence in (None, 4e-4, 2e-3, 3.9e-3):
        limits.append(run.update.mismatch.max_kl)
        run.check(policy(divergence))
    assert limits == pytest.approx([0.05, 0.05, 0.004, 0.004])
    with pytest.raises(MismatchError):
        run.check(policy(4.1e-3))


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, 0.05),
        ({"rollout.backend.dtype": "float32"}, 1e-3),  # the recipe trains in fp32
        ({"rollout.backend.dtype": "float32", "update.training.precision": "bf16"}, 0.05),
        ({"rollout.backend": {"kind": "hf"}}, None),
        ({"update.old_logprobs": "rollout"}, None),
        ({"overlap": 1, "update.correction": {"kind": "truncated"}}, None),
        ({"update.mismatch.max_kl": 0.3}, 0.3),
        ({"update.mismatch.max_kl": None}, None),
    ],
)
def test_what_auto_is_follows_from_the_engine_and_the_precisions(settings: dict[str, Any], limit: float | None) -> None:
    run = of(**settings)
    assert run.update.mismatch.max_kl == limit


@pytest.mark.parametrize(("native", "limit"), [(True, 0.05), (False, 1e-3)])
def test_a_precision_of_auto_counts_as_what_it_is_on_the_machine(
    monkeypatch: pytest.MonkeyPatch, native: bool, limit: float
) -> None:
    monkeypatch.setattr("stages.training.hardware.native_bf16", lambda: native)
    auto = {"rollout.backend.dtype": "auto", "update.training.precision": "auto"}
    assert of(**auto).update.mismatch.max_kl == limit


def test_other_limits_stay_where_auto_is_resolved() -> None:
    assert of(**{"update.mismatch.min_ess": 0.5}).update.mismatch.given == {"max_kl": 0.05, "min_ess": 0.5}


def test_an_error_names_the_step_and_how_to_sample_its_outputs_again() -> None:
    run = of()
    with (
        pytest.raises(MismatchError, match=r"^step 7: .*max_kl=0\.05.*cohort forget abababababab`"),
        naming(7, OUTPUTS),
    ):
        run.check(policy(0.06))
    with pytest.raises(ValueError, match=r"^another$"), naming(7, OUTPUTS):
        raise ValueError("another")
