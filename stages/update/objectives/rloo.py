"""RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pipeline.config import Config
from stages.update.objectives.method import Method, Row, Tokens

if TYPE_CHECKING:
    from stages.kernels.objective import Surrogate


class RLOOConfig(Config):
    """RLOO: A_i log pi_theta(o_i | q), an output being one action: its tokens are summed, not averaged.

    The baseline is the advantage's (`advantage.baseline = leave_one_out`, `scale = none`), the KL penalty the reward's
    (`advantage.kl_in_reward`).
    """

    ROW: ClassVar = Row(
        "RLOO",
        ("policy",),
        "Model",
        "r_i - mean of the other r",
        ("group",),
        "an output is one action, its advantage the reward less the mean of the others' (arXiv 2402.14740, 2.2)",
        supervisions=("outcome",),
        baselines=("leave_one_out",),
        scales=("none",),
        several_steps=False,
    )
    kind: Literal["rloo"] = "rloo"
    "Selects this objective."


def rloo() -> Method:
    """(1/G) sum_i A_i sum_t log pi_theta(o_{i,t})."""
    from stages.kernels.objective import weighted_likelihood

    def surrogate(tokens: Tokens) -> Surrogate:
        return weighted_likelihood(tokens.logp, tokens.advantage)

    return Method(surrogate, "constant", length=1)
