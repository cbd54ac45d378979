"""Algorithm 1 of DeepSeekMath: iterative GRPO. The numbers at the right are the paper's line numbers.

Every line is a stage call that asks the store first, so the same call resumes an interrupted run, and a longer one
(`iterations`, `steps`) computes only what is new. Whatever happens per step is drawn from seeds that depend on the run's seed
and the step alone.

The other methods of the paper's Table 10 are the same loop: their data source is whom line 7 samples from, their reward and
gradient coefficient are lines 8 and 9, their objective is line 10 (`flows/config/methods.py` names the settings of each).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from flows.algorithm.data import limit_data, prepare_data
from flows.algorithm.models import base_model, initial_policy, teacher_model
from flows.algorithm.preflight import preflight
from flows.algorithm.rewards import first_reward_models, measure_drift, reward_outputs, train_on
from flows.algorithm.sampling import Exploration, Mismatches, derived_seed, reference_evidence, sample, token_evidence
from flows.config import IterativeRLConfig
from flows.runs.checkpoints import Checkpoints, written
from flows.runs.curve import evaluation_done, step_done
from pipeline.stage import flow
from stages.advantage import estimate_advantages
from stages.critic import create_critic, update_critic
from stages.evaluation import evaluate
from stages.models import Checkpoint
from stages.reward import count_votes, score
from stages.tables import Questions, Rollouts
from stages.update import MismatchError, update_policy


# fmt: off
@flow
def iterative_rl(config: IterativeRLConfig) -> Checkpoint:
    """Train a policy as `config` says; return the last one."""
    data = prepare_data(config.data)
    base = base_model(config, data)
    teacher = teacher_model(config, base)
    data = limit_data(config, data, base)
    policy = initial = initial_policy(config, data, base)                                                  # line 1
    reward_models = first_reward_models(config, data, base, policy)
    measure_drift(config, data, (reward_models, reward_models), (policy, policy), step=0)
    critic = create_critic(policy, config.critic) if config.critic else None
    evaluate_policy(config, policy, data.evaluation, step=0)
    last = config.iterations * config.steps
    checkpoints = Checkpoints(config.checkpoint, last=last, always=config.looks_back_at)
    exploration, limits = Exploration(config, data, teacher or initial), Mismatches(config)
    for iteration in range(config.iterations):                                                             # line 2
        reference = policy                                                                                 # line 3
        for step in range(iteration * config.steps, (iteration + 1) * config.steps):                       # line 4
            seed = derived_seed(config.seed, step)
            sampler, drawn, questions, outputs, calls = exploration.of(policy, step)                       # lines 5-7
            rewards, gauges = reward_outputs(config, sampler, reward_models, questions, outputs)           # line 8
            preflight(config, outputs, rewards, step)
            evidence = token_evidence(config, policy, teacher or reference, critic, outputs)
            advantages = estimate_advantages(rewards, outputs, config.advantage, *evidence)                # line 9
            scored = reference_evidence(config, policy, reference, outputs)
            with exploration.ahead(policy, step, rewards), checkpoints.at(step + 1), naming(step + 1, outputs):
                policy = update_policy(policy, scored or reference, outputs, advantages, limits.update, seed=seed)  # line 10
                limits.check(policy)
                if critic and config.critic:
                    critic = update_critic(critic, outputs, advantages, config.critic, seed=seed)
            made = (drawn, outputs, calls, rewards, gauges, *evidence, advantages, scored, critic)
            step_done(step + 1, iteration, policy, *made)
            if config.evaluation.is_due(step + 1, last):
                evaluate_policy(config, policy, data.evaluation, step=step + 1)
        asked = reward_models
        # After the last iteration the reward models are not used again.
        if config.reward_model and config.reward_model.retrain and iteration + 1 < config.iterations:
            reward_models = train_on(config, data, policy, reward_models, iteration=iteration + 1)         # line 11
        measure_drift(config, data, (asked, reward_models), (reference, policy), step=step + 1)
    return written(policy)
# fmt: on


def evaluate_policy(config: IterativeRLConfig, policy: Checkpoint, sets: dict[str, Questions], *, step: int) -> None:
    """Measure greedy accuracy, and mean@k, pass@k and maj@k of k samples at the evaluation's temperature, on every set."""
    for name, questions in sets.items():
        for mode, sampling, estimates in config.evaluation.modes(config.rollout):
            outputs, _ = sample(config, policy, questions, sampling, seed=config.seed)
            rewards = score(outputs, questions, config.reward)
            votes = count_votes(rewards, config.reward)
            evaluation_done(step, name, mode, evaluate(outputs, rewards, votes, estimates))


@contextlib.contextmanager
def naming(step: int, outputs: Rollouts) -> Iterator[None]:
    """Name the step and its outputs in an error that engine and trainer disagree.

    A group of ranks passes that error on as a ValueError.
    """
    try:
        yield
    except ValueError as error:
        if isinstance(error, MismatchError) or MismatchError.__name__ in getattr(error.__cause__, "kinds", ()):
            name = outputs.digest[:12]
            raise MismatchError(
                f"step {step}: {error}. The outputs are recorded: after `cohort forget {name}` (with dynamic_sampling, of the "
                f"rollouts that `cohort lineage {name}` names) the same command samples them again, by another engine"
            ) from error
        raise
