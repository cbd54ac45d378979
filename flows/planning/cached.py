"""Find which of a run's stage calls the store has already: call the flow itself on a store that only finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from flows.config import ArithmeticData, FileData, IterativeRLConfig, RewardModelPlan
from flows.planning.plan import evaluations_of
from flows.planning.stages import EVALUATION_CALLS
from flows.runs.ledger import Ledger
from pipeline.events import recording
from pipeline.store import MissingArtifactError, Store, use_store
from stages.reward_training import MonteCarloConfig


@dataclass(frozen=True)
class Progress:
    """How much of a run is in the store."""

    ledger: Ledger
    found: int
    """Stage calls that would be reused."""
    total: int
    """Stage calls of the run; an upper bound where the flow decides on its way."""
    ended: bool
    """Whether the run would compute nothing."""
    note: str = ""
    """Why the flow could not be followed to the first missing call; empty where it could."""

    @property
    def steps(self) -> int:
        """Return the number of steps that are there."""
        return len(self.ledger.steps)


def progress_of(config: IterativeRLConfig, store: Store) -> Progress:
    """Follow the flow through the calls that are recorded, to the first that is not; nothing is computed or verified."""
    from flows.iterative_rl import iterative_rl

    ledger, note, ended = Ledger(), "", False
    try:
        with use_store(cast(Store, _OnlyFinds(store))), recording(ledger.take):
            iterative_rl(config)
        ended = True
    except MissingArtifactError:
        pass
    except Exception as error:  # a file of questions, a model or a server that is not there: the plan is made without
        note = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
    total = len(ledger.calls) if ended else sum(count for _, count in calls_of(config))
    return Progress(ledger, len(ledger.calls), max(total, len(ledger.calls)), ended, note)


class _OnlyFinds:
    """A store in which a call that is not recorded is an error, before anything is computed."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def find(self, key: str, *, own: bool = False) -> dict[str, Any]:
        return self._store.action(key)

    def path(self, digest: str) -> Path:
        return self._store.path(digest, replay=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def calls_of(config: IterativeRLConfig) -> Iterator[tuple[str, int]]:
    """Count the stage calls of each part of the flow, equal calls once."""
    data, steps = config.data, config.iterations * config.steps
    sets = len(data.evaluation)
    match data:
        case ArithmeticData():
            yield "data", 2 + sets
        case FileData():
            yield "data", 1 + (config.sft is not None) + sets + (1 + sets)  # read, then limited
    yield "policy", 1 + sum(part is not None for part in (config.teacher, config.sft, config.critic))
    yield "evaluations", evaluations_of(config) * sets * len(config.evaluation.modes(config.rollout)) * EVALUATION_CALLS
    apart = int(config.update.needs_reference and config.reference_pass == "stage")
    # At an iteration's first step the reference is the policy: no pass.
    yield "steps", steps * (_calls_of_a_step(config) + apart) - apart * config.iterations
    if config.reward_model is not None:
        yield "reward models", _calls_of_reward_models(config, config.reward_model)


def _calls_of_a_step(config: IterativeRLConfig) -> int:
    sampled = 1 if config.data_source == "demonstrations" else 2 + config.scores_outputs  # questions, outputs, rewards
    learned = 3 if config.reward_model is not None else 0  # scores, gauges, what is learned from
    valued = 2 if config.critic is not None else 0
    return sampled + learned + valued + config.compares_policies + 2  # advantages, update


def _calls_of_reward_models(config: IterativeRLConfig, plan: RewardModelPlan) -> int:
    kinds = len(plan.models)
    trainings = 1 + (max(0, config.iterations - 1) if plan.retrain else 0)
    completed = 4 if isinstance(plan.step_labels, MonteCarloConfig) else 0
    each = 4 + completed + kinds  # questions, outputs, rewards, labels
    mixed = trainings - 1
    drift = 0
    if plan.held_out_questions and config.data.evaluation:
        # Questions; outputs, rewards, scores and gauges of the first policy and of each iteration's last; after a retraining
        # scores and gauges of both models and both policies, of which those of the old model on the old policy were there.
        drift = 1 + 4 * (1 + config.iterations) + 4 * mixed
    return kinds + trainings * each + mixed + drift
