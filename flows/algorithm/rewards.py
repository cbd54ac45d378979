"""Learned rewards in the flow: made before Algorithm 1 begins, compared with the rules, trained on after each iteration.

How they age is measured on held-out questions, which no reward model learned from. At the end of every iteration there are two
policies: that at its start (`old_policy`, whose outputs the models learned from) and that at its end (`new_policy`). With
retraining there are two states of the models, `old_model`, which gave the rewards in between, and `new_model`. The first falls
on the new policy. The second shall be good on it again, and with replay not have forgotten the old one.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Final, assert_never

from flows.algorithm.data import DataSets
from flows.algorithm.models import pretrained_model
from flows.algorithm.sampling import derived_seed, sample
from flows.config import IterativeRLConfig, PretrainedPolicy, RewardModelPlan
from flows.runs.curve import calls_of
from pipeline.events import DriftDone, emit
from stages.data import sample_batch
from stages.models import Checkpoint
from stages.reward import combine_rewards, labels_only, score
from stages.reward_model import ScoringConfig, check_gauges, measure_reward_model, score_outputs
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
from stages.rollout import continue_outputs, cut_into_prefixes
from stages.tables import Questions, RewardGauges, RewardLabels, Rewards, Rollouts

_POLICIES: Final = ("old_policy", "new_policy")
_MODELS: Final = ("old_model", "new_model")


@dataclass(frozen=True)
class RewardModels:
    """The reward models r_phi, and the labels they have learned from so far, one table an iteration."""

    models: list[Checkpoint]
    history: list[RewardLabels]


def first_reward_models(
    config: IterativeRLConfig, data: DataSets, base: Checkpoint, policy: Checkpoint
) -> RewardModels:
    """Return r_phi before the first iteration, trained on outputs of the initial policy that the rules label (5.2.1).

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
    """Train r_phi on fresh rule-labelled outputs of `policy` and a sample of history (Algorithm 1, line 11).

    Where these labels hold nothing to learn (all right, all wrong, or no pair), a model of an earlier iteration stays as it is,
    with a warning; the first training fails (iteration 0).
    """
    plan = config.reward_model
    if plan is None or not reward.models:
        return reward
    seed = derived_seed(config.seed, f"labels/{iteration}")
    questions = sample_batch(data.train, size=plan.questions, step=0, seed=seed)
    outputs, _ = sample(config, policy, questions, config.rollout, seed=seed)
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


def _shared(config: IterativeRLConfig, plan: RewardModelPlan) -> ScoringConfig:
    """Return how outputs are scored: by the ranks of the policy update, unless others are named."""
    if plan.scoring.engine is not None:
        return plan.scoring
    return plan.scoring.override({"engine": config.update.training.engine.model_dump(mode="json")})


def reward_outputs(
    config: IterativeRLConfig, sampler: Checkpoint, reward: RewardModels, questions: Questions | None, outputs: Rollouts
) -> tuple[Rewards | None, RewardGauges | None]:
    """Return r of every output (line 8): by rules, or by the reward models and the rules that the models do not replace.

    The models are measured on their own scores, by the rules that their labels come from. Where no reward is learned from
    (demonstrations, distillation), none is computed.

    Raises:
        RewardModelError: the models' scores have left the limits that the config sets.
    """
    if questions is None or not config.scores_outputs:
        return None, None
    plan = config.reward_model
    if plan is None or not reward.models:
        return score(outputs, questions, config.reward), None
    rules = score(outputs, questions, labels_only(config.reward))
    scores = score_outputs(outputs, sampler, reward.models, _shared(config, plan), rules)
    gauges = measure_reward_model(scores, rules, outputs, plan.scoring, plan.gauges)
    check_gauges(gauges, plan.limits)
    bounded = plan.scoring.scale == "sigmoid"
    rewards = combine_rewards(scores, outputs, questions, config.reward, weight=plan.weight, bounded=bounded)
    return rewards, gauges


def measure_drift(
    config: IterativeRLConfig,
    data: DataSets,
    models: tuple[RewardModels, RewardModels],
    policies: tuple[Checkpoint, Checkpoint],
    *,
    step: int,
) -> None:
    """Measure, as of `step`, how the reward models do on held-out outputs of both policies.

    Args:
        models: those that the iteration was rewarded by, and those trained on after it; the same where they were not.
        policies: at the iteration's start and at its end; the same before the first iteration.

    Metrics, for each state of the models and each policy that differ: `rm/held_out_auc/<model>_<policy>`, in the same way
    `rm/held_out_accuracy` and, of a process model, `rm/held_out_step_accuracy`.
    """
    plan = config.reward_model
    if plan is None or not plan.held_out_questions or not data.evaluation:
        return
    questions = _held_out(plan, data, config.seed)
    measured: dict[str, RewardGauges] = {}
    for which, policy in dict(zip(_POLICIES, policies, strict=True)).items():
        if which == "new_policy" and policy == policies[0]:
            continue
        for state, held in dict(zip(_MODELS, models, strict=True)).items():
            if state == "new_model" and held.models == models[0].models:
                continue
            measured[f"{state}_{which}"] = _gauges(config, plan, held, policy, questions)
    emit(DriftDone(step, calls_of(measured)))


def _held_out(plan: RewardModelPlan, data: DataSets, seed: int) -> Questions:
    """Return so many of the first held-out set, the same at every iteration."""
    held_out = next(iter(data.evaluation.values()))
    size = min(plan.held_out_questions, held_out.read().num_rows)
    return sample_batch(held_out, size=size, step=0, seed=seed)


def _gauges(
    config: IterativeRLConfig, plan: RewardModelPlan, reward: RewardModels, policy: Checkpoint, questions: Questions
) -> RewardGauges:
    outputs, _ = sample(config, policy, questions, config.rollout, seed=derived_seed(config.seed, "drift"))
    rules = score(outputs, questions, labels_only(config.reward))
    scores = score_outputs(outputs, policy, reward.models, _shared(config, plan), rules)
    return measure_reward_model(scores, rules, outputs, plan.scoring, plan.gauges)


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
    """Add labels of steps to `labels`: the rules' own, or what becomes of each step when `policy` goes on from it."""
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
    """Return whether `labels` hold nothing to train such a model on, with a warning."""
    reason = nothing_to_learn(labels, model.kind, training.objective)
    if reason:
        warnings.warn(
            f"the {model.kind} reward model stays as it was after iteration {iteration}: {reason}", stacklevel=2
        )
    return reason is not None
