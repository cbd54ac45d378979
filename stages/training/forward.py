"""Log-probabilities of the output tokens of a micro-batch under a model, and the model's output head.

The head is applied to chosen positions only, or replaced by log-probabilities in chunks. What a model does to its head's output
(soft-capping, scaling) is measured, not read off its config: a ramp takes the place of the logits, and what comes out of the
model is compared with the ramp. Shapes: B rows, T padded tokens, O longest output, N output tokens of the batch, H hidden size,
V vocabulary.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.config import ConfigError
from stages.kernels.head import Float32Head, HeadScores, LogitTransform, head_logprobs
from stages.kernels.logprobs import entropies, token_logprobs
from stages.tables import Rollouts
from stages.training.batching import Batch, spread
from stages.training.sharing import Sharing

_HIGHEST = 64.0
"""Where the ramp ends: a power of two, so that a factor is read off its last value without rounding."""

_measured: weakref.WeakKeyDictionary[nn.Module, LogitTransform | None] = weakref.WeakKeyDictionary()


class CompletionLogprobs(NamedTuple):
    """Hold a value per output token; column o of row b is output token o of row `batch.rows[b]`."""

    logp_BO: Tensor
    """log pi(o_t | q, o_<t) in nats, 0 on padding; float32, or float64 where the logits are."""
    entropy_BO: Tensor | None
    """Entropy of the distribution that o_t was drawn from, in nats, without gradient; None unless asked for."""
    mask_BO: Tensor
    """True on output tokens."""


def completion_logprobs(
    model: nn.Module,
    batch: Batch,
    temperature: float = 1.0,
    *,
    with_entropy: bool = False,
    max_logits: int | None = None,
) -> CompletionLogprobs:
    """Compute log pi of every output token of the batch, at the temperature it was sampled at.

    The output head sees only the N positions whose next token is scored: neither prompts nor padding cost logits.

    Args:
        max_logits: above so many logits (N V) they are computed in chunks, forward and backward; None: never.
    """
    mask_BO = batch.output_mask_BO
    scores = _in_chunks(model, batch, temperature, with_entropy, max_logits)
    if scores is None:
        scores = _in_full(model, batch, temperature, with_entropy)
    return CompletionLogprobs(
        logp_BO=spread(scores.logp_N, mask_BO),
        entropy_BO=None if scores.entropy_N is None else spread(scores.entropy_N, mask_BO),
        mask_BO=mask_BO,
    )


def _in_full(model: nn.Module, batch: Batch, temperature: float, with_entropy: bool) -> HeadScores:
    with head_only_at(model, batch.source_index_N):
        logits_NV = logits_of(model, batch.inputs).squeeze(0)
    logp_N = token_logprobs(logits_NV, batch.targets_N, temperature=temperature)
    return HeadScores(logp_N, entropies(logits_NV, temperature=temperature) if with_entropy else None)


def _in_chunks(
    model: nn.Module, batch: Batch, temperature: float, with_entropy: bool, max_logits: int | None
) -> HeadScores | None:
    """Return the scores by chunks; None where the logits are few enough, or the model's head cannot be taken apart."""
    if max_logits is None:
        return None
    inner: Any = getattr(model, "module", model)
    few = len(batch.targets_N) * inner.config.get_text_config().vocab_size <= max_logits
    # Ranks that share parameters must pass through the same modules, also where one's micro-batch is small.
    if few and not partitioned(model):
        return None
    transform = logit_transform(model)
    if transform is None:
        return None
    return chunked_scores(
        model, batch, transform, temperature=temperature, max_logits=max_logits, with_entropy=with_entropy
    )


def head_of(model: nn.Module) -> nn.Module:
    """Return the output head, also of a model that an engine wraps."""
    inner: Any = getattr(model, "module", model)
    head: nn.Module = inner.get_output_embeddings()
    return head


def keep_float32_logits(model: nn.Module) -> None:
    """Give the model a head whose logits are float32 also where it computes in half precision; a classifier keeps its own.

    Raises:
        ConfigError: the head is more than a linear layer.
    """
    inner: Any = model
    head: nn.Module | None = inner.get_output_embeddings()
    if head is None:
        return
    if type(head) is not nn.Linear:
        raise ConfigError(
            f"head_precision: the output head of {type(model).__name__} is a {type(head).__name__}; expected a plain linear "
            "layer, whose product can be left in float32. Set head_precision to as_computed"
        )
    model.set_submodule(next(name for name, module in model.named_modules() if module is head), Float32Head.of(head))


def partitioned(model: nn.Module) -> bool:
    """Return whether the head's weight is spread over ranks (ZeRO 3), which then take turns in gathering it."""
    return hasattr(getattr(head_of(model), "weight", None), "ds_id")


@contextlib.contextmanager
def head_only_at(model: nn.Module, positions_N: Tensor) -> Iterator[None]:
    """Apply the model's output head, inside the block, to the flattened positions [N] only, as one row.

    A hook on the head instead of calling trunk and head ourselves: whatever the model does after its head (scaling,
    soft-capping) still happens, and an engine that wraps the model (DeepSpeed) still sees a forward of the whole.
    """

    def select(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTH, *others = arguments
        return (hidden_BTH.flatten(0, 1).index_select(0, positions_N).unsqueeze(0), *others)

    handle = head_of(model).register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def chunked_scores(
    model: nn.Module,
    batch: Batch,
    transform: LogitTransform,
    *,
    temperature: float,
    max_logits: int,
    with_entropy: bool,
) -> HeadScores:
    """Compute log-probabilities of the batch's targets without their logits: the head turns hidden states into them itself.

    The head's parameters are used inside its own forward, where an engine that partitions them (ZeRO 3) has gathered them.
    Gradients come back through its output, for which the engine gathers them again.

    Raises:
        RuntimeError: the model no longer does to its logits what was measured.
    """
    head: Any = head_of(model)
    found: list[HeadScores] = []

    def score(hidden_BTH: Tensor) -> Tensor:
        hidden_NH = hidden_BTH.flatten(0, 1).index_select(0, batch.source_index_N)
        scores = head_logprobs(
            hidden_NH,
            head.weight,
            head.bias,
            batch.targets_N,
            temperature=temperature,
            transform=transform,
            max_logits=max_logits,
            with_entropy=with_entropy,
            float32=isinstance(head, Float32Head),
        )
        found.append(scores)
        return scores.logp_N

    def keep(_: nn.Module, __: Any, logp_N: Tensor) -> Tensor:
        found[-1] = found[-1]._replace(logp_N=logp_N)  # as the engine's own hooks left it
        return ramp

    ramp = _ramp(head)
    with _replaced(head, score, keep):
        seen = logits_of(model, batch.inputs)
    if len(found) != 1 or not _agrees(transform, ramp, seen):
        raise RuntimeError(
            f"{type(model).__name__}: what the model does to its logits is no longer what was measured ({transform}); "
            "set training.max_logits to null to compute logits in full"
        )
    return found[0]


def logit_transform(model: nn.Module) -> LogitTransform | None:
    """Return what the model does to the output of its head; None, with a warning, where chunks cannot follow it.

    Measured once, by a forward of two tokens. Where parameters are partitioned every rank has to ask for it at the same time.
    """
    head = head_of(model)
    if head not in _measured:
        _measured[head] = _measure(model, head)
        if _measured[head] is None:
            warnings.warn(
                f"{type(getattr(model, 'module', model)).__name__}: log-probabilities need all logits of a micro-batch at "
                "once, since its output head is more than a linear layer or is followed by more than a factor or a soft cap; "
                "keep micro_batch_tokens small",
                stacklevel=2,
            )
    return _measured[head]


@torch.no_grad()
def _measure(model: nn.Module, head: nn.Module) -> LogitTransform | None:
    # A subclass, a parametrisation or an adapter around it may compute anything.
    if type(head) not in (nn.Linear, Float32Head) or "forward" in head.__dict__:
        return None
    ramp = _ramp(head)
    ids = torch.zeros((1, 2), dtype=torch.long, device=ramp.device)
    calls: list[int] = []

    def follow(*_: Any) -> Tensor:
        calls.append(1)
        return ramp

    with _replaced(head, None, follow):
        positions = torch.arange(2, device=ramp.device).unsqueeze(0)
        seen = logits_of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions})
    if len(calls) != 1 or seen.shape != ramp.shape:
        return None
    text = getattr(model, "module", model).config.get_text_config()  # type: ignore[union-attr, operator]
    cap = getattr(text, "final_logit_softcapping", None)
    candidates = [LogitTransform(), LogitTransform(scale=seen.flatten()[-1].item() / _HIGHEST)]
    candidates += [LogitTransform(cap=float(cap))] if cap else []
    return next((candidate for candidate in candidates if _agrees(candidate, ramp, seen)), None)


def _agrees(transform: LogitTransform, ramp: Tensor, seen: Tensor) -> bool:
    """Return whether the model makes of the ramp what `transform` does."""
    if seen.shape != ramp.shape:
        return False
    expected = transform.apply_(ramp.clone())
    return torch.allclose(seen.to(expected.dtype), expected, rtol=8 * torch.finfo(ramp.dtype).eps, atol=0.0)


def _ramp(head: Any) -> Tensor:
    """Return values from -64 to 64 in place of one position's logits: [1, 1, V]."""
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    return torch.linspace(-_HIGHEST, _HIGHEST, head.out_features, dtype=dtype, device=head.weight.device)[None, None]


def logits_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return what the model makes of a batch, under whatever hooks its head has."""
    logits: Tensor = model(**inputs, use_cache=False).logits
    sharing: Sharing | None = inputs.get("sharing")
    if sharing is not None and not sharing.masks:
        raise RuntimeError(
            f"{type(model).__name__}: its attention ignored shared prompts; set training.share_prompts to false"
        )
    return logits


@contextlib.contextmanager
def _replaced(
    head: nn.Module, forward: Callable[[Tensor], Tensor] | None, hook: Callable[..., Tensor]
) -> Iterator[None]:
    """Let the head compute `forward` (None: its own), inside the block, and the model get what `hook` returns.

    The hook is the last one: it sees what an engine's hooks made of the output.
    """
    if forward is not None:
        head.forward = forward
    handle = head.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
        head.__dict__.pop("forward", None)


def sampling_temperature(outputs: Rollouts, expected: float | None = None) -> float:
    """Return the one temperature of `outputs`, which scales the logits of every policy that scores them.

    Sampled at T and scored at 1, a policy has a ratio other than 1 to itself: logits 2, 1, 0 give the second token -1.41 at T
    = 1 and -1.69 at T = 0.7, a ratio of 1.3.

    Args:
        expected: refuse any other.

    Raises:
        ValueError: several temperatures, 0, or another than expected.
    """
    import pyarrow.compute as pc

    found: list[float] = pc.unique(outputs.read().column("temperature")).to_pylist()
    if len(found) != 1:
        raise ValueError(f"expected outputs of one temperature, found {sorted(found)}; sample them with one")
    if found[0] == 0:
        raise ValueError("greedy outputs come from no distribution; sample with temperature above 0")
    if expected is not None and abs(found[0] - expected) > 1e-6 * expected:  # the table keeps float32
        raise ValueError(f"expected outputs sampled at temperature {expected:g}, found {found[0]:g} in all of them")
    return found[0]
