"""SFT, RFT and Online RFT: log-likelihood weighted by 1 or by I(o). One loss, three data sources (Table 10)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pipeline.config import Config
from stages.update.objectives.method import Method, Row, Tokens

if TYPE_CHECKING:
    from stages.kernels.objective import Surrogate


class SFTObjectiveConfig(Config):
    """Supervised fine-tuning (DeepSeekMath, Eq. 6-7): E[(1/|o|) sum_t log pi_theta], o from the demonstrations.

    With outputs of a teacher in their place it is sequence-level distillation (Kim and Rush 2016, arXiv 1606.07947).
    """

    ROW: ClassVar = Row(
        "SFT",
        ("demonstrations", "teacher"),
        "-",
        "1",
        ("one",),
        "it imitates demonstrations, whatever their reward (DeepSeekMath, Eq. 6-7)",
        rewards=(),
        corrections=(),
    )
    kind: Literal["sft"] = "sft"
    "Selects this objective."


class RFTConfig(Config):
    """Rejection sampling fine-tuning (DeepSeekMath, Eq. 8-10): the right ones among outputs of the initial policy.

    The mean is over all sampled outputs, right and wrong, as in Eq. 8; a mean over the right ones only would be another
    learning rate, growing where few are right.
    """

    ROW: ClassVar = Row(
        "RFT",
        ("initial_policy",),
        "Rule",
        "I(o)",
        ("correct",),
        "its coefficient is whether the rules find the answer right, of the initial policy's outputs (DeepSeekMath, Eq. 10)",
        rewards=("rules",),
        corrections=(),
    )
    kind: Literal["rft"] = "rft"
    "Selects this objective."


class OnlineRFTConfig(Config):
    """Online RFT (DeepSeekMath, Eq. 10-11): as RFT, with outputs of the policy as it is."""

    ROW: ClassVar = Row(
        "Online RFT",
        ("policy",),
        "Rule",
        "I(o)",
        ("correct",),
        "its coefficient is whether the rules find the answer right, of outputs of the policy as it is (DeepSeekMath, Eq. 11)",
        rewards=("rules",),
        several_steps=False,
    )
    kind: Literal["online_rft"] = "online_rft"
    "Selects this objective."


def likelihood() -> Method:
    """A log pi_theta, averaged as the paper does."""
    from stages.kernels.objective import weighted_likelihood

    def surrogate(tokens: Tokens) -> Surrogate:
        return weighted_likelihood(tokens.logp, tokens.advantage)

    return Method(surrogate)
