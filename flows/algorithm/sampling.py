"""Lines 5 to 7 of Algorithm 1: questions drawn, outputs sampled; or the other data sources of Table 10 in their place.

And whether what sampled them had the policy's weights (`Mismatches`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flows.algorithm.data import DataSets
from flows.algorithm.side_by_side import Concurrent, runs_side_by_side
from flows.config import IterativeRLConfig
from pipeline.config import ConfigError
from pipeline.events import ahead_of_its_part, count_calls
from stages.critic import estimate_values
from stages.data import sample_batch
from stages.environment import ToolCallsConfig, answer_calls
from stages.logprobs import LogprobsConfig, compare_policies, score_reference
from stages.models import Checkpoint
from stages.reward import score
from stages.rollout import RolloutConfig, continue_dialogues, rollout
from stages.selection import draw_from_band, keep_calls, keep_informative
from stages.sft import demonstrated_outputs
from stages.tables import Logprobs, Questions, ReferenceLogprobs, Rewards, Rollouts, ToolCalls, Values
from stages.training.hardware import name_of_dtype
from stages.update import DIVERGENCE, UpdateConfig, check_mismatch, staleness_limit


def derived_seed(seed: int, purpose: object) -> int:
    """Return a seed of 31 bits for one purpose (a step, `drift`), unrelated to that of any other or of another run."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:4], "big") >> 1


def sample(
    config: IterativeRLConfig, policy: Checkpoint, questions: Questions, sampling: RolloutConfig, *, seed: int
) -> tuple[Rollouts, ToolCalls | None]:
    """Sample outputs (line 7). With an environment turn by turn: its calls are answered before any output goes on.

    Every turn and every table of calls is a stage of its own, so that what was answered is never asked again. The calls are
    None without an environment alone: a step without any has metrics of calls too.
    """
    environment = config.environment
    if environment is None:
        return rollout(policy, questions, config.prompt, sampling, seed=seed), None
    ends, calls = list(environment.call_ends), None
    messages = config.prompt if isinstance(environment, ToolCallsConfig) else None
    outputs = rollout(policy, questions, config.prompt, sampling, seed=seed, call_ends=ends)
    while calls is None or outputs.metrics["rollout/waiting"]:
        calls = answer_calls(outputs, questions, calls, environment)
        if outputs.metrics["rollout/waiting"]:
            most = environment.max_calls
            outputs = continue_dialogues(
                policy, outputs, calls, sampling, call_ends=ends, max_calls=most, messages=messages
            )
    return outputs, calls


class Explored(NamedTuple):
    """Hold what a step learns from."""

    sampler: Checkpoint
    drawn: Questions | None
    """What a curriculum drew first, with its metrics; None without one."""
    questions: Questions | None
    """What the outputs are scored with; None: demonstrations."""
    outputs: Rollouts
    calls: ToolCalls | None = None
    """Calls of the outputs to their environment; None without one."""


class Exploration:
    """Make the outputs of each step: as it begins or, with `overlap`, before the update of the step before it."""

    def __init__(self, config: IterativeRLConfig, data: DataSets, other: Checkpoint) -> None:
        """Take the run's settings.

        Args:
            other: who samples where the policy as it is does not: the initial policy, or a teacher.

        Raises:
            ConfigError: as `runs_side_by_side`.
        """
        self._config, self._data, self._other = config, data, other
        self._side_by_side = runs_side_by_side(config)
        self._ahead: Explored | None = None
        window = config.curriculum.window if config.curriculum else 0
        self._earlier = deque[Sequence[Rewards]](([table] for table in data.rewards), maxlen=window)
        """Rewards of each of the last steps: all that a curriculum knows."""
        self._calls: list[str] = []
        """Keys of the calls that made what is ahead."""

    def of(self, policy: Checkpoint, step: int) -> Explored:
        """Return what `step` learns from: what was sampled ahead, where it was; else from `policy`, or another source."""
        if self._ahead is None:
            return self._explore(policy if self._config.data_source == "policy" else self._other, step)  # line 6
        explored, self._ahead = self._ahead, None
        count_calls(self._calls)
        return explored

    @contextlib.contextmanager
    def ahead(self, policy: Checkpoint, step: int, rewards: Rewards | None) -> Iterator[None]:
        """Note the rewards of `step`; with `overlap`, sample for the step after it from `policy`, which the block updates.

        Before the block or, where that is possible, while it runs. An iteration's first step has no update before it in the
        iteration: nothing is sampled ahead for it.
        """
        if rewards is not None and not self._config.dynamic_sampling:  # which scores more than what it keeps
            self._earlier.append([rewards])
        if not self._config.overlap or (step + 1) % self._config.steps == 0:
            yield
            return
        with ahead_of_its_part() as self._calls:
            if not self._side_by_side:
                self._ahead = self._explore(policy, step + 1)
            else:
                concurrent = Concurrent(lambda: self._explore(policy, step + 1))
        if not self._side_by_side:
            yield
            return
        try:
            yield
            self._ahead = concurrent.result()
        except BaseException as error:
            concurrent.stop(f"the update at the same time ended with {type(error).__name__}")
            raise

    def _explore(self, sampler: Checkpoint, step: int) -> Explored:
        config, data, seed = self._config, self._data, derived_seed(self._config.seed, step)
        if config.data_source == "demonstrations":
            return Explored(sampler, None, None, _demonstrate(config, data, sampler, step))
        questions = self._draw(step, config.seed)  # line 5
        drawn = questions if config.curriculum else None
        outputs, calls = sample(config, sampler, questions, config.rollout, seed=seed)  # line 7
        if config.dynamic_sampling:
            return Explored(sampler, drawn, data.train, *self._replace_agreeing_groups(sampler, seed, outputs, calls))
        return Explored(sampler, drawn, questions, outputs, calls)

    def _draw(self, step: int, seed: int, rewards: Sequence[Rewards] = ()) -> Questions:
        """Draw questions; `rewards` are those of what the step drew before."""
        train, curriculum, size = self._data.train, self._config.curriculum, self._config.questions_per_step
        if curriculum is None:
            return sample_batch(train, size=size, step=step, seed=seed)
        earlier = [table for tables in self._earlier for table in tables]
        return draw_from_band(train, earlier, list(rewards), curriculum.band, size=size, step=step, seed=seed)

    def _replace_agreeing_groups(
        self, sampler: Checkpoint, seed: int, outputs: Rollouts, calls: ToolCalls | None
    ) -> tuple[Rollouts, ToolCalls | None]:
        """Draw further questions until enough groups have outputs of unequal reward: DAPO's dynamic sampling."""
        config, train = self._config, self._data.train
        drawn, made, rewards = [outputs], [calls], [score(outputs, train, config.reward)]
        for draw in range(config.dynamic_sampling):
            kept = keep_informative(drawn, rewards, size=config.questions_per_step)
            if kept.metrics["rollout/agreeing_groups"] == 0:
                break
            # The step's own seed, so that what is drawn does not depend on how long the run is.
            questions = self._draw(draw, seed, rewards)
            outputs, calls = sample(config, sampler, questions, config.rollout, seed=seed)
            drawn.append(outputs)
            made.append(calls)
            rewards.append(score(outputs, train, config.reward))
        else:
            kept = keep_informative(drawn, rewards, size=config.questions_per_step)
        self._earlier.append(rewards)
        answered = [calls for calls in made if calls is not None]
        return kept, keep_calls(kept, drawn, answered) if answered else None


def token_evidence(
    config: IterativeRLConfig, policy: Checkpoint, reference: Checkpoint, critic: Checkpoint | None, outputs: Rollouts
) -> tuple[Values | None, Logprobs | None]:
    """Return what else advantages need: a critic's values, and log-probabilities where KL is part of the reward or all of it.

    Args:
        reference: pi_ref, or a teacher.
    """
    values = estimate_values(critic, outputs, config.critic) if critic and config.critic else None
    if not config.compares_policies:
        return values, None
    return values, compare_policies(policy, reference, outputs, _like_update(config))


def reference_evidence(
    config: IterativeRLConfig, policy: Checkpoint, reference: Checkpoint, outputs: Rollouts
) -> ReferenceLogprobs | None:
    """Return log pi_ref of the outputs from a pass of its own; None where the update computes it, or has no use for it.

    At the first step of an iteration the reference is the policy, whose own log-probabilities serve.
    """
    if config.reference_pass == "inline" or not config.update.needs_reference or reference == policy:
        return None
    return score_reference(reference, outputs, _like_update(config))


def _like_update(config: IterativeRLConfig) -> LogprobsConfig:
    return LogprobsConfig(micro_batch_tokens=config.update.micro_batch_tokens, training=config.update.training)


def _demonstrate(config: IterativeRLConfig, data: DataSets, policy: Checkpoint, step: int) -> Rollouts:
    """Return as many demonstrations as there would be outputs."""
    if data.demonstrations is None:
        raise ConfigError("data_source: the data set has no solutions to imitate; name its solution column")
    size = config.questions_per_step * config.rollout.G
    return demonstrated_outputs(policy, data.demonstrations, config.prompt, size=size, step=step, seed=config.seed)


class Mismatches:
    """Compare rollout engine and trainer at every step of a run, by the limits of `update.mismatch`."""

    def __init__(self, config: IterativeRLConfig) -> None:
        self._update = config.update
        backend, training = config.rollout.backend, config.update.training
        self._auto = config.update.mismatch.max_kl == "auto"
        # With `overlap` what the two differ by is the lag first of all.
        self._limited = self._auto and config.update.measures_mismatch and backend.kind != "hf" and not config.overlap
        self._exact = name_of_dtype(backend.dtype) == "float32" and not training.bf16
        self._first: float | None = None
        """Divergence at the first update that measured one."""

    @property
    def update(self) -> UpdateConfig:
        """Return the update's configuration, with the number that `max_kl: auto` is at this step."""
        if not self._auto:
            return self._update
        limit = staleness_limit(self._first, exact=self._exact) if self._limited else None
        mismatch = self._update.mismatch.model_copy(update={"max_kl": limit})
        return self._update.model_copy(update={"mismatch": mismatch})

    def check(self, policy: Checkpoint) -> None:
        """Compare the figures of the update that made `policy`, which may have been computed under other limits.

        Raises:
            MismatchError: a limit is passed.
        """
        check_mismatch(policy.metrics, self.update.mismatch)
        if self._first is None:
            self._first = policy.metrics.get(DIVERGENCE)
