"""DPO on pairs of a right and a wrong output (DeepSeekMath, Eq. 12-14)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from pipeline.config import Config
from stages.update.objectives.method import Method, Row, Tokens

if TYPE_CHECKING:
    from stages.kernels.objective import Surrogate


class DPOConfig(Config):
    """DPO (DeepSeekMath, Eq. 12), pairs from one question: o+ with a right answer, o- with a wrong one (5.2.1)."""

    ROW: ClassVar = Row(
        "DPO",
        ("initial_policy", "policy"),
        "Rule",
        "sigma(beta (m(o-) - m(o+)))",
        ("pairs",),
        "its pairs are of a right and a wrong output, whoever sampled them (DeepSeekMath, 5.2.1 and Eq. 12)",
        rewards=("rules",),
        corrections=(),
    )
    kind: Literal["dpo"] = "dpo"
    "Selects this objective."
    beta: float = Field(0.1, gt=0)
    "Factor of the log-ratio. The paper gives none; 0.1 is Rafailov et al.'s."
    length_normalised: bool = True
    "Mean log-ratio over tokens, as Eq. 12 has it; false: the sum, the usual DPO (arXiv 2305.18290, Eq. 7)."


def dpo(config: DPOConfig) -> Method:
    """log sigma(beta m(o+) - beta m(o-))."""
    from stages.kernels import objective

    def surrogate(tokens: Tokens) -> Surrogate:
        assert tokens.ref_logp is not None
        return objective.dpo(
            tokens.logp,
            tokens.ref_logp,
            tokens.mask,
            beta=config.beta,
            length_normalised=config.length_normalised,
        )

    return Method(surrogate, compares=True, pairs=True)
