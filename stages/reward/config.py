"""What a reward consists of: named, weighted components and the treatment of what has no score."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config import UNKEYED, Config
from stages.reward.rules.accuracy import Verifier
from stages.reward.rules.extraction import Convention
from stages.reward.rules.form import Form

__all__ = [
    "AccuracyConfig",
    "ComponentConfig",
    "FormatConfig",
    "Missing",
    "OverlongConfig",
    "RewardConfig",
    "StepsConfig",
]

Missing = Literal["no_reward", "zero", "rescale"]


class AccuracyConfig(Config):
    """Answer accuracy: 1 where the stated answer equals the gold answer, else 0; none where the verifier gave up."""

    kind: Literal["accuracy"] = "accuracy"
    name: str = Field("accuracy", pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    """Name of the component in the table and of its metric, `reward/<name>`."""
    weight: float = 1.0
    """Factor in the sum. The paper's rule reward is accuracy alone."""
    conventions: tuple[Convention, ...] = ("boxed", "tags", "hashes", "line", "phrase", "number")
    """Where an answer may stand, by preference: `\\boxed{}`, `<answer>` tags, `####`, a line `A:`, "the answer is",
    or nothing but a number."""
    verifier: Verifier = "math_verify"
    """`exact`: rational numbers and equal strings only, no process is ever started. `math_verify`: symbolic comparison of
    what `exact` leaves open. `math_verify_search`: besides, math-verify's own search through the end of the text where the
    conventions find no answer or `exact` leaves it open (lenient: for evaluation, not for training)."""
    missing: Missing = "no_reward"
    """An output without verdict (timeout, error): no reward for it at all, a score of zero, or the other components'
    weights rescaled to the same sum. Silence of the verifier is not the output's fault, hence the default."""

    @model_validator(mode="after")
    def _some_convention(self) -> Self:
        if not self.conventions and self.verifier != "math_verify_search":
            raise ValueError("conventions must name at least one place where an answer may stand")
        return self


class FormatConfig(Config):
    """Format consistency: 1 where the output has the asked form, else 0."""

    kind: Literal["format"] = "format"
    name: str = Field("format", pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    """Name of the component in the table and of its metric, `reward/<name>`."""
    weight: float = 0.1
    """Factor in the sum. Not from the paper: small beside accuracy, so that form never pays more than being right."""
    form: Form = "hashes"
    """`hashes`: ends with one line `#### <number>`; `boxed`: exactly one `\\boxed{}`; `line`: ends with `A: <answer>`;
    `pattern`: `pattern` is found."""
    pattern: str | None = None
    """Regular expression for `form: pattern`. It runs in this process without a deadline: keep it free of nested
    repetition."""
    missing: Missing = "no_reward"
    """As for accuracy; a format is always decidable."""

    @model_validator(mode="after")
    def _pattern_with_its_form(self) -> Self:
        if (self.form == "pattern") != (self.pattern is not None):
            raise ValueError("`pattern` belongs to `form: pattern`, and only there")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"pattern is not a regular expression: {error}") from None
        return self


class StepsConfig(Config):
    """Process labels of the built-in world: one reward per line, exact by its checker (DeepSeekMath, 4.1.3, in the place of a
    process reward model). Its own score is the share of credited lines.

    How steps are cut the paper does not say; here a step is a line with its newline. index(j) is the token that completes it,
    that of the last step the last token of the output, its end of sequence included. Empty lines belong to the step that
    follows, or to the last; an output without any line is one step of reward 0.
    """

    kind: Literal["steps"] = "steps"
    """Discriminator."""
    name: str = Field("steps", pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    """Name of the component in the table and of its metric, `reward/<name>`: the mean of all step rewards."""
    weight: float = 0.0
    """Factor of the share of credited lines in the outcome reward. 0: steps are for process supervision, and the outcome
    reward stays what it was."""
    credit: Literal["right", "consistent"] = "right"
    """What r^index(j) = 1 stands for, else 0. `right`: the line is the true one at its place. `consistent`: it follows from
    what the output wrote before, right or not, so that one slip does not take the credit of every later line."""
    missing: Missing = "no_reward"
    """As for accuracy; a line is always decidable."""


class OverlongConfig(Config):
    """Soft punishment of long outputs (DAPO: Yu et al. 2025, arXiv 2503.14476, Eq. 13); not from the paper.

    0 up to max_tokens - buffer_tokens, then ((max_tokens - buffer_tokens) - |o|) / buffer_tokens, and -1 from max_tokens on.
    """

    kind: Literal["overlong"] = "overlong"
    """Discriminator."""
    name: str = Field("overlong", pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    """Name of the component in the table and of its metric, `reward/<name>`."""
    weight: float = 1.0
    """Factor in the sum; 1 in the source, where being right pays 1 and being wrong -1."""
    max_tokens: int = Field(1024, ge=1)
    """L_max: tokens of an output, its end of sequence included, from which the punishment is full. Set it to the rollout's
    `max_output_tokens`; with a larger one no output meets it."""
    buffer_tokens: int = Field(256, ge=1)
    """L_cache: tokens below `max_tokens` over which the punishment grows. The source has 4,096 of 20,480; a quarter is ours."""
    missing: Missing = "no_reward"
    """As for accuracy; a length is always known."""

    @model_validator(mode="after")
    def _buffer_within_the_length(self) -> Self:
        if self.buffer_tokens > self.max_tokens:
            raise ValueError(
                f"buffer_tokens ({self.buffer_tokens}) is above max_tokens ({self.max_tokens}): the shortest outputs would be "
                "punished too"
            )
        return self


ComponentConfig = Annotated[AccuracyConfig | FormatConfig | StepsConfig | OverlongConfig, Field(discriminator="kind")]


class RewardConfig(Config):
    """The reward of an output: the weighted sum of its components."""

    components: tuple[ComponentConfig, ...] = (AccuracyConfig(),)
    """What is scored. The row's status is that of the first accuracy component, else of the first component."""
    truncated: Literal["as_unparseable", "as_is", "no_reward"] = "as_unparseable"
    """Outputs cut at the length limit (`finish_reason: length`); the paper is silent. `as_unparseable`: every component
    that reads text scores 0, status `truncated`; their length is punished and their lines keep their labels, the broken one
    is judged as it stands. `as_is`: scored like any other text. `no_reward`: null, out of the group's statistics and out of
    the loss, no step rewards either."""
    workers: Annotated[int, UNKEYED] = Field(2, ge=1)
    """Verifier processes; started only when an answer needs more than exact comparison."""
    deadline_s: Annotated[float, UNKEYED] = Field(3.0, gt=0)
    """Seconds for one comparison; one that misses it is tried once more, alone and with twice the time."""
    memory_mb: Annotated[int, UNKEYED] = Field(1024, ge=64)
    """Memory a verifier process may take beyond what it needs to start, in MiB."""

    @model_validator(mode="after")
    def _components_named_apart(self) -> Self:
        names = [component.name for component in self.components]
        if not names:
            raise ValueError("components must not be empty")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two components are named {', '.join(twice)}; give each its own `name`")
        return self

    @model_validator(mode="after")
    def _one_answer_and_one_cut_into_steps(self) -> Self:
        kinds = [component.kind for component in self.components]
        if kinds.count("steps") > 1:
            raise ValueError(
                "two components of kind `steps`; an output is cut into steps once, and has one reward for each"
            )
        if set(kinds) == {"overlong"}:
            raise ValueError("`overlong` alone rewards silence; add a component that reads the answer")
        return self
