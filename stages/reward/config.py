"""What a reward consists of: named, weighted components and the treatment of what has no score."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.config import UNKEYED, Config
from pipeline.workers.functions import NAME_OF_A_FUNCTION, find_source
from stages.reward.rules.accuracy import Verifier
from stages.reward.rules.extraction import Convention, Mark
from stages.reward.rules.format import Form
from stages.reward_metrics import RESERVED

Missing = Literal["no_reward", "zero", "rescale"]
Column = Literal["question_id", "sample", "question", "answer", "solution", "finish_reason", "completion_mask"]
_NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"


class AccuracyConfig(Config):
    """Answer accuracy: 1 where the stated answer equals the gold answer, else 0; none where the verifier gave up."""

    kind: Literal["accuracy"] = "accuracy"
    "Selects the comparison of answers."
    name: str = Field("accuracy", pattern=_NAME)
    """Name of the component in the table and of its metric, `reward/<name>`."""
    weight: float = 1.0
    """Factor in the sum. The paper's rule reward is accuracy alone."""
    conventions: tuple[Convention, ...] = ("boxed", "tags", "hashes", "line", "phrase", "number")
    """Where an answer may stand, by preference: `\\boxed{}`, `<answer>` tags, `####`, a line `A:`, "the answer is",
    or nothing but a number."""
    mark: Mark = "last"
    """Of several marks of one convention the last or the first. Last: what a model says at the end is its answer. First: for a
    policy that goes on to a next question of its own (`#### 42`, then `Question: ... #### 7`) and has no stop string."""
    verifier: Verifier = "math_verify"
    """`exact`: rational numbers and equal strings only, no process is ever started. `math_verify`: symbolic comparison of
    what `exact` leaves open; a formula is read whole or not at all. `math_verify_search`: all that `math_verify` accepts and,
    where the conventions find no answer or only a sentence, math-verify's own search through the last 4 KiB, which may take
    any number from there (lenient: for evaluation, not for training)."""
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
    "Selects the check of the form."
    name: str = Field("format", pattern=_NAME)
    """Name of the component in the table and of its metric, `reward/<name>`."""
    weight: float = 0.1
    """Factor in the sum. Not from the paper: small against accuracy, so that form never pays more than being right."""
    form: Form = "hashes"
    """`hashes`: ends with one line `#### <number>`; `boxed`: exactly one `\\boxed{}`; `line`: ends with `A: <answer>`;
    `pattern`: `pattern` is found."""
    pattern: str | None = None
    """Regular expression for `form: pattern`, looked for in the last 4 KiB. One with groups or several repetitions may
    backtrack for ever, and runs in the reward's worker processes under its deadline."""
    missing: Missing = "no_reward"
    """As for accuracy; only a pattern can have no verdict (status `timeout`)."""

    @model_validator(mode="after")
    def _pattern_with_its_form(self) -> Self:
        if (self.form == "pattern") != (self.pattern is not None):
            raise ValueError("`pattern` belongs to `form: pattern`, and only there")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"pattern is not a regular expression: {error}") from None
        return self


class LanguageConfig(Config):
    """Language coherence: 1 where the output is in its question's script, unmixed and not caught in a loop, else 0.

    Scripts are those of Unicode: English differs from Chinese, not from French. Digits, operators, LaTeX, code, single letters
    and the question's own words belong to every language; an empty output to none. The limits are ours; they pass all 2,001
    right answers among OpenAI's sampled GSM8K solutions, with at most 0, 2 and 4.0 in the order of the fields below.
    """

    kind: Literal["language"] = "language"
    """Discriminator."""
    name: str = Field("language", pattern=_NAME)
    """Name of the component in the table and of its metric, `reward/<name>`."""
    weight: float = 0.1
    """Factor in the sum. Not from the paper: small against accuracy, as for format."""
    max_foreign: float = Field(0.15, ge=0, le=1)
    """Largest share of words in another script; a Chinese character counts as a word. Ours: a unit or a name that the question
    does not have may stand in a short Chinese sentence."""
    max_run: int = Field(4, ge=1)
    """How often a passage of up to 24 words (numbers included, but not by themselves) may be repeated in a row."""
    max_compression: float = Field(6.0, gt=1)
    """Characters per compressed byte in the most repetitive 2,048 characters (zlib): 2-3 in prose, 10 and more in loops."""
    missing: Missing = "no_reward"
    """As for accuracy; coherence is always decidable."""


class FunctionConfig(Config):
    """Your own reward, with TRL's signature: `def reward(prompts, completions, **columns) -> list[float | None]`.

    The function gets lists of equal length, by name: `prompts` (the questions' texts), `completions` (the outputs' texts),
    `completion_ids` and each of `columns`; truncated outputs only with `truncated: as_is`. It answers with a list, tuple or
    one-dimensional array of one number for each completion, None for no score; `async def` is awaited. Any other answer ends
    the run, whatever `reward.max_errors`: a score is never taken for several outputs. It runs in worker processes that are
    killed at the deadline and under the memory limit; what it prints goes to stderr, and what it starts ends with them.
    Running a config that names a function runs code, with your rights: read a config that is not yours before you run it.
    """

    kind: Literal["function"] = "function"
    """Discriminator."""
    name: str = Field("function", pattern=_NAME)
    """Name of the component in the table and of its metric, `reward/<name>`."""
    weight: float = 1.0
    """Factor in the sum."""
    function: str = Field(pattern=NAME_OF_A_FUNCTION)
    """`module:name`; the module is looked for where Python imports from, then in the working directory. The content of the
    module's file is part of the cache key; that of what it imports is not."""
    columns: tuple[Column, ...] = ("question_id", "question", "answer", "solution")
    """What else the function gets; `solution` is None where the question has none. `completion_mask` has 1 for each of
    `completion_ids` that the policy wrote, 0 for one of an environment."""
    conversational: bool = False
    """Whether `prompts` and `completions` are lists of messages, as TRL passes those of conversational data sets: a prompt is
    `[{role: user, content: ...}]`, a completion `[{role: assistant, content: ...}]`."""
    together: Literal["output", "question", "batch"] = "output"
    """What a call must hold whole for the scores to be what is meant. `output`: each row is scored by itself, and a call has at
    most 16. `question`: a row's score depends on the other outputs of its question. `batch`: on all rows; one call, as in TRL.
    A call that fails is repeated in halves, down to this unit, so that one bad row does not cost the others; a unit that fails
    alone costs all of its rows their score."""
    deadline_s: Annotated[float, UNKEYED] = Field(10.0, gt=0)
    """Seconds for one call, of however many rows; the import of the module does not count."""
    patience_s: Annotated[float, UNKEYED] = Field(60.0, ge=0)
    """Seconds that repeated calls may take in all. Where they do not suffice, the rows that are left keep the fault of the call
    they were in."""
    missing: Missing = "no_reward"
    """A row without score (None; with `reward.max_errors`, also a failure), as for accuracy."""

    def key(self) -> dict[str, Any]:
        """Return the key, with the content of the file that holds the function.

        Raises:
            ConfigError: no such module, with where it was looked for.
        """
        return super().key() | {"source": find_source(self.function).digest}


class StepsConfig(Config):
    """Process labels of the built-in world: one reward per line, exact by its checker (DeepSeekMath, 4.1.3, in the place of a
    process reward model). Its own score is the share of credited lines.

    How steps are cut the paper does not say; here a step is a line with its newline. index(j) is the token that completes it,
    that of the last step the last token of the output, its end of sequence included. Empty lines belong to the step that
    follows, or to the last; an output without any line is one step of reward 0.
    """

    kind: Literal["steps"] = "steps"
    """Discriminator."""
    name: str = Field("steps", pattern=_NAME)
    """Name of the component in the table and of its metric, `reward/<name>`: the mean of all step rewards."""
    weight: float = 0.0
    """Factor of the share of credited lines in the outcome reward. 0: steps are for process supervision, and the outcome
    reward stays what it was."""
    credit: Literal["right", "consistent"] = "right"
    """What r^index(j) = 1 means, else 0. `right`: the line is the true one at its place. `consistent`: it follows from
    what the output wrote before, right or not, so that one slip does not take the credit of every later line."""
    missing: Missing = "no_reward"
    """As for accuracy; a line is always decidable."""


class OverlongConfig(Config):
    """Soft punishment of long outputs (DAPO: Yu et al. 2025, arXiv 2503.14476, Eq. 13); not from the paper.

    0 up to max_tokens - buffer_tokens, then ((max_tokens - buffer_tokens) - |o|) / buffer_tokens, and -1 from max_tokens on.
    |o| counts what the policy wrote, not what an environment answered.
    """

    kind: Literal["overlong"] = "overlong"
    """Discriminator."""
    name: str = Field("overlong", pattern=_NAME)
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


ComponentConfig = Annotated[
    AccuracyConfig | FormatConfig | LanguageConfig | FunctionConfig | StepsConfig | OverlongConfig,
    Field(discriminator="kind"),
]


class ThinkingConfig(Config):
    """Where a reasoning model thinks: what is between the tags is not its answer."""

    tags: tuple[str, str] = ("<think>", "</think>")
    """What opens and what closes the thinking. Only what follows the last closing tag is read; where the thinking is not
    closed, nothing behind its beginning is."""
    opened_by_prompt: bool = False
    """Whether the prompt's template ends in the opening tag: then an output without either tag is thinking throughout."""

    @model_validator(mode="after")
    def _two_tags(self) -> Self:
        if not all(tag.strip() for tag in self.tags) or self.tags[0] == self.tags[1]:
            raise ValueError(
                f"expected two different tags that are not blank, found {self.tags[0]!r} and {self.tags[1]!r}"
            )
        return self


class RewardConfig(Config):
    """The reward of an output: the weighted sum of its components."""

    components: tuple[ComponentConfig, ...] = (AccuracyConfig(),)
    """What is scored. The row's status is that of the first accuracy component, else of the first component."""
    truncated: Literal["as_unparseable", "as_is", "no_reward"] = "as_unparseable"
    """Outputs cut at the length limit (`finish_reason: length`); the paper is silent. `as_unparseable`: every component
    that reads text scores 0, status `truncated`; their length is punished and their lines keep their labels, the broken one
    is scored as it is. `as_is`: scored like any other text. `no_reward`: null, out of the group's statistics and out of
    the loss, no step rewards either."""
    reads: Literal["all", "last_characters"] = "all"
    """What accuracy and format (but for `pattern`) read of an output. `all`: as graders elsewhere do; the cost is linear in the
    length. `last_characters`: its end only, so that an answer must be stated there."""
    last_characters: int | None = Field(None, ge=1)
    """How many, with `reads: last_characters`; 4,096 where nothing is said."""
    thinking: ThinkingConfig | None = None
    """Tags whose content accuracy and format do not read (a `pattern` does: it may look for them). None: an answer in the
    thinking counts like any other."""
    workers: Annotated[int, UNKEYED] = Field(2, ge=1)
    """Worker processes of the verifier, started only when an answer needs more than exact comparison, and of each reward
    function."""
    deadline_s: Annotated[float, UNKEYED] = Field(3.0, gt=0)
    """Seconds for one comparison, from its start in a worker to its end: one that misses it is killed and not tried again.
    Comparisons take milliseconds, so that the load of the machine does not decide."""
    memory_mb: Annotated[int, UNKEYED] = Field(1024, ge=64)
    """Memory a worker process may take beyond what it needs to start, in MiB."""
    max_errors: Annotated[float, UNKEYED] = Field(0.0, ge=0, le=1)
    """Share of the outputs it was called with that a reward function may fail on (an exception, a missed deadline, no finite
    number). Beyond it the run stops before the rewards are written, and the same command asks for all of them again: a service
    that was down is no verdict. Not part of the key; stored rewards with more failures are refused. Verdicts of verifier and
    patterns are not meant: their faults come from the text they read, and stay with it (`missing`)."""

    @model_validator(mode="after")
    def _readers_for_what_is_read(self) -> Self:
        if self.last_characters is not None and self.reads == "all":
            raise ValueError(
                f"last_characters is {self.last_characters}, and reads: all takes the whole output; set reads: last_characters"
            )
        reading = [
            c
            for c in self.components
            if isinstance(c, AccuracyConfig) or (isinstance(c, FormatConfig) and c.form != "pattern")
        ]
        if not reading and (self.thinking is not None or self.reads != "all"):
            raise ValueError(
                "`reads` and `thinking` are for accuracy and format (but for `pattern`); no such component is there"
            )
        return self

    @model_validator(mode="after")
    def _components_named_apart(self) -> Self:
        names = [component.name for component in self.components]
        if not names:
            raise ValueError("components must not be empty")
        if reserved := [name for name in names if name in RESERVED]:
            raise ValueError(
                f"a component is named {reserved[0]!r}, and reward/{reserved[0]} is another metric; choose another `name`, "
                f"none of {', '.join(sorted(RESERVED))}"
            )
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
