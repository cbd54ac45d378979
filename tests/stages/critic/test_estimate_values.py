"""Values belong to the state before a token, and to their row whatever else is in the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeline.store import Store
from stages.critic import estimate_values
from stages.models import Checkpoint
from stages.tables import Rollouts
from tests.stages.critic.worlds import exact, exploration, outspoken_critic, tables
from tests.stages.rows import rollout_row
from tests.stages.training.tiny import changed


def values_of(critic: Checkpoint, rows: list[dict[str, Any]], **changes: Any) -> list[list[float]]:
    return [row["value"] for row in estimate_values(critic, Rollouts.write(rows), exact(**changes)).rows()]


@pytest.mark.claim("off by one")
def test_a_value_does_not_know_its_token_nor_what_follows(store: Store) -> None:
    critic = outspoken_critic()
    one, other = (values_of(critic, [rollout_row("q", 0, ids)])[0] for ids in ([7, 8, 9, 10], [7, 8, 20, 21]))
    # The third token differs: the value before it and all earlier ones are the same, the value after it is not.
    assert one[:3] == pytest.approx(other[:3], abs=1e-6)
    assert abs(one[3] - other[3]) > 1e-3


@pytest.mark.claim("a score read at the wrong last token")
def test_the_first_value_is_that_of_the_question_alone(store: Store) -> None:
    critic = outspoken_critic()
    ((first, *_), (single,)) = values_of(critic, [rollout_row("q", 0, [7, 8, 9]), rollout_row("q", 1, [20])])
    assert first == pytest.approx(single, abs=1e-6)


def test_rows_keep_their_key_order_and_length(store: Store) -> None:
    outputs, _ = tables()
    found = estimate_values(outspoken_critic(), outputs, exact()).rows()
    shapes = [(row["question_id"], row["sample"], len(row["output_ids"])) for row in outputs.rows()]
    assert [(row["question_id"], row["sample"], len(row["value"])) for row in found] == shapes


def test_a_row_has_the_same_values_in_any_micro_batch(store: Store) -> None:
    critic = outspoken_critic()
    rows, _ = exploration()
    whole = values_of(critic, rows, micro_batch_tokens=10_000)
    for tokens in (1, 20):
        for found, expected in zip(values_of(critic, rows, micro_batch_tokens=tokens), whole, strict=True):
            assert found == pytest.approx(expected, abs=1e-6)


def test_in_bfloat16_the_head_still_computes_in_float32(store: Store) -> None:
    critic = outspoken_critic()
    rows, _ = exploration()
    training = exact().training.override({"precision": "bf16"})
    (first, *_) = values_of(critic, rows, training=training)
    # A bfloat16 has 8 significant bits, zeros below them.
    assert any(torch.tensor(value).bfloat16().item() != value for value in first)


def test_a_value_that_is_not_finite_is_refused_by_its_row(store: Store) -> None:
    # The embedding of one token, which comes before the last token of the second row only.
    critic = changed(outspoken_critic(), lambda weights: weights["model.embed_tokens.weight"][25].fill_(math.nan))
    rows = [rollout_row("a", 0, [7, 8]), rollout_row("a", 1, [25, 8])]
    with pytest.raises(ValueError, match=r"\('a', 1\)"):
        estimate_values(critic, Rollouts.write(rows), exact())
