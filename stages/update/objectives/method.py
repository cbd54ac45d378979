"""What an objective is to the training loop (`Method`), and what it is in the paper's Table 10 (`Row`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from torch import Tensor

    from stages.kernels.objective import Surrogate

DataSource = Literal["demonstrations", "initial_policy", "policy", "teacher"]
"""Where outputs come from: P_sft(Q, O), pi_sft(O|q), pi_theta(O|q), or pi_teacher(O|q)."""
Aggregation = Literal["sequence_mean", "token_mean", "constant"]
"""How tokens are weighed: see `stages/kernels/objective.py`."""
Divergence = Literal["k1", "k2", "k3", "k3_unbiased"]
"""Estimators of the KL term: see `stages/kernels/objective.py`."""
RewardSource = Literal["rules", "model"]
"""What r is: the rules' score or a learned model's (Table 10: Rule, Model)."""
Level = Literal["token", "sequence", "sequence_mean"]
"""What an importance weight between rollout engine and trainer belongs to: see `stages/kernels/logprobs.py`."""


class Row(NamedTuple):
    """A row of Table 10, and what may be combined with it; everything else is refused, with `because` as the reason.

    A field that the kind of advantage does not have restricts nothing.
    """

    title: str
    sources: tuple[DataSource, ...]
    """Data sources that the method is defined for; the paper's (or its own paper's) first."""
    reward: str
    """Reward function, in the table's words."""
    coefficient: str
    """Gradient coefficient, in the table's words."""
    advantages: tuple[str, ...]
    """Kinds of advantage config whose values are this method's coefficients; its own first."""
    because: str
    """Where the method is defined so, as a clause for error messages."""
    uses_ratio: bool = False
    """Whether pi_theta / pi_old enters: outputs of another policy than pi_theta then need that policy's log-probabilities."""
    rewards: tuple[RewardSource, ...] = get_args(RewardSource)
    """Reward sources that reach the gradient; none: the method reads no reward."""
    supervisions: tuple[str, ...] = ("outcome", "process")
    """`advantage.supervision`."""
    baselines: tuple[str, ...] = ("mean",)
    """`advantage.baseline`."""
    scales: tuple[str, ...] = ("std",)
    """`advantage.scale`."""
    several_steps: bool = True
    """Whether more than one optimizer step may be made on the same outputs (`mu`, `mini_batches`). From the second on these are
    an earlier policy's: that takes a ratio, or a method that is defined for outputs of any policy."""
    corrections: tuple[Level, ...] = get_args(Level)
    """`update.correction.level`; none: weights between rollout engine and trainer have no place in the method."""


@dataclass(frozen=True)
class Tokens:
    """Hold what an objective sees of a micro-batch: per output token, [B, O]."""

    logp: Tensor
    """log pi_theta, with gradient."""
    old_logp: Tensor
    """log pi_old; equal to `logp` at the first update after sampling."""
    ref_logp: Tensor | None
    """log pi_ref; None where the method asks for none."""
    advantage: Tensor
    mask: Tensor
    """True on tokens that the policy wrote."""


@dataclass(frozen=True)
class Method:
    """Hold what the training loop needs to know of an objective."""

    surrogate: Callable[[Tokens], Surrogate]
    """The values to maximise, before the KL term."""
    aggregation: Aggregation = "sequence_mean"
    length: int = 1
    """Divisor of the aggregation `constant`."""
    beta: float = 0.0
    """Coefficient of the KL term of the loss; 0 = no such term."""
    divergence: Divergence = "k3"
    """Estimator of the KL term."""
    compares: bool = False
    """The surrogate itself reads log pi_ref."""
    pairs: bool = False
    """Outputs come in pairs (preferred, other) that stay side by side in one micro-batch."""

    @property
    def needs_reference(self) -> bool:
        """Whether pi_ref is loaded."""
        return self.compares or self.beta > 0

    @property
    def skips_idle(self) -> bool:
        """Whether an output of advantage 0 has no gradient, and so need not be computed."""
        return self.beta == 0


def clipped_ratio(eps_low: float, eps_high: float) -> Callable[[Tokens], Surrogate]:
    """Return the surrogate of PPO, GRPO and their descendants: min[ r A, clip(r, 1 - eps_low, 1 + eps_high) A ]."""
    from stages.kernels.objective import clipped

    def surrogate(tokens: Tokens) -> Surrogate:
        return clipped(tokens.logp, tokens.old_logp, tokens.advantage, eps_low=eps_low, eps_high=eps_high)

    return surrogate
