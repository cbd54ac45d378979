"""The output head: log-probabilities straight from hidden states, a chunk of positions at a time, and logits in float32.

Half precision rounds logits of 16 to 32 to steps of 0.125. Float32 logits are the sums of the same products before that
rounding; operands stay in half precision, since the hidden states of a model that computes in it are no more exact.

All logits together never exist, neither in the forward nor in the backward pass, which computes them again: at a vocabulary
of 151,936 the logits of 2,048 positions are 1.2 GB in float32, and a naive loss holds several copies of them. Values and
gradients are those of the full computation but for the order of sums. Shapes: N scored positions, n those of a chunk, H hidden
size, V vocabulary. Values are in nats.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.kernels.logprobs import entropy_given, precision


class Float32Head(nn.Linear):
    """A linear output head whose logits are float32 also where it computes in half precision, else `nn.Linear`."""

    @classmethod
    def of(cls, head: nn.Linear) -> Self:
        """The head with the parameters of another."""
        made = cls(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        made.weight, made.bias = head.weight, head.bias
        return made

    def forward(self, input: Tensor) -> Tensor:
        return float32_linear(input, self.weight, self.bias)


def float32_linear(hidden: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """hidden weight' + bias: of operands in the precision of autocast or the weight, added up and left in float32.

    In float32 and float64 that is `F.linear`. Backward has the products of a linear layer in the operands' precision.
    """
    dtype = _product_dtype(weight_VH)
    if dtype.itemsize > 2:
        return F.linear(hidden, weight_VH, bias_V)
    z_NV: Tensor = _Float32Linear.apply(hidden.flatten(0, -2), weight_VH, bias_V, dtype)  # type: ignore[no-untyped-call]
    return z_NV.view(*hidden.shape[:-1], len(weight_VH))


class LogitTransform(NamedTuple):
    """What a model does to the output z of its head: x = cap tanh(scale z / cap), or scale z without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, z_nV: Tensor) -> Tensor:
        """x, in place of z."""
        if self.scale != 1.0:
            z_nV.mul_(self.scale)
        return z_nV if self.cap is None else z_nV.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, x_nV: Tensor) -> float | Tensor:
        """dx / dz, given x."""
        if self.cap is None:
            return self.scale
        return (x_nV / self.cap).square_().neg_().add_(1.0).mul_(self.scale)


class HeadScores(NamedTuple):
    """Per scored position."""

    logp_N: Tensor
    """log pi(token)."""
    entropy_N: Tensor | None
    """Entropy of the distribution, without gradient; None unless asked for."""


def head_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    tokens_N: Tensor,
    *,
    temperature: float = 1.0,
    transform: LogitTransform = LogitTransform(),  # noqa: B008 - immutable
    max_logits: int,
    with_entropy: bool = False,
    float32: bool = False,
) -> HeadScores:
    """`token_logprobs` and `entropies` of transform(hidden weight' + bias), at most `max_logits` of them at a time.

    The product is in the precision of autocast where that is on, as the head's own would be; everything after it in float32
    (float64 for float64). Backward takes one more product of the head's size than the full computation.

    Args:
        float32: the product is that of `float32_linear`.
    """
    dtype = _product_dtype(weight_VH)
    how = _How(temperature, transform, max_logits, with_entropy, dtype, float32 and dtype.itemsize == 2)
    logp_N, entropy_N = _HeadLogprobs.apply(hidden_NH, weight_VH, bias_V, tokens_N, how)  # type: ignore[no-untyped-call]
    return HeadScores(logp_N, entropy_N)


class _How(NamedTuple):
    temperature: float
    transform: LogitTransform
    max_logits: int
    with_entropy: bool
    dtype: torch.dtype
    """Of the operands of the head's product."""
    float32: bool
    """Whether the product of operands in half precision is left in float32."""


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, tokens_N: Tensor, how: _How
    ) -> tuple[Tensor, Tensor | None]:
        logp_N = hidden_NH.new_empty(len(tokens_N), dtype=torch.promote_types(how.dtype, torch.float32))
        log_total_N = torch.empty_like(logp_N)
        entropy_N = torch.empty_like(logp_N) if how.with_entropy else None
        for rows, x_nV in _logits(hidden_NH, weight_VH.to(how.dtype), bias_V, how):
            x_nV.div_(how.temperature)
            log_total_N[rows] = x_nV.logsumexp(-1)
            logp_N[rows] = x_nV.gather(-1, tokens_N[rows].unsqueeze(-1)).squeeze(-1) - log_total_N[rows]
            if entropy_N is not None:
                entropy_N[rows] = entropy_given(x_nV, log_total_N[rows])
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, tokens_N, log_total_N)
        ctx.how = how
        if entropy_N is not None:
            ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """d logp / dz = (one-hot(token) - softmax(x / T)) / T dx/dz; products as a linear layer's backward has them."""
        hidden_NH, weight_VH, bias_V, tokens_N, log_total_N = ctx.saved_tensors
        how: _How = ctx.how
        cast_VH = weight_VH.to(how.dtype)
        sums = _Sums.of(ctx.needs_input_grad, hidden_NH, weight_VH, bias_V)
        weight_N = gradients[0] / how.temperature
        for rows, x_nV in _logits(hidden_NH, cast_VH, bias_V, how):
            slope = how.transform.slope(x_nV)
            weight_n1 = weight_N[rows].unsqueeze(-1)
            softmax_nV = x_nV.div_(how.temperature).sub_(log_total_N[rows].unsqueeze(-1)).exp_()
            gradient_nV = softmax_nV.mul_(-weight_n1).scatter_add_(-1, tokens_N[rows].unsqueeze(-1), weight_n1)
            sums.add(rows, gradient_nV.mul_(slope), hidden_NH, cast_VH)
        return sums.hidden_NH, sums.weight_VH, sums.bias_V, None, None


class _Sums(NamedTuple):
    """Gradients of the head's inputs as chunks come in; None where it is not asked for.

    One buffer for the weight: autograd over chunks would make a further [V, H] for each of them.
    """

    hidden_NH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None

    @classmethod
    def of(cls, needed: tuple[bool, ...], *inputs: Tensor | None) -> Self:
        """Zero."""
        wanted = zip(inputs, needed, strict=False)
        return cls(*(torch.zeros_like(given) if given is not None and asked else None for given, asked in wanted))

    def add(self, rows: slice, gradient_nV: Tensor, hidden_NH: Tensor, cast_VH: Tensor) -> None:
        """Take in the gradient of a chunk of logits, given the head's inputs."""
        if self.bias_V is not None:
            self.bias_V.add_(gradient_nV.sum(0))
        gradient_nV = gradient_nV.to(cast_VH.dtype)
        with _uncast(gradient_nV):
            if self.hidden_NH is not None:
                self.hidden_NH[rows] = gradient_nV.mm(cast_VH).to(self.hidden_NH.dtype)
            if self.weight_VH is not None:
                _add_product(self.weight_VH, gradient_nV, hidden_NH[rows].to(cast_VH.dtype))


def _add_product(sum_VH: Tensor, gradient_nV: Tensor, hidden_nH: Tensor) -> None:
    """sum += gradient' hidden, added up in the precision of the sum."""
    if sum_VH.dtype == gradient_nV.dtype:
        sum_VH.addmm_(gradient_nV.t(), hidden_nH)
    else:
        sum_VH.add_(gradient_nV.t().mm(hidden_nH))


def _logits(hidden_NH: Tensor, cast_VH: Tensor, bias_V: Tensor | None, how: _How) -> Iterator[tuple[slice, Tensor]]:
    """Chunk by chunk (rows, x): the model's logits in float32 or better, the caller's to overwrite."""
    cast_V = None if bias_V is None or how.float32 else bias_V.to(how.dtype)
    size = max(1, how.max_logits // len(cast_VH))
    for start in range(0, len(hidden_NH), size):
        rows = slice(start, start + size)
        cast_nH = hidden_NH[rows].to(how.dtype)
        with _uncast(hidden_NH):
            z_nV = _float32_product(cast_nH, cast_VH, bias_V) if how.float32 else F.linear(cast_nH, cast_VH, cast_V)
        yield rows, how.transform.apply_(z_nV.to(precision(z_nV)))


class _Float32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, dtype: torch.dtype) -> Tensor:
        cast_VH = weight_VH.to(dtype)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, cast_VH)
        with _uncast(hidden_NH):
            return _float32_product(hidden_NH.to(dtype), cast_VH, bias_V)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, cast_VH = ctx.saved_tensors
        sums = _Sums.of(ctx.needs_input_grad, *inputs)
        sums.add(slice(None), gradients[0], inputs[0], cast_VH)
        return sums.hidden_NH, sums.weight_VH, sums.bias_V, None


def _float32_product(hidden_nH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """hidden weight' + bias in float32, of operands in half precision.

    torch has such a product on CUDA. Elsewhere a second one, added up in float32 before it is rounded like the first, gives
    what the first was rounded by. Their sum is z to 2^-18 |z| and float32's own rounding: bfloat16 rounds a number by 2^-9 of
    it at most, and of that again 2^-9.
    """
    if hidden_nH.is_cuda:
        z_nV = torch.mm(hidden_nH, weight_VH.t(), out_dtype=torch.float32)
    else:
        rounded_nV = hidden_nH.mm(weight_VH.t())
        z_nV = rounded_nV.float()
        z_nV += rounded_nV.addmm_(hidden_nH, weight_VH.t(), beta=-1)
    return z_nV if bias_V is None else z_nV.add_(bias_V)


def _product_dtype(weight: Tensor) -> torch.dtype:
    """What a linear layer with this weight computes in here and now."""
    kind = weight.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def _uncast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """No casts but our own, also where backward is called under autocast."""
    return torch.autocast(tensor.device.type, enabled=False)
