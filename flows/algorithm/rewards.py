"""Learned rewards in the flow: made before Algorithm 1 begins, compared with the rules, trained on after each iteration."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from typing import assert_never

from flows.algorithm.data import DataSets
from flows.algorithm.models import pretrained_model
from flows.config import IterativeRLConfig, PretrainedPolicy, RewardModelPlan
from stages.data import sample_batch
from stages.models import Checkpoint
from stages.reward import combine_rewards, labels_only, score
from stages.reward_model import check_gauges, measure_reward_model, score_outputs
from stages.reward_training import (
    MonteCarloConfig,
    RewardModelConfig,
    RewardTrainingConfig,
    RuleStepsConfig,
    create_reward_model,
    estimate_step_labels,
    label_outputs,
    mix_with_history,
    nothing_to_learn,
    train_reward_model,
)
from stages.rollout import continue_outputs, cut_into_prefixes, rollout
from stages.tables import Questions, RewardGauges, RewardLabels, Rewards, Rollouts


@dataclass(frozen=True)
class RewardModels:
    """r_phi as it is, and the labels it has learned from so far, one table an iteration."""

    models: list[Checkpoint]
    history: list[RewardLabels]


def first_reward_models(
    config: IterativeRLConfig, data: DataSets, base: Checkpoint, policy: Checkpoint
) -> RewardModels:
    """r_phi before the first iteration: trained on outputs of the initial policy that the rules have labelled (5.2.1).

    Args:
        base: the model before supervised fine-tuning, whose trunk the paper's reward model has (4.2); `reward_model.trunk` may
            name another.
        policy: the initial policy, which samples what is labelled.
    """
    plan = config.reward_model
    if plan is None:
        return RewardModels([], [])
    match plan.trunk:
        case "base":
            trunk = base
        case "initial_policy":
            trunk = policy
        case PretrainedPolicy() as model:
            trunk = pretrained_model(model)
        case _ as unknown:
            assert_never(unknown)
    untrained = [create_reward_model(trunk, kind) for kind in plan.models]
    return train_on(config, data, policy, RewardModels(untrained, []), iteration=0)


def train_on(
    config: IterativeRLConfig, data: DataSets, policy: Checkpoint, reward: RewardModels, *, iteration: int
) -> RewardModels:
    """r_phi after training on fresh rule-labelled outputs of `policy` and a sample of history (Algorithm 1, line 11).

    Where these labels hold nothing to learn (all right, all wrong, or no pair), a model of an earlier iteration stays as it is,
    with a warning; the first training fails (iteration 0).
    """
    plan = config.reward_model
    if plan is None or not reward.models:
        return reward
    seed = _seed(config.seed, iteration)
    questions = sample_batch(data.train, size=plan.questions, step=0, seed=seed)
    outputs = rollout(policy, questions, config.prompt, config.rollout, seed=seed)
    fresh = label_outputs(outputs, score(outputs, questions, labels_only(config.reward)), policy)
    fresh = _with_step_labels(config, plan, policy, questions, outputs, fresh, seed=seed)
    labels = mix_with_history(fresh, reward.history, plan.replay, seed=seed) if reward.history else fresh
    models = [
        model
        if iteration > 0 and _stays(kind, labels, plan.training, iteration)
        else train_reward_model(model, labels, plan.fitting, seed=seed)
        for kind, model in zip(plan.models, reward.models, strict=True)
    ]
    return RewardModels(models, [*reward.history, fresh])


def reward_outputs(
    config: IterativeRLConfig, sampler: Checkpoint, reward: RewardModels, questions: Questions | None, outputs: Rollouts
) -> tuple[Rewards | None, RewardGauges | None]:
    """r of every output (line 8): by rules, or by the reward models and what of the rules is not what the models stand for.

    The models are measured on their own scores, by the rules that their labels come from. Demonstrations, which have no
    questions to be scored with, have no reward.

    Raises:
        RewardModelError: the models' scores have left the limits that the config sets.
    """
    if questions is None:
        return None, None
    plan = config.reward_model
    if plan is None or not reward.models:
        return score(outputs, questions, config.reward), None
    rules = score(outputs, questions, labels_only(config.reward))
    scores = score_outputs(outputs, sampler, reward.models, plan.scoring, rules)
    gauges = measure_reward_model(scores, rules, outputs, plan.scoring, plan.gauges)
    check_gauges(gauges, plan.limits)
    bounded = plan.scoring.scale == "sigmoid"
    rewards = combine_rewards(scores, outputs, questions, config.reward, weight=plan.weight, bounded=bounded)
    return rewards, gauges


def _with_step_labels(
    config: IterativeRLConfig,
    plan: RewardModelPlan,
    policy: Checkpoint,
    questions: Questions,
    outputs: Rollouts,
    labels: RewardLabels,
    *,
    seed: int,
) -> RewardLabels:
    """`labels` with those of steps: the rules' own, or what becomes of each step when `policy` goes on from it."""
    match plan.step_labels:
        case RuleStepsConfig():
            return labels
        case MonteCarloConfig() as completion:
            prefixes = cut_into_prefixes(outputs, outputs_per_question=completion.outputs_per_question)
            continued = continue_outputs(
                policy, outputs, prefixes, config.rollout, samples=completion.samples, seed=seed
            )
            verdicts = score(continued, questions, labels_only(config.reward))
            return estimate_step_labels(labels, prefixes, verdicts, completion)
        case _ as unknown:
            assert_never(unknown)


def _stays(model: RewardModelConfig, labels: RewardLabels, training: RewardTrainingConfig, iteration: int) -> bool:
    """Whether `labels` hold nothing to train such a model on; says so."""
    reason = nothing_to_learn(labels, model.kind, training.objective)
    if reason:
        warnings.warn(
            f"the {model.kind} reward model stays as it was after iteration {iteration}: {reason}", stacklevel=2
        )
    return reason is not None


def _seed(seed: int, iteration: int) -> int:
    """Another for the labels of each iteration than for any step."""
    return int.from_bytes(hashlib.sha256(f"{seed}/labels/{iteration}".encode()).digest()[:4], "big") >> 1
