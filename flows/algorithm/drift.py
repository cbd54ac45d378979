"""How reward models age: compared with the rules on the outputs of the policy they learned from, and of the one they trained.

Held-out questions, which no reward model learned from. At the end of every iteration there are two policies, that at its start
(`old_policy`, whose outputs the models learned from) and that at its end (`new_policy`), and with retraining two states of the
models, `old_model`, which gave the rewards in between, and `new_model`. The first falls on the new policy; the second shall
be good on it again, and with replay not have forgotten the old one.
"""

from __future__ import annotations

import hashlib
from typing import Final

from flows.algorithm.data import DataSets
from flows.algorithm.rewards import RewardModels
from flows.config import IterativeRLConfig, RewardModelPlan
from flows.runs.points import calls_of
from pipeline.events import DriftDone, emit
from stages.data import sample_batch
from stages.models import Checkpoint
from stages.reward import labels_only, score
from stages.reward_model import measure_reward_model, score_outputs
from stages.rollout import rollout
from stages.tables import Questions, RewardGauges

_POLICIES: Final = ("old_policy", "new_policy")
_MODELS: Final = ("old_model", "new_model")


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
    questions = _questions(plan, data, config.seed)
    measured: dict[str, RewardGauges] = {}
    for which, policy in dict(zip(_POLICIES, policies, strict=True)).items():
        if which == "new_policy" and policy == policies[0]:
            continue
        for state, held in dict(zip(_MODELS, models, strict=True)).items():
            if state == "new_model" and held.models == models[0].models:
                continue
            measured[f"{state}_{which}"] = _gauges(config, plan, held, policy, questions)
    emit(DriftDone(step, calls_of(measured)))


def _questions(plan: RewardModelPlan, data: DataSets, seed: int) -> Questions:
    """So many of the first held-out set, the same at every iteration."""
    held_out = next(iter(data.evaluation.values()))
    size = min(plan.held_out_questions, held_out.read().num_rows)
    return sample_batch(held_out, size=size, step=0, seed=seed)


def _gauges(
    config: IterativeRLConfig, plan: RewardModelPlan, reward: RewardModels, policy: Checkpoint, questions: Questions
) -> RewardGauges:
    outputs = rollout(policy, questions, config.prompt, config.rollout, seed=_seed(config.seed))
    rules = score(outputs, questions, labels_only(config.reward))
    scores = score_outputs(outputs, policy, reward.models, plan.scoring, rules)
    return measure_reward_model(scores, rules, outputs, plan.scoring, plan.gauges)


def _seed(seed: int) -> int:
    """Another for these outputs than for any step or label."""
    return int.from_bytes(hashlib.sha256(f"{seed}/drift".encode()).digest()[:4], "big") >> 1
