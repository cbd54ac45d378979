"""Find out whether an engine has the weights it should have, by its log-probabilities of a probe and transformers' own.

The probe is a fixed sequence of token ids, of which the engine says the log-probabilities, and a few tokens that it samples
behind them, so that its decoding and its `logprobs_mode` are looked at too. A version counter alone would not do: vLLM's reload
on a CPU reports success and leaves a mixture of two models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.residency import holder_of
from stages.models import Checkpoint, load_model, may_run_code
from stages.rollout.generator import Output, Sampling, UnsoundOutputError, objection_to

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SAMPLED: Final = 8
"""Tokens that the engine samples behind the probe."""
_PROMPT: Final = 24
_FLOAT32: Final = 2e-3
"""Nats, for any single token; two right engines differ by less than 1e-5 on small models."""
_BFLOAT16: Final = 2.0**-7
"""Nats per unit of the logits' size, for the mean over tokens: twice the spacing of bfloat16, relative to the number."""


class StaleWeightsError(RuntimeError):
    """An engine computes with other weights than those whose outputs are wanted."""


@dataclass(frozen=True)
class Answer:
    """Hold what an engine says of the probe."""

    prompt_logprobs: Sequence[float]
    """Of every token of the prompt but the first, at T = 1."""
    ids: Sequence[int]
    """What it sampled behind the prompt."""
    logprobs: Sequence[float]
    """Of these, at the temperature they were sampled with (at T = 1 where that was 0)."""


def vocabulary_and_window(policy: Checkpoint) -> tuple[int, int | None]:
    """Return how many token ids its model knows, and how many tokens it reads (None: it names no limit)."""
    from transformers import AutoConfig

    path = policy.described
    described = AutoConfig.from_pretrained(path, trust_remote_code=may_run_code(path), local_files_only=True)
    return int(described.get_text_config().vocab_size), getattr(described, "max_position_embeddings", None)


def probe_ids(vocabulary: int, window: int | None) -> list[int]:
    """Return the probe's prompt: ids all over the vocabulary, so that few of them are what any model expects."""
    length = _PROMPT if window is None else max(1, min(_PROMPT, window - SAMPLED))
    return [(7 + 2654435761 * place) % vocabulary for place in range(length)]


def check_answer(
    answers: Sequence[Answer],
    policy: Checkpoint,
    prompt: Sequence[int],
    *,
    dtype: torch.dtype,
    temperature: float,
    tolerance: float | None,
    engine: str,
) -> float:
    """Compare what each engine says with transformers in float32, on the policy's weights.

    Returns the largest difference in nats.

    In float32 no token may differ by more than `tolerance` nats; in bfloat16 the mean over tokens may not, and by default it is
    twice the spacing of bfloat16 at the size of the logits. What changes the probe by less is not noticed: in bfloat16 that is
    also a single small update.

    Raises:
        UnsoundOutputError: values that no engine can have sampled.
        StaleWeightsError: more than rounding.
    """
    names = [
        engine if len(answers) == 1 else f"{engine}, engine {rank} of {len(answers)}" for rank in range(len(answers))
    ]
    vocabulary = vocabulary_and_window(policy)[0]
    for name, answer in zip(names, answers, strict=True):
        given = Output(np.array(answer.ids, dtype=object), np.array(answer.logprobs, dtype=object), "length")
        if objection := objection_to(given, Sampling(temperature, max(1, len(answer.ids)), ()), vocabulary):
            raise UnsoundOutputError(f"{name}: what it sampled behind the probe: {objection}")
    model, largest = _model(policy, dtype), 0.0
    for name, answer in zip(names, answers, strict=True):
        ids = [*prompt, *answer.ids]
        logits = _logits(model, ids)
        expected = _logprobs(logits, ids, sampled=len(answer.ids), temperature=temperature)
        difference = np.abs(np.array([*answer.prompt_logprobs, *answer.logprobs], dtype=np.float64) - expected)
        measured, allowed = _measured(difference, logits, dtype, tolerance)
        if not measured <= allowed:
            raise StaleWeightsError(
                f"{name}: its log-probabilities of the probe differ by {measured:.3g} nats from transformers' on the weights "
                f"of {policy} (expected at most {allowed:.2g}): it has other weights, or reports log-probabilities of another "
                "distribution than it samples from (expected logprobs_mode=processed_logprobs)"
            )
        largest = max(largest, float(difference.max()))
    return largest


def _measured(
    difference: NDArray[np.float64], logits: torch.Tensor, dtype: torch.dtype, tolerance: float | None
) -> tuple[float, float]:
    """Return what is compared of the differences, and what it may be."""
    import torch

    if dtype == torch.float32:
        return float(difference.max()), _FLOAT32 if tolerance is None else tolerance
    size = float(logits.abs().amax(dim=-1).mean())
    return float(difference.mean()), _BFLOAT16 * size if tolerance is None else tolerance


def _model(policy: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a torch trainer that has the policy; else load it on the CPU, since the GPU is the engine's.

    A trainer's weights are float32 ones that `dtype` has not rounded; the tolerance covers that.
    """
    from stages.training.torch_engine import TorchEngine

    trainer = holder_of(policy.state)
    if isinstance(trainer, TorchEngine):
        model: PreTrainedModel = trainer.model
        return model
    return load_model(policy, dtype=dtype).float()


def _logits(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """Compute `[T, V]`."""
    import torch

    with torch.no_grad():  # no tensor of inference mode may stay in a trainer's model
        logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0].float().cpu()
    return logits


def _logprobs(logits: torch.Tensor, ids: Sequence[int], *, sampled: int, temperature: float) -> NDArray[np.float64]:
    """Return the log-probabilities of ids[1:]: at T = 1, and the last `sampled` at `temperature`."""
    import torch

    scale = torch.ones(len(ids) - 1, dtype=torch.float64)
    scale[len(ids) - 1 - sampled :] = temperature or 1.0
    logp = (logits[:-1].double() / scale[:, None]).log_softmax(dim=-1)
    picked: NDArray[np.float64] = logp[torch.arange(len(ids) - 1), torch.tensor(list(ids[1:]))].numpy()
    return picked
