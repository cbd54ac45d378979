"""Choose what the gradient coefficient is made of: one config per kind of advantage, named after the value of a token."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config import Config


class OneConfig(Config):
    """A = 1 at every token: supervised fine-tuning (DeepSeekMath, A.1.1: GC = 1). Needs no rewards."""

    kind: Literal["one"] = "one"
    """Discriminator."""


class CorrectConfig(Config):
    """A = I(o): 1 where the answer is right (status `ok`), else 0 (DeepSeekMath, Eq. 10: RFT and Online RFT).

    Wrong outputs keep an advantage of 0 and stay in the loss's denominator: the paper's expectation (Eq. 8, 11) is over all
    sampled outputs. Only outputs without a verdict (null reward) are masked.
    """

    kind: Literal["correct"] = "correct"
    """Discriminator."""


class GroupConfig(Config):
    """The reward against those of the other outputs of its question (DeepSeekMath, 4.1.2 and 4.1.3): GRPO, and with other
    baselines RLOO and Dr. GRPO. The defaults are the paper's outcome supervision."""

    kind: Literal["group"] = "group"
    """Discriminator."""
    supervision: Literal["outcome", "process"] = "outcome"
    """`outcome` (4.1.2): the normalised reward of the output at each of its tokens. `process` (4.1.3): the normalised rewards
    of the steps that end at the token or later, summed; mean and std are over all steps of all outputs of the question. Step
    rewards come from the reward, for example its component `steps`."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What is subtracted: `mean`, the group's (the paper), or `leave_one_out`, the mean of the others (RLOO: Kool et al. 2019;
    Ahmadian et al. 2024, arXiv 2402.14740)."""
    scale: Literal["std", "none"] = "std"
    """What divides: `std`, the group's (the paper), or `none` (Dr. GRPO: Liu et al. 2025, arXiv 2503.20783: dividing weighs
    questions that are nearly always or nearly never solved most)."""
    ddof: Literal[0, 1] = 1
    """Divisor n - ddof of the variance. The paper writes `std` only; 1 is torch's default and that of most implementations.
    0 makes advantages larger by sqrt(n / (n - 1)): 1.069 for G = 8, 1.008 for G = 64. Where `scale` is `none`, neither
    this nor `eps` can be changed."""
    eps: float = Field(0.0, ge=0)
    """Added to the standard deviation. Not in the paper, and not needed: groups of equal rewards are recognised and get
    exactly 0. A learned reward never has equal ones: where all outputs of a question are wrong, its noise is all there is, and
    0 scales that up to the size of any signal. An eps of about twice that noise damps it (`docs/decisions.md`: figures)."""
    kl_in_reward: float = Field(0.0, ge=0)
    """beta of the KL penalty inside the reward: r - beta * sum_t k1_t, k1 = log pi - log pi_ref, before the group is compared
    (RLOO). The paper's GRPO has it in the loss instead, hence 0; both at once count it twice. Only k1 is offered: rewards are
    not differentiated, so the policy gradient sees E[k * grad log pi], which is the gradient of the KL for k1 alone; with k2
    and k3 it vanishes to first order near the reference. Above 0 it needs the table `logprobs`."""
    degenerate: Literal["keep", "mask"] = "keep"
    """Groups whose rewards are all equal: `keep` gives advantage 0, so that their KL term in the loss stays (the paper's
    formula); `mask` takes them out of the loss (the filter of DAPO's dynamic sampling, Yu et al. 2025, arXiv 2503.14476)."""
    truncated: Literal["keep", "mask"] = "keep"
    """Outputs cut at the length limit; the paper is silent. `keep` trains on them like on others; `mask` leaves their reward
    in the group's statistics and them out of the loss. Leaving them out of both is the reward's choice
    (`truncated: no_reward`)."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.baseline == "leave_one_out" and self.scale == "std":
            raise ValueError(
                "baseline leave_one_out with scale std: the others of a lone winner are all equal, their spread is 0 and the "
                "advantage has no bound; set scale to none (RLOO divides by nothing), or baseline to mean"
            )
        if self.scale == "none" and self.eps > 0:
            raise ValueError(f"eps = {self.eps} is added to the std, and scale none divides by none; set eps to 0")
        if self.scale == "none" and self.ddof != 1:
            raise ValueError(f"ddof = {self.ddof} is of the std, and scale none divides by none; leave ddof at 1")
        if self.supervision == "process" and self.baseline == "leave_one_out":
            raise ValueError(
                "supervision process with baseline leave_one_out: 4.1.3 compares steps with all steps of the group, and which "
                "to leave out (a step or its output) is defined nowhere; set baseline to mean"
            )
        if self.supervision == "process" and self.kl_in_reward > 0:
            raise ValueError(
                "supervision process with kl_in_reward: the penalty belongs to outputs or tokens, and steps would be compared "
                "with a sum over others; put the KL into the loss (the objective's beta)"
            )
        if self.degenerate == "mask" and self.kl_in_reward > 0:
            raise ValueError(
                "degenerate mask with kl_in_reward: the penalty differs between outputs, so that no group has equal rewards "
                "and nothing would be masked; put the KL into the loss (the objective's beta)"
            )
        return self


class BatchConfig(Config):
    """Return-to-go normalised over all tokens of the batch (REINFORCE++: Hu 2025, arXiv 2501.03262).

    Token rewards are -kl_in_reward * k1_t and, at the last token, the output's reward; nothing is discounted.
    """

    kind: Literal["batch"] = "batch"
    """Discriminator."""
    baseline: Literal["none", "group_mean"] = "none"
    """`group_mean` subtracts the mean reward of the question's outputs first (the source's REINFORCE++-baseline)."""
    kl_in_reward: float = Field(0.01, ge=0)
    """beta of k1 = log pi - log pi_ref in each token's reward; only k1, as for `group`. The source has the penalty and the
    value is ours. Above 0 it needs the table `logprobs`."""


class GAEConfig(Config):
    """Generalised advantages with a learned value function (DeepSeekMath, 4.1.1: PPO). Needs the table `values`.

    An output cut at the length limit is taken as finished, like every other: nothing is bootstrapped beyond its last token.
    """

    kind: Literal["gae"] = "gae"
    """Discriminator."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount per token. The paper gives none; ours: 1, as the reward comes at the end and its place must not matter."""
    lam: float = Field(0.95, ge=0, le=1)
    """lambda of GAE (Schulman et al. 2016, arXiv 1506.02438). The paper gives none; 0.95 is the usual choice for PPO."""
    kl_in_reward: float = Field(0.04, ge=0)
    """beta of the KL penalty k1 = log pi - log pi_ref in each token's reward (Eq. 2). Only k1: Eq. 2 has it, and the policy
    gradient through a reward is that of the KL for k1 alone. The paper gives beta for GRPO only (4.2: 0.04), taken over.
    Above 0 it needs the table `logprobs`; with 0 the KL belongs into the loss (the objective's beta), never both."""
    whiten: Literal["none", "batch"] = "none"
    """`batch` normalises the advantages over all tokens of the batch (not the returns). Common, but not in the paper."""


class PairsConfig(Config):
    """Preferences of DPO (DeepSeekMath, A.1.4): the i-th right output of a question with its i-th wrong one, each used once.

    +1 at every token of the right one, -1 of the wrong one; outputs without a partner are masked. How the paper pairs the
    outputs of a question, it does not say; in order and once each, no output weighs more than another.
    """

    kind: Literal["pairs"] = "pairs"
    """Discriminator."""


class TeacherConfig(Config):
    """A_t = log pi_teacher(o_t) - log pi_theta(o_t): on-policy distillation (Agarwal et al. 2024, arXiv 2306.13649; Gu et al.
    2024, arXiv 2306.08543). Needs no rewards, and the table `logprobs` of policy and teacher.

    Its expectation under the policy is minus the reverse KL of the token. No later token's is added (a discount of 0), and no
    other output is compared with.
    """

    kind: Literal["teacher"] = "teacher"
    """Discriminator."""


AdvantageConfig = Annotated[
    OneConfig | CorrectConfig | GroupConfig | BatchConfig | GAEConfig | PairsConfig | TeacherConfig,
    Field(discriminator="kind"),
]
