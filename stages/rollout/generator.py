"""The seam between the rollout stage and whatever decodes: questions' ids in, sampled ids out.

A backend (`hf.py`, `vllm.py`, `served.py`) implements `Generator`. It knows nothing of tables, templates or tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length"]


class PromptTooLongError(ValueError):
    """A prompt and its outputs do not fit the model's window."""


@dataclass(frozen=True)
class Prompt:
    """One question as the policy sees it, and one seed for each output wanted of it (G of them)."""

    question_id: str
    ids: Sequence[int]
    seeds: Sequence[int]


@dataclass(frozen=True)
class Sampling:
    """How outputs are drawn; temperature 0 takes the most probable token (the lowest id among equals)."""

    temperature: float
    max_output_tokens: int
    stop_ids: tuple[int, ...]
    """A token among these ends its output and is part of it; empty forces every output to `max_output_tokens`."""


@dataclass(frozen=True)
class Output:
    """One sampled output o_i.

    `logprobs[t]` = log pi(ids[t] | prompt, ids[:t]) in nats, under the distribution that was sampled from: logits / T.
    Greedy decoding samples from no distribution; its logprobs are those at T = 1.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finish_reason: FinishReason


Progress = Callable[[int, int], None]
"""Called now and then with (outputs ended, tokens so far)."""


class Generator(Protocol):
    """Samples outputs of a causal language model."""

    @property
    def window(self) -> int | None:
        """Tokens of prompt and output together, at most; None: the model names no limit."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[list[Output]]:
        """For every prompt, in the order given, one output per seed, in the order of its seeds.

        Each output is drawn by its own seed. With `hf` the same prompts, sampling and weights give the same outputs bit for
        bit on one machine; other engines promise that only for the same call to an engine in the same state.

        Raises:
            PromptTooLongError: naming the question, the tokens it needs and the tokens the model has.
        """
        ...


def check_window(window: int | None, prompt: Prompt, sampling: Sampling, *, called: str = "window") -> None:
    """Refuse what a generator with such a window, which the message calls `called`, cannot answer in full.

    Raises:
        PromptTooLongError: see `Generator.generate`.
        ValueError: an empty prompt.
    """
    if not prompt.ids:
        raise ValueError(
            f"question {prompt.question_id!r}: expected at least one prompt token, found none; add a prefix"
        )
    if window is None or len(prompt.ids) + sampling.max_output_tokens <= window:
        return
    room = window - sampling.max_output_tokens
    raise PromptTooLongError(
        f"question {prompt.question_id!r}: expected a prompt of at most {max(room, 0)} tokens (the model's {called} of {window}"
        f" less max_output_tokens = {sampling.max_output_tokens}), found {len(prompt.ids)}; shorten or drop the question,"
        " lower max_output_tokens, or take a model with a larger window"
    )
