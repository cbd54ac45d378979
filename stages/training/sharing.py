"""Forward a prompt once for all outputs that share it: P + G R tokens in place of G (P + R).

The tokens of a micro-batch form one row without padding: its distinct prompts, then its outputs. Layers that treat every token
by itself compute just that row. Attention puts the tokens in their places: a prompt attends to itself; an output to its prompt
and to itself, by the attention that the architecture has. Positions go on from the prompt's end, so values and gradients are
those of separate sequences but for the order of sums.

Shapes: T tokens of the row, Q distinct prompts, P the longest, B outputs, R the longest; S = Q P + B R places, padding
included; h heads of size d.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any, Final, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ARCHITECTURES: Final = frozenset(
    {
        *("gemma", "gemma2", "gemma3_text", "gpt_neox", "granite", "llama", "mistral"),
        *("olmo2", "phi", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2"),
    }
)
"""`model_type` of models whose layers are attention over all tokens before and layers that treat every token by itself."""
_NAMES: Final = {kind: f"cohort_shared_{kind}" for kind in ("eager", "sdpa")}
"""Names of `_attention(kind)` among the implementations of transformers."""


def share_prompts(model: nn.Module) -> None:
    """Let the model compute rows with a `Sharing`, and others as before.

    Nothing changes where it is of an unknown architecture or of code of its own, nor where flash-attn computes it.
    """
    config: Any = model.config
    known = config.model_type in ARCHITECTURES and type(model).__module__.startswith("transformers.models.")
    if known and config._attn_implementation in _NAMES:
        config._attn_implementation = _NAMES[config._attn_implementation]


def longest_shared(model: nn.Module) -> float:
    """Return the longest sequence, in tokens, whose prompt the model can share: 0 if none."""
    config: Any = getattr(model, "module", model).config
    if config._attn_implementation not in _NAMES.values():
        return 0
    # Up to a sliding window's length attention is over all tokens before.
    return getattr(config, "sliding_window", None) or math.inf


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Say where attention has the tokens of a row: place s holds token `token_S[s]`, or padding."""

    token_S: Tensor
    """Q x P places of prompts, then B x R of outputs."""
    padding_S: Tensor
    """True where a place holds no token."""
    place_T: Tensor
    """The place of each token."""
    prompt_B: Tensor
    """Which of the prompts an output goes on from."""
    prompts: tuple[int, int]
    """Q, P."""
    outputs: tuple[int, int]
    """B, R."""
    given_BP: Tensor
    """True on the tokens of an output's prompt."""
    padded: bool
    """Whether any place holds no token."""
    masks: dict[str, Tensor] = dataclasses.field(default_factory=dict, compare=False)
    """Of one forward pass, whose layers all read them, also in its backward: `for_a_pass`."""

    @classmethod
    def of(cls, prompts: NDArray[np.int64], outputs: NDArray[np.int64], prompt_B: NDArray[np.int64]) -> Self:
        """Lay out a row, given the lengths of its prompts and outputs and each output's prompt."""
        longest, most = int(prompts.max()), int(outputs.max())
        used_QP, used_BR = np.arange(longest) < prompts[:, None], np.arange(most) < outputs[:, None]
        used_S = np.concatenate([used_QP.reshape(-1), used_BR.reshape(-1)])
        token_S = np.where(used_S, np.cumsum(used_S) - 1, 0)
        return cls(
            token_S=torch.from_numpy(token_S),
            padding_S=torch.from_numpy(~used_S),
            place_T=torch.from_numpy(np.flatnonzero(used_S)),
            prompt_B=torch.from_numpy(prompt_B),
            prompts=used_QP.shape,
            outputs=used_BR.shape,
            given_BP=torch.from_numpy(used_QP[prompt_B]),
            padded=not used_S.all(),
        )

    def to(self, device: str, *, non_blocking: bool = False) -> Self:
        """Return the layout on a device."""
        moved: dict[str, Any] = {
            field.name: part.to(device, non_blocking=non_blocking)
            for field in dataclasses.fields(self)
            if isinstance(part := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def for_a_pass(self) -> Self:
        """Return the layout with masks of its own: those of all micro-batches of a step would be larger than the model."""
        return dataclasses.replace(self, masks={})

    def mask(self, part: Literal["prompts", "outputs"], kind: str, dtype: torch.dtype) -> Tensor:
        """Return what the tokens of a part attend to, as an implementation of attention takes it."""
        if part not in self.masks:
            # Padding is on the right: no token of a prompt sees it.
            sees = self._before(self.prompts[1]) if part == "prompts" else self._before_outputs()
            blank = torch.zeros((), dtype=dtype, device=sees.device)
            self.masks[part] = sees if kind == "sdpa" else torch.where(sees, blank, torch.finfo(dtype).min)
        return self.masks[part]

    def _before(self, size: int) -> Tensor:
        """Return which tokens of a text one of them attends to: `[1, 1, size, size]`."""
        return torch.ones(1, 1, size, size, dtype=torch.bool, device=self.given_BP.device).tril()

    def _before_outputs(self) -> Tensor:
        """Return which tokens of its prompt and its own an output's token attends to: `[B, 1, R, P + R]`."""
        count, longest = self.outputs
        given_B1RP = self.given_BP[:, None, None].expand(-1, 1, longest, -1)
        return torch.cat([given_B1RP, self._before(longest).expand(count, -1, -1, -1)], dim=-1)

    def place(self, states_1hTd: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states of prompts `[Q, P, h, d]` and outputs `[B, R, h, d]`."""
        states_Thd = states_1hTd.squeeze(0).transpose(0, 1)
        states_Shd = _rearranged(states_Thd, self.token_S, self.place_T) if self.padded else states_Thd
        border = self.prompts[0] * self.prompts[1]
        heads = states_Shd.shape[1:]
        return states_Shd[:border].view(*self.prompts, *heads), states_Shd[border:].view(*self.outputs, *heads)

    def in_a_row(self, prompts_QPhd: Tensor, outputs_BRhd: Tensor) -> Tensor:
        """Return what `place` took apart: `[1, T, h, d]`."""
        states_Shd = torch.cat([prompts_QPhd.flatten(0, 1), outputs_BRhd.flatten(0, 1)])
        if self.padded:
            states_Shd = _rearranged(states_Shd, self.place_T, self.token_S, self.padding_S)
        return states_Shd.unsqueeze(0)


class _Rearranged(torch.autograd.Function):
    """Copy rows by number, where `back` names the copy of each row: its gradient is read there, nothing is summed."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, numbers: Tensor, back: Tensor, padding: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, padding)
        return states.index_select(0, numbers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        back, padding = ctx.saved_tensors
        gradient = gradients[0].index_select(0, back)
        if padding is not None:  # rows without a copy, which have no gradient
            gradient.masked_fill_(padding[:, None, None], 0.0)
        return gradient, None, None, None


def _rearranged(states: Tensor, numbers: Tensor, back: Tensor, padding: Tensor | None = None) -> Tensor:
    found: Tensor = _Rearranged.apply(states, numbers, back, padding)  # type: ignore[no-untyped-call]
    return found


def _attention(kind: str) -> Callable[..., tuple[Tensor, Any]]:
    def attend(
        module: nn.Module,
        query_1hTd: Tensor,
        key_1hTd: Tensor,
        value_1hTd: Tensor,
        attention_mask: Tensor | None,
        *,
        sharing: Sharing | None = None,
        **settings: Any,
    ) -> tuple[Tensor, Any]:
        own = ALL_ATTENTION_FUNCTIONS[kind] if kind == "sdpa" else _eager(module)
        if sharing is None:
            plain: tuple[Tensor, Any] = own(module, query_1hTd, key_1hTd, value_1hTd, attention_mask, **settings)
            return plain
        (query_Q, query_B), (key_Q, key_B), (value_Q, value_B) = map(sharing.place, (query_1hTd, key_1hTd, value_1hTd))

        def attended(query: Tensor, key: Tensor, value: Tensor, part: Literal["prompts", "outputs"]) -> Tensor:
            given = (states.transpose(1, 2) for states in (query, key, value))
            states_BThd: Tensor = own(module, *given, sharing.mask(part, kind, query.dtype), **settings)[0]
            return states_BThd

        def behind_prompts(prompts: Tensor, outputs: Tensor) -> Tensor:
            return torch.cat([prompts.index_select(0, sharing.prompt_B), outputs], dim=1)

        prompts_QPhd = attended(query_Q, key_Q, value_Q, "prompts")
        keys, values = behind_prompts(key_Q, key_B), behind_prompts(value_Q, value_B)
        return sharing.in_a_row(prompts_QPhd, attended(query_B, keys, values, "outputs")), None

    return attend


def _eager(module: nn.Module) -> Callable[..., Any]:
    """Return the attention that the architecture of a module has by itself, with its soft caps."""
    own: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return own


for _kind, _name in _NAMES.items():
    AttentionInterface.register(_name, _attention(_kind))
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_kind])
