"""What a reward consists of: named, weighted components and the treatment of what has no score."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config import UNKEYED, Config
from stages.reward.rules.accuracy import Verifier
from stages.reward.rules.extraction import Convention
from stages.reward.rules.form import Form

__all__ = ["AccuracyConfig", "ComponentConfig", "FormatConfig", "Missing", "RewardConfig"]

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


ComponentConfig = Annotated[AccuracyConfig | FormatConfig, Field(discriminator="kind")]


class RewardConfig(Config):
    """The reward of an output: the weighted sum of its components."""

    components: tuple[ComponentConfig, ...] = (AccuracyConfig(),)
    """What is scored. The row's status is that of the first accuracy component."""
    truncated: Literal["as_unparseable", "as_is", "no_reward"] = "as_unparseable"
    """Outputs cut at the length limit (`finish_reason: length`); the paper is silent. `as_unparseable`: every component
    scores 0, status `truncated`. `as_is`: scored like any other text. `no_reward`: null, out of the group's statistics
    and out of the loss."""
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
