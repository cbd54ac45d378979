"""Check, before the first update, that the first step's outputs and rewards hold something that the method can learn from.

Nothing is sampled for it: it reads the tables that the first update learns from. A run that fails here has updated nothing;
with another configuration it reuses all that the change leaves as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, assert_never

from flows.config import IterativeRLConfig, PreflightConfig
from pipeline.events import PreflightDone, emit
from pipeline.store import PrunedArtifactError
from stages.advantage import (
    AdvantageConfig,
    BatchConfig,
    CorrectConfig,
    GAEConfig,
    GroupConfig,
    OneConfig,
    PairsConfig,
    TeacherConfig,
)
from stages.join import KEY, align
from stages.reward import AccuracyConfig
from stages.tables import Rewards, Rollouts

_UNREAD: Final = ("truncated", "unparseable", "timeout", "error")
"""Statuses that say nothing about the answer."""
_REPEATED: Final = 10
"""One output in so many is a cause worth naming."""
_ENDING: Final = 60
"""Characters of an output that an error shows."""

Row = Mapping[str, Any]


class NoSignalError(ValueError):
    """The first outputs hold nothing to learn from; the text says why, and which settings to change."""


@dataclass(frozen=True)
class Findings:
    """What the first step's rewards hold."""

    statuses: Counter[str]
    """Outputs by status."""
    questions: int
    equal: int
    """Questions whose outputs all have the same reward (zero variance); outputs without a reward do not count."""
    silent: int
    """Questions that the method learns nothing from: of equal rewards (for process supervision, step rewards) where groups are
    compared, without a right output (RFT), without a pair (DPO), and all of them where the batch has one reward (PPO)."""

    @property
    def outputs(self) -> int:
        """Return the number of outputs."""
        return self.statuses.total()

    @property
    def unreadable(self) -> int:
        """Return the number of outputs whose answer was not read."""
        return sum(self.statuses[status] for status in _UNREAD)

    def metrics(self) -> dict[str, float]:
        """Return shares, under the names that the steps have them by."""
        shares = {f"reward/status_{status}": self.statuses[status] / self.outputs for status in _UNREAD}
        return shares | {"reward/frac_degenerate_groups": self.equal / self.questions}

    def __str__(self) -> str:
        shown = [name for name in _UNREAD if self.statuses[name] or name in ("truncated", "unparseable")]
        counts = ", ".join(f"{self.statuses[name]} {name}" for name in shown)
        silent = f", nothing to learn from {self.silent}" if self.silent != self.equal else ""
        return f"{counts} of {self.outputs}; equal rewards in {self.equal} of {self.questions} questions{silent}"


def preflight(config: IterativeRLConfig, outputs: Rollouts, rewards: Rewards | None, step: int) -> None:
    """Report what the first step has to learn from, and stop where it is nothing. Without rewards there is nothing to examine.

    Metrics of step 0: `reward/status_<status>` of the outputs without a verdict, `reward/frac_degenerate_groups`.

    Raises:
        NoSignalError: a share is at its limit; says what to change.
    """
    if step > 0 or rewards is None:
        return
    try:
        rows = rewards.rows()
    except PrunedArtifactError:
        return  # it was examined when it was new
    found = examine(rows, config.advantage)
    emit(PreflightDone(0, str(found), found.metrics()))
    complaints = [*_unread(config, found, rows, outputs), *_silent(config, found, rows)]
    if complaints:
        raise NoSignalError(
            "\n  ".join(["before the first update there is nothing to learn from:", *complaints])
            + "\n  (the limits are preflight.truncated, .unreadable and .without_signal; null switches one off)"
        )


def examine(rows: Sequence[Row], advantage: AdvantageConfig) -> Findings:
    """Return what the rows of `Rewards` hold for a kind of advantage; raise ValueError where there are none."""
    if not rows:
        raise ValueError("expected the rewards of the first step's outputs, found none")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["question_id"], []).append(row)
    statuses = Counter[str](row["status"] for row in rows)
    equal = sum(not _differ(group) for group in groups.values())
    return Findings(statuses, len(groups), equal, _count_silent(list(groups.values()), advantage))


def _count_silent(groups: Sequence[Sequence[Row]], advantage: AdvantageConfig) -> int:
    match advantage:
        case OneConfig() | TeacherConfig():
            return 0
        case CorrectConfig():
            return sum(True not in _verdicts(group) for group in groups)
        case PairsConfig():
            return sum(_verdicts(group) != {True, False} for group in groups)
        case GroupConfig(supervision="process"):
            return sum(len({step for row in group for step in row["step_rewards"] or ()}) < 2 for group in groups)
        case GroupConfig():
            return sum(not _differ(group) for group in groups)
        case BatchConfig(baseline="group_mean"):
            return 0 if any(map(_differ, groups)) else len(groups)
        case BatchConfig() | GAEConfig():
            return 0 if _differ([row for group in groups for row in group]) else len(groups)
        case _:
            assert_never(advantage)


def _differ(rows: Sequence[Row]) -> bool:
    return len({row["reward"] for row in rows if row["reward"] is not None}) > 1


def _verdicts(rows: Sequence[Row]) -> set[bool]:
    """Return whether outputs that have a reward are right."""
    return {row["status"] == "ok" for row in rows if row["reward"] is not None}


def _unread(config: IterativeRLConfig, found: Findings, rows: Sequence[Row], outputs: Rollouts) -> Iterator[str]:
    """Say what is wrong with outputs that could not be read, the most frequent cause first."""
    advice = {
        "truncated": f"cut at rollout.max_output_tokens={config.rollout.max_output_tokens}: raise it, have the initial policy "
        "learn to end (sft), or score them as they stand (reward.truncated=as_is)",
        "unparseable": f"without an answer{_where(config)}: set reward.components to what the policy writes, or have it learn "
        "the form (sft, prompt)",
        "timeout": f"not scored within the deadline (reward.deadline_s={config.reward.deadline_s:g}, or that of your "
        "function): raise it",
        "error": "not scored for an error: fix what the warnings before this one name",
    }
    for status in _causes(config.preflight, found):
        ending = f"; the first ends like {_ending(rows, outputs, status)!r}" if status in _UNREAD[:2] else ""
        yield f"{found.statuses[status]} of {found.outputs} outputs are {advice[status]}{ending}"


def _causes(limits: PreflightConfig, found: Findings) -> list[str]:
    """Return the statuses to name, the most frequent first; they explain a lack of signal where most outputs have them."""
    silent = _reaches(found.silent, found.questions, limits.without_signal)
    unread = _reaches(found.unreadable, found.outputs, limits.unreadable)
    if unread or (silent and 2 * found.unreadable > found.outputs):
        frequent = [status for status, count in found.statuses.most_common() if _REPEATED * count >= found.outputs]
        return [status for status in frequent if status in _UNREAD]
    return ["truncated"] if _reaches(found.statuses["truncated"], found.outputs, limits.truncated) else []


def _silent(config: IterativeRLConfig, found: Findings, rows: Sequence[Row]) -> Iterator[str]:
    """Say why the method learns nothing from outputs, readable or not."""
    if not _reaches(found.silent, found.questions, config.preflight.without_signal):
        return
    shown = f"{found.silent} of {found.questions} questions"
    if all(row["reward"] is None for row in rows):
        yield f"no output has a reward: see reward.truncated={config.reward.truncated} and the components' `missing`"
        return
    match config.advantage:
        case CorrectConfig():
            yield f"no right output for {shown}, and {config.update.objective.kind} learns from right ones: {_EASIER}"
        case PairsConfig():
            yield f"no pair of a right and a wrong output for {shown}: {_difficulty(_verdicts(rows))}"
        case _:
            why = _difficulty(_verdicts(rows))
            if config.reward_model is not None:
                why = "the reward model tells no outputs apart; train it longer or on more questions (reward_model)"
            yield f"equal rewards for all outputs that are compared, in {shown}: {why}"


_EASIER: Final = "take easier questions, or an initial policy that solves some (sft)"
_MIXED: Final = "raise rollout.G or rollout.temperature, or take questions that the policy solves sometimes"


def _difficulty(verdicts: set[bool]) -> str:
    """Say what to change, by whether outputs are right: some, all or none."""
    if verdicts == {True}:
        return "all outputs are right; take harder questions"
    return _MIXED if True in verdicts else f"no output is right; {_EASIER}"


def _reaches(count: int, of: int, limit: float | None) -> bool:
    return limit is not None and count >= limit * of


def _where(config: IterativeRLConfig) -> str:
    """Say where the rule that gives the status looked for an answer."""
    reading = [component for component in config.reward.components if isinstance(component, AccuracyConfig)]
    return f" by the conventions ({', '.join(reading[0].conventions)})" if reading else ""


def _ending(rows: Sequence[Row], outputs: Rollouts, status: str) -> str:
    """Return the end of the first output of a status."""
    first = next(row for row in rows if row["status"] == status)
    wanted = Rewards.conform([first]).select(list(KEY))
    text: str = align(wanted, outputs.read([*KEY, "text"]), "outputs", to="rewards", extra=True)["text"][0].as_py()
    return text[-_ENDING:]
