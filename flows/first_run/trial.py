"""Choose a prompt by what a few groups sampled with each score, and sizes by planning the run: memory first, then patience."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from flows.algorithm.data import limit_data, prepare_data
from flows.algorithm.models import base_model
from flows.algorithm.preflight import Findings, examine
from flows.algorithm.sampling import derived_seed
from flows.config import IterativeRLConfig
from flows.planning.plan import Plan, plan_of, remedy_for
from flows.planning.request import Request, room_for_checkpoint, subject_of
from flows.runs.paths import Places
from flows.wording import size
from pipeline.config import ConfigError
from stages.data import sample_batch
from stages.join import KEY, align
from stages.reward import AccuracyConfig, score
from stages.reward.rules.extraction import find_answer
from stages.rollout import rollout
from stages.tables import Rewards, Rollouts
from stages.text import PromptConfig

_FORM: Final = "Think in one or two short sentences. End with `The answer is` and the answer."
_EXAMPLES: Final = (
    "Here is how to answer.\nQuestion: What is 2 plus 5?\nThe answer is 7.\nQuestion: There were 9 cups and 4 broke. How many "
    "are left?\nThe answer is 5.\nAnswer this question in the same way."
)
"""Small models copy a form that they see more often than one that is described."""
_COOL: Final = 0.6
"""Temperature for small models, whose outputs at 1 are often noise; ours."""
_ENOUGH: Final = 0.5
"""Share of questions with a signal at which no other prompt is tried; ours."""
_CPU: Final = ((16, 8), (8, 8), (8, 4), (4, 4))
"""Questions and outputs of each, from the most; below four outputs most groups have equal rewards. Ours."""
_GPU: Final = ((64, 16), (64, 8), (32, 8), (16, 8), (8, 8))
_FEWEST_STEPS: Final = 8
"""Steps that should fit into the time given, before more outputs a step are worth it; ours."""
_MOST_STEPS: Final = 200


@dataclass(frozen=True)
class Trial:
    """What a model answers under a prompt."""

    prompt: PromptConfig
    temperature: float
    findings: Findings
    right: int
    lengths: tuple[int, ...]
    """Tokens of the outputs that ended by themselves."""
    mean_length: float
    """Tokens of an output, cut ones included."""
    prompt_tokens: float
    conventions: Counter[str]
    """Outputs by the convention that reads their answer; those without an answer are in none."""
    example: str
    """An output, one with a reward where there is one."""

    @property
    def signal(self) -> float:
        """Return the share of questions whose outputs have unequal rewards."""
        return 1 - self.findings.silent / self.findings.questions

    @property
    def rank(self) -> tuple[float, ...]:
        """Return what the better of two prompts has more of: signal, right outputs, readable ones; then the shorter outputs."""
        mean = sum(self.lengths) / len(self.lengths) if self.lengths else float("inf")
        return (self.signal, self.right, -self.findings.unreadable, -mean)

    def __str__(self) -> str:
        read = ", ".join(f"{count} as {name}" for name, count in self.conventions.most_common())
        return f"{self.right} of {self.findings.outputs} right; {self.findings}" + (
            f"; answers read: {read}" if read else ""
        )


class Candidate(NamedTuple):
    """What is tried."""

    prompt: PromptConfig
    temperature: float = 1.0


def candidates_for(*, chat: bool, numbers: bool, chinese: bool, able: bool) -> list[Candidate]:
    """Return the prompts and temperatures to try: the paper's, and what small models follow more often.

    Args:
        chat: the tokenizer has a chat template; without one the question is continued.
        numbers: all answers are numbers.
        able: the paper's prompt, which asks for long answers, comes first; else last.
    """
    paper: Any = "deepseek_math_zh" if chinese else "deepseek_math_en"
    if not chat:
        plain = {"prefix": "Question: ", "suffix": "\nAnswer:"}
        return [Candidate(PromptConfig(**plain)), Candidate(PromptConfig(template=paper, **plain), _COOL)]
    long = [Candidate(PromptConfig(chat="tokenizer", template=paper))]
    shown = PromptConfig(chat="tokenizer", instruction=_EXAMPLES, instruction_at="before")
    described = PromptConfig(chat="tokenizer", instruction=_FORM)
    brief = [Candidate(described, _COOL)]
    if numbers:
        brief.append(Candidate(shown, _COOL))
    brief = [] if chinese else brief
    return [*long, *brief] if able else [*brief, *long]


def try_prompts(config: IterativeRLConfig, candidates: Sequence[Candidate]) -> Iterator[Trial]:
    """Sample the first step's questions with each prompt, until half of them have a signal.

    The stages of a run do it, in the current store, where the run finds the model again.
    """
    data = prepare_data(config.data)
    base = base_model(config, data)
    for prompt, temperature in candidates:
        tried = config.override({"prompt": prompt.model_dump(mode="json"), "rollout.temperature": temperature})
        train = limit_data(tried, data, base).train
        questions = sample_batch(train, size=config.questions_per_step, step=0, seed=config.seed)
        outputs = rollout(base, questions, prompt, tried.rollout, seed=derived_seed(config.seed, "init"))
        yield (trial := _trial(tried, outputs, score(outputs, questions, tried.reward)))
        if trial.signal >= _ENOUGH:
            break


def _trial(config: IterativeRLConfig, outputs: Rollouts, rewards: Rewards) -> Trial:
    rows = rewards.rows()
    columns = ["text", "finish_reason", "output_ids", "prompt_ids"]
    sampled = align(rewards.read(list(KEY)), outputs.read([*KEY, *columns]), "outputs", to="rewards").to_pylist()
    right = [row["status"] == "ok" for row in rows]
    read = [output for row, output in zip(rows, sampled, strict=True) if row["status"] in ("ok", "wrong")]
    return Trial(
        prompt=config.prompt,
        temperature=config.rollout.temperature,
        findings=examine(rows, config.advantage),
        right=sum(right),
        lengths=tuple(len(output["output_ids"]) for output in sampled if output["finish_reason"] == "stop"),
        mean_length=sum(len(output["output_ids"]) for output in sampled) / len(sampled),
        prompt_tokens=sum(len(output["prompt_ids"]) for output in sampled) / len(sampled),
        conventions=Counter(name for output in read for name in _convention(output["text"])),
        example=sampled[right.index(True) if True in right else 0]["text"],
    )


def _convention(text: str) -> Sequence[str]:
    """Return the first convention of the default ones that finds an answer."""
    names = AccuracyConfig().conventions
    return [name for name in names if find_answer(text, (name,)) is not None][:1]


@dataclass(frozen=True)
class Sizes:
    """What a run is to have, and its plan."""

    settings: Mapping[str, Any]
    """By dotted key."""
    plan: Plan
    remedies: tuple[str, ...]
    """What was changed so that it fits the memory, in words."""


def sizes_for(config: IterativeRLConfig, places: Places, request: Request, *, questions: int, minutes: float) -> Sizes:
    """Return the largest step that fits the memory, and several times into the minutes.

    Raises:
        ConfigError: nothing fits the memory, or no checkpoint fits the disk.
    """
    subject = subject_of(config, places, request)
    if lacking := room_for_checkpoint(subject):
        raise ConfigError(lacking)
    last: Sizes | None = None
    for asked, group in _GPU if subject.given.gpu else _CPU:
        settings: dict[str, Any] = {"questions_per_step": min(asked, questions), "rollout.G": group}
        made = plan_of(replace(subject.given, config=subject.given.config.override(settings)))
        taken, made = remedy_for(made)
        if made.missing > 0:
            continue
        for change in taken:
            settings |= change.settings
        last = Sizes(settings, made, tuple(change.text for change in taken))
        if _steps(made, minutes) >= _FEWEST_STEPS:
            break
    if last is None:
        least = plan_of(subject.given)
        raise ConfigError(
            f"the model does not fit: the smallest step needs more than the {size(subject.given.machine.memory)} of this "
            f"machine, and a step of {config.questions_per_step} x {config.rollout.G} outputs {size(least.peak)}; take a "
            "smaller model"
        )
    settings = {**last.settings, "steps": max(1, min(_MOST_STEPS, _steps(last.plan, minutes)))}
    made = plan_of(replace(subject.given, config=subject.given.config.override(settings)))
    return replace(last, settings=settings, plan=made)


def _steps(plan: Plan, minutes: float) -> int:
    """Return how many steps the minutes hold, less what is done once and the evaluations."""
    step, _ = plan.of_a_step()
    rest = plan.seconds - step * plan.counts["step"]
    return int(max(0.0, 60 * minutes - rest) / step)
