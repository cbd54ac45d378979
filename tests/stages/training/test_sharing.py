"""Prompts forwarded once for several outputs: values, gradients and layouts are those of separate sequences."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.training.batching import Batch, Row, collate, micro_batches
from stages.training.engine import checkpoint_activations
from stages.training.forward import completion_logprobs
from stages.training.scores import places_in, scores_at
from stages.training.sharing import ARCHITECTURES, longest_shared, share_prompts
from tests.stages.training.tiny import VOCABULARY, tiny_model

PROMPTS = ([3, 4, 5, 6, 7], [8, 9], [10, 11, 12])
LENGTHS = ((0, 4), (1, 2), (0, 1), (2, 3), (1, 6), (0, 4), (1, 1))
"""Which prompt and how many output tokens each row has; the third prompt has one row."""
EXACT = ("gpt_neox", "phi", "starcoder2")
"""Their norms do not round to float32."""
SPECIAL = {
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "attn_logit_softcapping": 2.0, "sliding_window": 64},
    "gemma3_text": {"head_dim": 16, "sliding_window": 64},
    "phi3": {"pad_token_id": 0},
    "smollm3": {"pad_token_id": 0},
}


def rows() -> list[Row]:
    """Seven outputs of three questions, no two equal."""
    generator = torch.Generator().manual_seed(5)
    return [
        Row(PROMPTS[prompt], torch.randint(1, VOCABULARY, (length,), generator=generator).tolist())
        for prompt, length in LENGTHS
    ]


@functools.cache
def _made(architecture: str, attention: str) -> Any:
    model = tiny_model(architecture, **{"num_key_value_heads": 1, **SPECIAL.get(architecture, {})}).double()
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # far from flat, so that who attends to whom is seen
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def shared_model(architecture: str = "starcoder2", attention: str = "sdpa") -> Any:
    """A model in float64 that shares prompts, the caller's own."""
    model = copy.deepcopy(_made(architecture, attention))
    share_prompts(model)
    return model


def found(model: Any, batches: list[Batch], **settings: Any) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """Log-probabilities by row, and the gradient of a sum that weighs every token differently."""
    model.zero_grad()
    values: dict[int, Tensor] = {}
    for batch in batches:
        logp_BO = completion_logprobs(model, batch, 0.7, **settings).logp_BO
        places = torch.arange(1.0, 1 + logp_BO.shape[1], dtype=torch.float64)
        weight_B1 = 1.0 + torch.tensor(batch.rows, dtype=torch.float64)[:, None]
        torch.autograd.backward((weight_B1 * places * logp_BO).sum())
        values |= {row: logp_BO[place].detach() for place, row in enumerate(batch.rows)}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return values, gradients


def separate(model: Any) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """The same of every row by itself, without padding."""
    return found(model, [collate(rows(), [index]) for index in range(len(LENGTHS))])


def assert_equal(model: Any, batches: list[Batch], exact: float, **settings: Any) -> None:
    values, gradients = found(copy.deepcopy(model), batches, **settings)
    expected, expected_gradients = separate(model)
    assert values.keys() == expected.keys()
    for row, logp_O in expected.items():
        torch.testing.assert_close(values[row][: len(logp_O)], logp_O, rtol=0, atol=exact)
        assert values[row][len(logp_O) :].eq(0).all()
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=exact * float(gradient.abs().max()))


@pytest.mark.claim("packed rows that see each other")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_values_and_gradients_are_those_of_separate_sequences(architecture: str, attention: str) -> None:
    model = shared_model(architecture, attention)
    batches = list(micro_batches(rows(), 40, model=model))
    assert len(batches) == 2
    assert all(batch.sharing is not None for batch in batches)
    float64 = architecture in EXACT and attention == "sdpa"  # eager attention has its softmax in float32
    assert_equal(model, batches, 1e-12 if float64 else 3e-6)


def test_logits_in_chunks_and_recomputed_layers_change_nothing() -> None:
    model = shared_model()
    checkpoint_activations(model)
    assert_equal(model, list(micro_batches(rows(), 40, model=model)), 1e-12, max_logits=3 * VOCABULARY)


def test_rows_of_equal_lengths_need_no_padding_and_compute_the_same() -> None:
    even = [Row(prompt, [token] * 3) for prompt in ([1, 2], [3, 4]) for token in (5, 6)]
    model = shared_model()
    (batch,) = micro_batches(even, 100, model=model)
    assert batch.sharing is not None
    assert not batch.sharing.padded
    scored = completion_logprobs(model, batch).logp_BO
    for place, row in enumerate(batch.rows):
        alone = completion_logprobs(model, collate(even, [row])).logp_BO[0]
        torch.testing.assert_close(scored[place], alone, rtol=0, atol=1e-12)


def test_a_shared_row_by_hand() -> None:
    batch = collate([Row([7, 8], [1, 2]), Row([9], [3]), Row([7, 8], [4])], [2, 0, 1], shared=True)
    # Both prompts, in the order they come in, then the outputs.
    assert batch.input_ids_BT.tolist() == [[7, 8, 9, 4, 1, 2, 3]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 0, 2, 2, 3, 1]]
    assert (batch.starts, batch.rows, batch.tokens) == ((3, 4, 6), (2, 0, 1), 7)
    # 4 and 1 follow 8, which is at 1; 2 follows 1, at 4; 3 follows 9, at 2.
    assert batch.source_index_N.tolist() == [1, 1, 4, 2]
    assert batch.targets_N.tolist() == [4, 1, 2, 3]
    assert batch.output_mask_BO.tolist() == [[True, False], [True, True], [True, False]]
    assert batch.sharing is not None
    assert batch.sharing.prompt_B.tolist() == [0, 0, 1]
    assert batch.sharing.padding_S.tolist() == [False] * 3 + [True, False, True] + [False] * 3 + [True]
    assert batch.sharing.mask("prompts", "sdpa", torch.float32)[0, 0].tolist() == [[True, False], [True, True]]
    seen = batch.sharing.mask("outputs", "sdpa", torch.float32)
    assert seen[2, 0].tolist() == [[True, False, True, False], [True, False, True, True]]


def test_a_batch_keeps_no_mask_of_its_passes() -> None:
    model = shared_model(attention="eager")
    batch = collate(rows(), [0, 2, 5], shared=True)
    completion_logprobs(model, batch)
    assert batch.sharing is not None
    assert not batch.sharing.masks
    inputs = batch.inputs
    model(**inputs)
    assert {part: tuple(mask.shape) for part, mask in inputs["sharing"].masks.items()} == {
        "prompts": (1, 1, 5, 5),
        "outputs": (3, 1, 4, 9),
    }


def test_a_prompt_counts_once_against_the_budget_and_its_rows_follow_one_another() -> None:
    model = shared_model()
    # The rows of prompt 0 take 5 + 3 * 4 tokens, and a quarter of 3 * 9 keys: 23.75; another prompt does not fit.
    # Two of prompt 1 take 2 + 2 * 6 + 2 * 8 / 4 = 18, the third would make it 26.
    batches = list(micro_batches(rows(), 24, model=model))
    assert [batch.rows for batch in batches] == [(0, 5, 2), (4, 1), (6, 3)]
    assert [batch.tokens for batch in batches] == [5 + 9, 2 + 8, 5 + 4]
    plain = list(micro_batches(rows(), 17))
    assert [batch.sharing for batch in plain] == [None] * len(plain)
    assert sum(batch.tokens for batch in plain) == sum(len(PROMPTS[prompt]) + length for prompt, length in LENGTHS)


def test_units_stay_whole_where_prompts_are_shared() -> None:
    pairs = [Row(PROMPTS[prompt], [1 + place, 2]) for prompt in (0, 1) for place in range(4)]
    units = [(0, 1), (4, 5), (2, 3), (6, 7)]
    batches = list(micro_batches(pairs, 9, model=shared_model(), units=units))
    assert [batch.rows for batch in batches] == [
        (0, 1),
        (2, 3),
        (4, 5),
        (6, 7),
    ]  # 5 + 2 * 2 + 2 * 7 / 4, which is above it, and 8
    assert [batch.rows for batch in micro_batches(pairs, 20, model=shared_model(), units=units)] == [
        (0, 1, 2, 3),
        (4, 5, 6, 7),
    ]


def test_prompts_are_not_shared_where_none_repeats_or_no_model_can() -> None:
    single = [Row(prompt, [1]) for prompt in PROMPTS]
    assert [batch.sharing for batch in micro_batches(single, 100, model=shared_model())] == [None]
    plain = copy.deepcopy(_made("starcoder2", "sdpa"))
    assert longest_shared(plain) == 0
    assert [batch.sharing for batch in micro_batches(rows(), 100, model=plain)] == [None]


def test_a_row_beyond_the_sliding_window_keeps_the_prompts_apart() -> None:
    model = tiny_model("gemma2", head_dim=16, sliding_window=8)
    share_prompts(model)
    assert longest_shared(model) == 8
    within, beyond = ([Row([1, 2], [3] * length), Row([1, 2], [4])] for length in (6, 7))
    assert [batch.sharing is None for batch in micro_batches(within, 100, model=model)] == [False]
    assert [batch.sharing for batch in micro_batches(beyond, 100, model=model)] == [None]


def test_code_of_its_own_and_flash_attention_share_nothing() -> None:
    class Own(type(tiny_model())):  # type: ignore[misc]
        """Says that it is a qwen2."""

    own = Own(tiny_model().config)
    share_prompts(own)
    assert longest_shared(own) == 0
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    share_prompts(model)
    assert longest_shared(model) == 0


def test_attention_that_does_not_read_the_layout_is_an_error() -> None:
    model = shared_model(attention="eager")
    batch = next(micro_batches(rows(), 100, model=model))
    model.config._attn_implementation = "eager"
    with pytest.raises(RuntimeError, match="share_prompts"):
        completion_logprobs(model, batch)


@pytest.mark.parametrize("head", ["TokenClassification", "SequenceClassification"])
def test_classifiers_read_scores_at_the_same_tokens(head: str) -> None:
    import transformers

    description = tiny_model("qwen2", num_labels=1, pad_token_id=0).config
    model = getattr(transformers, f"Qwen2For{head}")(description).eval().double()
    share_prompts(model)
    last = [len(row.output_ids) - 1 for row in rows()]

    def read(batch: Batch) -> dict[int, float]:
        positions_N = places_in(batch, [[last[row]] for row in batch.rows])
        return dict(zip(batch.rows, scores_at(model, batch, positions_N).tolist(), strict=True))

    (shared,) = micro_batches(rows(), 1000, model=model)
    assert shared.sharing is not None
    expected = {row: score for index in range(7) for row, score in read(collate(rows(), [index])).items()}
    assert read(shared) == pytest.approx(expected, abs=3e-6)
    assert len(set(expected.values())) == 7


def test_a_batch_on_another_device_takes_its_layout_along() -> None:
    moved = collate(rows(), [0, 2, 5], shared=True).to("meta")
    assert moved.sharing is not None
    assert {moved.sharing.place_T.device.type, moved.sharing.given_BP.device.type} == {"meta"}
    assert moved.starts == collate(rows(), [0, 2, 5], shared=True).starts
