"""Settings of environments. Each names the texts that complete a call: where an output stops, and waits for its answer."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipeline.config import UNKEYED, Config, ConfigError
from pipeline.workers.functions import NAME_OF_A_FUNCTION, FunctionSource, find_source

VERIFIERS: Final = "0.1.10"
"""The package's version: later ones up to 0.3 want other versions of what Cohort uses, and 0.4 has no `env_response`."""

OPENENV: Final = "0.2.1"
"""The package's version: later ones want other versions of what Cohort uses."""


class CallsConfig(Config):
    """Calls of outputs."""

    max_calls: PositiveInt = 4
    """Calls of an output that are answered, at most; the output ends cut (`length`) at one more."""


class MarkedCallsConfig(CallsConfig):
    """Calls between two texts."""

    opens: str = Field(min_length=1)
    """Text that begins a call."""
    closes: str = Field(min_length=1)
    """Text that completes it. The call is what stands between the last `opens` of a turn and this."""

    @property
    def call_ends(self) -> tuple[str, ...]:
        """Return the texts that complete a call."""
        return (self.closes,)

    @model_validator(mode="after")
    def _a_call_has_two_ends(self) -> Self:
        if self.opens == self.closes:
            raise ValueError(f"closes: expected another text than opens, found {self.closes!r} for both")
        return self


class AnsweredConfig(Config):
    """Answers between two texts."""

    before_answer: str
    """What the environment writes before an answer."""
    after_answer: str
    """What it writes behind it."""
    max_observation: PositiveInt = 1000
    """Characters of an answer, at most; of a longer one the beginning is kept, and `...` stands for the rest."""


class MarkedConfig(MarkedCallsConfig, AnsweredConfig):
    """Calls and answers between texts."""


class HermesConfig(MarkedConfig):
    """Calls and answers between texts as Hermes and Qwen have them, but for the turns of a chat template."""

    opens: str = Field("<tool_call>", min_length=1)
    closes: str = Field("</tool_call>", min_length=1)
    before_answer: str = "\n<tool_response>\n"
    after_answer: str = "\n</tool_response>\n"


class CalculatorConfig(MarkedConfig):
    """A calculator with exact fractions: `[347*290-118]` is answered by `=100512` and the end of the line."""

    kind: Literal["calculator"] = "calculator"
    "Selects the calculator. It knows numbers, + - * / and parentheses."
    opens: str = Field("[", min_length=1)
    closes: str = Field("]", min_length=1)
    before_answer: str = "="
    after_answer: str = "\n"
    max_observation: PositiveInt = 256


class PythonConfig(MarkedConfig):
    """Python in a sandbox. By default in the form of ToRA (arXiv 2309.17452): the policy writes ```` ```python ````, a program,
    ```` ``` ```` and ```` ```output ````, at which it stops; the environment writes what was printed and closes the block.

    The value of a last expression is printed, as in a notebook. A program has no network, no file but Python's own, read-only,
    and an empty folder of 16 MiB, no environment, 24 processes, and what it started ends with it. Time and memory of an answer
    include the output's earlier programs, which run again to make their variables.
    """

    kind: Literal["python"] = "python"
    "Selects Python."
    opens: str = Field("```python\n", min_length=1)
    closes: str = Field("```output", min_length=1)
    before_answer: str = "\n"
    after_answer: str = "\n```\n"
    deadline: PositiveFloat = 5.0
    """Seconds that an answer may take."""
    memory_mb: PositiveInt = 512
    """MiB that a process of a program may allocate, and that all of them may take together."""
    sandbox: Literal["namespaces", "limits"] = "namespaces"
    """`namespaces`: user, mount, PID, network and IPC namespaces of Linux, without capabilities, with a filter of system calls
    (seccomp). `limits`: none, for systems that do not allow them: a program has the rights, files and network of who runs this;
    time and memory are limited alone."""


class FunctionConfig(CallsConfig, AnsweredConfig):
    """Your own environment: `def answer(question, turns, calls) -> str | Mapping`, called once for each call of an output.

    The function gets, by name, the row of the question (a mapping: `question_id`, `question`, `answer`, `solution`), the texts
    of the output's turns, of which the last ends in the call, and its earlier calls (mappings: `tool`, `input`, `output`,
    `observation`, `status`). It answers with a text, or with a mapping: the text `observation` and, where needed, `done` (true
    ends the output), `status` (`ok`, `error`, `timeout`, `memory`, `refused`), `input` and `output` for the record. Any other
    answer ends the run. `async def` is awaited.

    Nothing is kept between calls: a function that needs a state makes it from its arguments, so that a resumed run asks nothing
    twice. Eight calls run side by side, in worker processes that are killed at the deadline and under the memory limit; what
    one raises is what the policy reads. Running a config that names a function runs code, with your rights: no sandbox.
    """

    kind: Literal["function"] = "function"
    "Selects a function of yours."
    function: str = Field(pattern=NAME_OF_A_FUNCTION)
    """`module:name`; the module is looked for where Python imports from, then in the working directory. The content of the
    module's file is part of the cache key; that of what it imports is not."""
    call_ends: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    """Texts that complete a call, such as `</tool>`."""
    before_answer: str = "\n"
    after_answer: str = "\n"
    deadline: PositiveFloat = 5.0
    """Seconds that a call may take; the import of the module does not count."""
    memory_mb: PositiveInt = 1024
    """MiB that a worker may take beyond what it needs to start."""

    @model_validator(mode="after")
    def _each_end_ends_a_call(self) -> Self:
        for end in self.call_ends:
            if other := next((other for other in self.call_ends if other != end and other in end), None):
                raise ValueError(f"call_ends: {other!r} ends a call before {end!r} is complete; remove one of them")
        return self

    def key(self) -> dict[str, Any]:
        """Return the key, with the content of the file that holds the function.

        Raises:
            ConfigError: no such module, with where it was looked for.
        """
        return super().key() | {"source": find_source(self.function).digest}


class ToolCallsConfig(MarkedCallsConfig):
    """Calls in JSON, as models of the Hermes and Qwen kind write them, each answered by a message of the role `tool`.

        <tool_call>
        {"name": "python", "arguments": {"code": "print(347 * 290)"}}
        </tool_call>

    The policy stops behind a call; what is around the answer is written by the chat template (`prompt.chat: tokenizer`), and
    `prompt.tools` shows the tools to the model.
    """

    kind: Literal["tool_calls"] = "tool_calls"
    "Selects calls in JSON, by name."
    tools: tuple[Annotated[CalculatorConfig | PythonConfig, Field(discriminator="kind")], ...] = Field(
        (PythonConfig(),), min_length=1
    )
    """Tools, each called by its kind: `python` with the argument `code`, `calculator` with `expression`."""
    opens: str = Field("<tool_call>", min_length=1)
    closes: str = Field("</tool_call>", min_length=1)

    @model_validator(mode="after")
    def _tools_differ_and_are_read(self) -> Self:
        kinds = [tool.kind for tool in self.tools]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"tools: expected each kind once, found {', '.join(kinds)}")
        for tool in self.tools:
            fields = type(tool).model_fields
            for name in ("opens", "closes", "before_answer", "after_answer", "max_calls"):
                if getattr(tool, name) != fields[name].default:
                    raise ValueError(
                        f"tools: {name} of {tool.kind} is not read here, and would have no effect; leave it out"
                    )
        return self


class VerifiersConfig(HermesConfig):
    """An environment of the package `verifiers` 0.1.10 (`pip install 'cohort-rl[verifiers]'`): a `MultiTurnEnv`, or `ToolEnv`.

    A turn of the policy becomes a message of the assistant; the observation is the text of the messages that `env_response`
    answers with. Where the environment has tools, a call is JSON as Hermes and Qwen write it, `{"name": .., "arguments": ..}`;
    any other text is `refused`, in the environment's own words. The output ends where a stop condition holds, and at an error
    of the package. The environment's rubric is not asked: rewards are those of `reward`.

    The row of the environment's own data whose last message is the question gives its prompt, answer and `info`; where there is
    none, they are made of the question. What the policy reads first is Cohort's `prompt`, not the environment's system message.
    Nothing is kept between calls: the state is made anew and earlier turns are replayed, with `random` seeded by the question.
    Running a config that names an environment runs its code, with your rights: no sandbox.
    """

    kind: Literal["verifiers"] = "verifiers"
    "Selects an environment of `verifiers`."
    name: str = Field(pattern=r"^([a-z0-9][a-z0-9_.-]*/)?[A-Za-z_][\w-]*$")
    """As `verifiers.load_environment` takes it. The module of this name, with `_` for `-`, is looked for where Python imports
    from, then in the working directory; the content of its file is part of the cache key, that of what it imports is not."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the module's own `load_environment`."""
    replay: bool = True
    """Whether earlier turns are stepped again before each new one, which makes the environment's state; another answer than the
    recorded one ends the run. False: for environments that read messages alone; no recorded call is made again."""
    deadline: PositiveFloat = 30.0
    """Seconds that an answer may take, earlier turns included."""
    memory_mb: PositiveInt = 2048
    """MiB that a worker may take beyond what it needs to start."""
    workers: Annotated[PositiveInt, UNKEYED] = 2
    """Worker processes; each imports the package, which takes seconds."""

    def source(self) -> FunctionSource:
        """Return the file of the environment's `load_environment`.

        Raises:
            ConfigError: not that version of the package, or no such module.
        """
        _require("verifiers", VERIFIERS, self.kind)
        return find_source(f"{self.name.rpartition('/')[2].replace('-', '_')}:load_environment")

    def key(self) -> dict[str, Any]:
        """Return the key, with the content of the environment's file; raise ConfigError as `source`."""
        return super().key() | {"source": self.source().digest}


class OpenEnvConfig(HermesConfig):
    """A server of OpenEnv, asked by its client (openenv-core 0.2.1: `pip install 'cohort-rl[openenv]'`).

    Each call opens a session: `reset`, the steps of the output's earlier calls that ended well, and its own. So an answer
    depends on what is recorded alone; a replayed step that is observed otherwise ends the run. `reset` gets `seed`, a number
    made of the question's id, and `question_id`, `question` and `answer`, as far as the server takes them. `done` ends the
    output. The server's rewards are not asked: rewards are those of `reward`.

    An action that the server does not take is `refused`, one that raises there an `error`. A server that is not there, or has
    no session left, stops the run before anything is recorded; the same command goes on. What runs behind the URL is not in the
    key.
    """

    kind: Literal["openenv"] = "openenv"
    "Selects a server of OpenEnv."
    url: str = Field(pattern=r"^(https?|wss?)://[^@\s]+$")
    """Its address; without a password."""
    action: str | None = None
    """Field of the action that is the text of the call; null: the call is the action, as JSON."""
    observation: str | None = None
    """Field of the observation that the policy reads; null: all of it, as JSON."""
    replay: bool = True
    """Whether earlier calls are stepped again before each new one. False: for a server without a state; no recorded call is
    made again."""
    deadline: PositiveFloat = 30.0
    """Seconds that a step may take."""
    sessions: Annotated[PositiveInt, UNKEYED] = 1
    """Calls side by side; at most as many as the server has sessions (`max_concurrent_envs`, 1 by default)."""

    def key(self) -> dict[str, Any]:
        """Return the key; raise ConfigError without that version of the package."""
        _require("openenv-core", OPENENV, self.kind)
        return super().key()


def _require(package: str, version: str, kind: str) -> None:
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        found = "none"
    if found != version:
        raise ConfigError(
            f"environment.kind={kind}: expected the package {package} {version}, found {found}; "
            f"pip install 'cohort-rl[{kind}]'"
        )


EnvironmentConfig = Annotated[
    CalculatorConfig | PythonConfig | FunctionConfig | ToolCallsConfig | VerifiersConfig | OpenEnvConfig,
    Field(discriminator="kind"),
]
"""What answers calls."""
