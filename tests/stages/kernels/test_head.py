"""Log-probabilities straight from hidden states are those of all logits, in value and gradient, without them all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.kernels.head import Float32Head, HeadScores, LogitTransform, float32_linear, head_logprobs
from stages.kernels.logprobs import entropies, token_logprobs

N, V, H = 13, 11, 5
TRANSFORMS = (LogitTransform(), LogitTransform(scale=0.25), LogitTransform(cap=3.0), LogitTransform(scale=2.0, cap=3.0))


Given = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]


def given(dtype: torch.dtype, *, bias: bool, seed: int = 0) -> Given:
    """Hidden states, head and bias that require gradients; tokens; what weighs their log-probabilities."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    tokens_N = torch.randint(V, (N,), generator=generator)
    hidden_NH, weight_VH = normal(N, H), normal(V, H)
    return hidden_NH, weight_VH, normal(V) if bias else None, tokens_N, normal(N).detach()


def by_definition(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, temperature: float, transform: LogitTransform
) -> Tensor:
    """log softmax of all logits, by autograd throughout."""
    x_NV = transform.scale * F.linear(hidden_NH, weight_VH, bias_V)
    if transform.cap is not None:
        x_NV = transform.cap * torch.tanh(x_NV / transform.cap)
    return torch.log_softmax(x_NV / temperature, -1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("rows", "temperature"), [(1, 0.7), (3, 1.0), (3, 0.7), (13, 0.7), (1000, 1.0)])
def test_values_entropy_and_gradients_are_those_of_all_logits(
    rows: int, temperature: float, transform: LogitTransform, bias: bool
) -> None:
    ours, theirs = given(torch.float64, bias=bias), given(torch.float64, bias=bias)
    scores = head_logprobs(
        *ours[:4], temperature=temperature, transform=transform, max_logits=rows * V, with_entropy=True
    )
    table_NV = by_definition(*theirs[:3], temperature, transform)
    expected_N = table_NV[range(N), ours[3]]
    assert not scores.entropy_N.requires_grad
    assert_equal(scores, expected_N, -(table_NV.exp() * table_NV).sum(-1), ours, theirs, exact=1e-12)
    # In float32 they differ by rounding.
    ours, theirs = given(torch.float32, bias=bias), given(torch.float32, bias=bias)
    scores = head_logprobs(*ours[:4], temperature=temperature, max_logits=rows * V, with_entropy=True)
    logits_NV = F.linear(*theirs[:3])
    expected_N = token_logprobs(logits_NV, ours[3], temperature=temperature)
    assert_equal(scores, expected_N, entropies(logits_NV, temperature=temperature), ours, theirs, exact=1e-6)


def test_one_chunk_has_the_bits_of_the_full_computation() -> None:
    """A policy whose head is spread over ranks scores by chunks, its reference in full: equal weights must give KL 0."""
    hidden_NH, weight_VH, bias_V, tokens_N, _ = given(torch.float32, bias=True)
    scores = head_logprobs(hidden_NH, weight_VH, bias_V, tokens_N, temperature=0.7, max_logits=N * V)
    expected_N = token_logprobs(F.linear(hidden_NH, weight_VH, bias_V), tokens_N, temperature=0.7)
    assert scores.logp_N.equal(expected_N)


def assert_equal(
    scores: HeadScores, logp_N: Tensor, entropy_N: Tensor, ours: Given, theirs: Given, *, exact: float
) -> None:
    """Both and the gradients of what they are made of, in units of the expected ones' length."""
    (scores.logp_N * ours[4]).sum().backward()
    (logp_N * theirs[4]).sum().backward()
    pairs = [(scores.logp_N, logp_N), (scores.entropy_N, entropy_N)]
    pairs += [(m.grad, o.grad) for m, o in zip(ours[:3], theirs[:3], strict=True) if m is not None and o is not None]
    for found, expected in pairs:
        assert found.dtype == expected.dtype
        assert (found - expected).norm() <= exact * expected.norm()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        found = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *found])
        return result


@pytest.mark.parametrize("float32", [False, True])
def test_neither_forward_nor_backward_ever_has_more_logits_than_allowed(float32: bool) -> None:
    positions, vocabulary, hidden, allowed = 200, 40, 2, 410
    hidden_NH = torch.randn(positions, hidden, requires_grad=True)
    weight_VH = torch.randn(vocabulary, hidden, requires_grad=True)
    tokens_N = torch.zeros(positions, dtype=torch.long)
    with Largest() as mode, torch.autocast("cpu", dtype=torch.bfloat16, enabled=float32):
        scores = head_logprobs(
            hidden_NH, weight_VH, None, tokens_N, max_logits=allowed, with_entropy=True, float32=float32
        )
        scores.logp_N.sum().backward()
    # Ten positions fit; hidden states and weight are 400 and 80.
    assert mode.elements == 400
    with Largest() as mode:
        token_logprobs(F.linear(hidden_NH, weight_VH), tokens_N).sum().backward()
    assert mode.elements == positions * vocabulary  # the measure sees what it is to see


def test_gradients_that_are_not_asked_for_are_not_computed() -> None:
    hidden_NH, weight_VH, bias_V, tokens_N, _ = given(torch.float32, bias=True)
    weight_VH.requires_grad_(False)
    bias_V.requires_grad_(False)
    head_logprobs(hidden_NH, weight_VH, bias_V, tokens_N, max_logits=V).logp_N.sum().backward()
    assert hidden_NH.grad is not None
    assert weight_VH.grad is bias_V.grad is None


def test_under_autocast_the_product_is_in_bfloat16_and_all_else_in_float32() -> None:
    hidden_NH, weight_VH, bias_V, tokens_N, weight_N = given(torch.float32, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = head_logprobs(hidden_NH, weight_VH, bias_V, tokens_N, max_logits=3 * V)
        expected_N = token_logprobs(F.linear(hidden_NH, weight_VH, bias_V), tokens_N)
        (scores.logp_N * weight_N).sum().backward()
    assert scores.logp_N.dtype == torch.float32
    torch.testing.assert_close(scores.logp_N, expected_N, rtol=0, atol=2**-6)  # a rounding of a logit below 8
    assert {tensor.grad.dtype for tensor in (hidden_NH, weight_VH, bias_V)} == {torch.float32}


def test_a_token_that_a_mask_made_impossible_has_no_part_in_the_entropy() -> None:
    weight_VH, bias_V = torch.zeros(3, 1), torch.tensor([0.0, 0.0, -math.inf])
    scores = head_logprobs(torch.ones(1, 1), weight_VH, bias_V, torch.tensor([0]), max_logits=3, with_entropy=True)
    assert [scores.logp_N.item(), scores.entropy_N.item()] == pytest.approx([-math.log(2), math.log(2)])


def large(*, rows: int = 33, hidden: int = 96, vocabulary: int = 40) -> Given:
    """As `given`, of values that bfloat16 has, with logits of 16 to 64 among them."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(*shape, generator=generator)).bfloat16().float().requires_grad_()

    tokens_N = torch.randint(vocabulary, (rows,), generator=generator)
    return normal(rows, hidden, size=4.0), normal(vocabulary, hidden), normal(vocabulary), tokens_N, normal(rows)


def half() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def in_float64(given: Given) -> Given:
    hidden_NH, weight_VH, bias_V, tokens_N, weight_N = given
    doubles = [
        tensor.detach().double().requires_grad_() for tensor in (hidden_NH, weight_VH, bias_V) if tensor is not None
    ]
    return doubles[0], doubles[1], doubles[2], tokens_N, weight_N.double()


@pytest.mark.parametrize("rows", [1, 33])
def test_float32_logits_are_not_rounded_to_half_precision(rows: int) -> None:
    """Also of weights that are in half precision themselves; a second rounding of 2^-9 is left of the first, and float32's."""
    hidden_NH, weight_VH, bias_V, *_ = large(rows=rows)
    z_NV = F.linear(*(tensor.detach().double() for tensor in (hidden_NH, weight_VH, bias_V)))
    assert 16 < z_NV.abs().max() < 256
    with half():
        found_NV = float32_linear(hidden_NH, weight_VH, bias_V)
        rounded_NV = F.linear(hidden_NH, weight_VH, bias_V)
    allowed_NV = 2.0**-18 * z_NV.abs() + 96 * 2.0**-24 * F.linear(hidden_NH.abs(), weight_VH.abs(), bias_V.abs())
    assert found_NV.dtype == torch.float32
    assert ((found_NV - z_NV).abs() <= allowed_NV).all()
    assert (rounded_NV - z_NV).abs().max() > 2.0**-5  # what it is for
    with torch.inference_mode():
        stored_NV = float32_linear(hidden_NH.bfloat16(), weight_VH.bfloat16(), bias_V)
        head = Float32Head.of(torch.nn.Linear(96, 40))
        head.weight, head.bias = torch.nn.Parameter(weight_VH.bfloat16()), torch.nn.Parameter(bias_V.detach())
        assert head(hidden_NH.bfloat16()[None, None])[0, 0].equal(stored_NV)
    assert stored_NV.equal(found_NV)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("max_logits", [1, 200, 100_000])
def test_scores_of_float32_logits_are_exact_and_so_their_gradient(max_logits: int, transform: LogitTransform) -> None:
    """By the definition in float64: values but for float32, gradients but for the products of half precision in backward."""
    ours, theirs = large(), in_float64(large())
    with half():
        scores = head_logprobs(
            *ours[:4], temperature=0.7, transform=transform, max_logits=max_logits, with_entropy=True, float32=True
        )
        rounded = head_logprobs(*ours[:4], temperature=0.7, transform=transform, max_logits=max_logits)
    table_NV = by_definition(*theirs[:3], 0.7, transform)
    expected_N = table_NV[range(33), ours[3]]
    assert (scores.logp_N - expected_N).abs().max() < 1e-3
    assert (rounded.logp_N - expected_N).abs().max() > (1e-2 if transform.cap is None else 1e-3)
    torch.testing.assert_close(scores.entropy_N.double(), -(table_NV.exp() * table_NV).sum(-1), rtol=0, atol=1e-3)
    (scores.logp_N * ours[4]).sum().backward()
    (expected_N * theirs[4]).sum().backward()
    for mine, other, exact in zip(ours[:3], theirs[:3], (2.0**-7, 2.0**-7, 1e-3), strict=True):
        assert mine.grad.dtype == torch.float32
        assert (mine.grad - other.grad).norm() <= exact * other.grad.norm()


def test_float32_logits_in_full_and_in_one_chunk_have_equal_bits() -> None:
    ours, theirs = large(), large()
    with half():
        logits_NV = float32_linear(*theirs[:3])
        expected_N = token_logprobs(logits_NV, theirs[3], temperature=0.7)
        scores = head_logprobs(*ours[:4], temperature=0.7, max_logits=10_000, float32=True)
    assert scores.logp_N.equal(expected_N)
    (scores.logp_N * ours[4]).sum().backward()
    (expected_N * theirs[4]).sum().backward()
    for mine, other in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-2, atol=1e-3)


def test_without_half_precision_a_float32_head_is_a_linear_layer() -> None:
    for dtype in (torch.float32, torch.float64):
        hidden_NH, weight_VH, bias_V, *_ = given(dtype, bias=True)
        assert float32_linear(hidden_NH, weight_VH, bias_V).equal(F.linear(hidden_NH, weight_VH, bias_V))
    assert torch.autograd.gradcheck(float32_linear, given(torch.float64, bias=True)[:3])
