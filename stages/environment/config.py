"""Settings of environments. Each names the texts that complete a call: where an output stops, and waits for its answer."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from pipeline.config import Config


class CalculatorConfig(Config):
    """A calculator with exact fractions: `[347*290-118]` is answered by `=100512` and the end of the line."""

    kind: Literal["calculator"] = "calculator"
    "Selects the calculator."
    opens: str = Field("[", min_length=1)
    """Text that begins a call."""
    closes: str = Field("]", min_length=1)
    """Text that completes it. What stands between the last `opens` of a turn and this is calculated: numbers, + - * / and
    parentheses."""
    before_answer: str = "="
    """What the environment writes before the result."""
    after_answer: str = "\n"
    """What it writes behind the result."""
    max_calls: PositiveInt = 4
    """Calls of an output that are answered, at most; the output ends cut (`length`) at one more."""
    max_observation: PositiveInt = 256
    """Characters of a result, at most; of a longer one the beginning is kept, and `...` stands for the rest."""

    @property
    def call_ends(self) -> tuple[str, ...]:
        """Return the texts that complete a call."""
        return (self.closes,)

    @model_validator(mode="after")
    def _a_call_has_two_ends(self) -> Self:
        if self.opens == self.closes:
            raise ValueError(f"closes: expected another text than opens, found {self.closes!r} for both")
        return self


EnvironmentConfig = CalculatorConfig
"""What answers calls."""
