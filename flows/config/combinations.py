"""Combinations of settings that are refused: parts that are right by themselves and mean nothing together."""

from __future__ import annotations

from collections.abc import Iterator

from flows.config.parts import RunSettings
from flows.config.turns import turn_complaints
from stages.advantage import GroupConfig
from stages.reward import OverlongConfig, unlearned_components
from stages.training import DeepSpeedEngineConfig, TrainingConfig
from stages.update import GRPOConfig


def unsupported_combinations(config: RunSettings) -> Iterator[str]:
    """Yield every complaint, each beginning with the key that it is about and saying what to set."""
    yield from _of_the_objective(config)
    yield from _of_the_teacher(config)
    yield from _of_the_outputs(config)
    yield from turn_complaints(config)
    yield from _of_the_overlap(config)
    yield from _of_dynamic_sampling(config)
    yield from _of_the_curriculum(config)
    yield from _of_advantage_and_update(config)
    yield from _of_reward_models(config)
    yield from _of_the_schedule(config)
    yield from _of_the_ranks(config)


def _of_the_objective(config: RunSettings) -> Iterator[str]:
    """Refuse what does not belong to the objective's row of Table 10."""
    kind, row = config.update.objective.kind, config.update.objective.ROW
    if config.data_source not in row.sources:
        yield f"data_source: {kind} learns from {_either(row.sources)}, found {config.data_source}; {row.because}"
    if config.advantage.kind not in row.advantages:
        yield f"advantage.kind: {kind} takes {_either(row.advantages)}, found {config.advantage.kind}; {row.because}"
    else:
        allowed = {"supervision": row.supervisions, "baseline": row.baselines, "scale": row.scales}
        for name, values in allowed.items():
            if (found := getattr(config.advantage, name, None)) is not None and found not in values:
                yield f"advantage.{name}: {kind} takes {_either(values)}, found {found}; {row.because}"
    if config.reward_model is not None and "model" not in row.rewards:
        yield f"reward_model: no score of a model reaches the gradient of {kind}: {row.because}; set reward_model=null"
    if (config.advantage.kind == "gae") != (config.critic is not None):
        yield "critic: advantage.kind gae (PPO) needs one, and nothing else does; set critic={} or null"
    if config.data_source == "initial_policy" and row.uses_ratio and config.update.old_logprobs != "rollout":
        yield (
            f"update.old_logprobs: {kind} on outputs of the initial policy needs that policy's log-probabilities in its "
            "ratio; set update.old_logprobs=rollout"
        )


def _of_the_teacher(config: RunSettings) -> Iterator[str]:
    """Refuse to learn from a teacher that is not named, and one that nothing learns from."""
    if (config.teacher is not None) == (needed := "teacher" in (config.advantage.kind, config.data_source)):
        return
    if needed:
        where = "advantage.kind" if config.advantage.kind == "teacher" else "data_source"
        yield f"teacher: {where} teacher needs a model, found null; set teacher.path to a folder, or to a model of the hub"
    else:
        yield (
            f"teacher: {config.update.objective.kind} on outputs of data_source {config.data_source} learns from none, and it "
            "would have no effect; set teacher=null, or method distillation"
        )


def _of_the_outputs(config: RunSettings) -> Iterator[str]:
    """Refuse what does not go with the source of the outputs and their sampling."""
    source, update, sampled = config.data_source, config.update, config.rollout.temperature
    yield from _of_a_server(config)
    if update.correction.kind != "none" and source != "policy":
        yield (
            "update.correction: its weights compare rollout engine and trainer for one and the same policy, and these "
            f"outputs are not the current one's (data_source: {source}); set update.correction.kind=none"
        )
    if source == "demonstrations":
        sampled = 1.0  # what demonstrations are recorded with
    if sampled == 0:
        yield "rollout.temperature: greedy outputs come from no distribution; nothing can be learned from them by RL"
    if update.temperature not in (None, sampled):
        yield f"update.temperature: {update.temperature:g} differs from that of the outputs, {sampled:g}"


def _of_the_overlap(config: RunSettings) -> Iterator[str]:
    """Refuse outputs of an earlier policy where they cannot be sampled, or are not accounted for."""
    if config.side_by_side == "always":
        if not config.overlap:
            yield "side_by_side: with overlap=0 each update waits for its outputs; set side_by_side=auto, or overlap=1"
        elif (complaint := next(unfit_side_by_side(config), None)) is not None:
            yield f"side_by_side: {complaint}; set side_by_side=auto, or never"
    if not config.overlap:
        return
    update, kind, row = config.update, config.update.objective.kind, config.update.objective.ROW
    if config.data_source != "policy":
        yield (
            f"overlap: outputs of data_source {config.data_source} do not change with the policy, so that none can be of an "
            "earlier one; set overlap=0"
        )
    elif not row.uses_ratio:
        yield (
            f"overlap: {kind} has no ratio pi_theta / pi_old that accounts for outputs of an earlier policy; set overlap=0"
        )
    elif update.old_logprobs == "trainer" and update.correction.kind == "none":
        yield (
            "update.old_logprobs: with overlap=1 the outputs are an earlier policy's, and trainer would take the current one "
            "for pi_old; set update.old_logprobs=rollout, or update.correction.kind=truncated"
        )
    elif update.measures_mismatch and (limits := list(update.mismatch.given)):
        yield (
            f"update.mismatch.{limits[0]}: with overlap=1 a difference between engine and trainer and the update between "
            "the two policies are one figure; set it to null"
        )
    if config.overlap >= config.steps:
        yield (
            f"overlap: an iteration's first outputs are its first policy's; expected less than steps={config.steps}, found "
            f"{config.overlap}"
        )


def unfit_side_by_side(config: RunSettings) -> Iterator[str]:
    """Yield why sampling and update cannot run at a time, on any machine."""
    backend, training = config.rollout.backend, config.update.training
    if backend.kind != "hf":
        yield f"expected rollout.backend.kind=hf, found {backend.kind}, which samples in turns with the update"
    elif backend.threads == "auto" or training.threads == "auto":
        yield (
            "expected rollout.backend.threads and update.training.threads to share the cores (1 and 1 of two), found "
            f"{backend.threads} and {training.threads}"
        )
    if config.environment is not None:
        yield "environment answers calls between the turns of an output, in this process"
    if config.dynamic_sampling:
        yield "dynamic_sampling draws again by the rewards of what was sampled, in turns with the update"


def _of_dynamic_sampling(config: RunSettings) -> Iterator[str]:
    """Refuse to replace groups of equal rewards by the rules where the method would learn from them."""
    if not config.dynamic_sampling:
        return
    advantage = config.advantage
    if config.data_source != "policy":
        yield "dynamic_sampling: only outputs of the current policy can be drawn again"
    if not isinstance(advantage, GroupConfig):
        yield (
            f"dynamic_sampling: groups of equal rewards are no loss to advantage.kind {advantage.kind}, which does not compare "
            "the outputs of a group; set dynamic_sampling=0"
        )
        return
    if config.reward_model is not None:
        yield (
            "dynamic_sampling: a model's scores of two outputs are hardly ever equal, so that there is nothing to replace, and "
            "the rules' are not what is learned from; set dynamic_sampling=0"
        )
    if advantage.supervision == "process":
        yield (
            "dynamic_sampling: outputs of equal rewards may differ in the rewards of their steps, which process supervision "
            "learns from; set dynamic_sampling=0"
        )
    if advantage.kl_in_reward > 0:
        yield (
            "dynamic_sampling: with advantage.kl_in_reward no two outputs have equal rewards, so that each group has something "
            "to learn from; set dynamic_sampling=0, or put the KL into the loss"
        )


def _of_the_curriculum(config: RunSettings) -> Iterator[str]:
    """Refuse a curriculum without rewards, or whose rewards are freed before they were read."""
    if config.curriculum is None:
        return
    window, kept = config.curriculum.window, config.keep.rollouts
    if config.data_source == "demonstrations":
        yield "curriculum: demonstrations have no rewards to choose questions by; set curriculum=null"
    elif not config.update.objective.ROW.rewards:
        yield (
            f"curriculum: {config.update.objective.kind} computes no rewards to choose questions by; set curriculum=null"
        )
    if kept is not None and kept < window:
        yield (
            f"keep.rollouts: expected at least curriculum.window={window}, found {kept}: the rewards of so many steps are read "
            "again"
        )


def _of_the_schedule(config: RunSettings) -> Iterator[str]:
    """Refuse a warm-up that is longer than the run, and a linear decay that is shorter."""
    steps, update, critic = config.iterations * config.steps, config.update, config.critic
    trainings = [("update", update.training, steps * update.mu * update.mini_batches)]
    if critic is not None:
        trainings.append(("critic", critic.training, steps * critic.mu * critic.mini_batches))
    for name, training, updates in trainings:
        if 0 < updates < training.warmup_steps:
            yield (
                f"{name}.training.warmup_steps: the run makes {updates} updates, and the rate would rise to its end; expected "
                f"at most {updates}, found {training.warmup_steps}"
            )
        if training.total_steps is not None and training.total_steps < updates:
            yield (
                f"{name}.training.total_steps: the run makes {updates} updates, and those beyond would have a rate of 0; "
                f"expected at least {updates}, found {training.total_steps}"
            )


def _of_a_server(config: RunSettings) -> Iterator[str]:
    """Refuse a server, which keeps its weights, for policies that change."""
    serving, evaluating = config.rollout.backend.kind, (config.evaluation.backend or config.rollout.backend).kind
    fixed = "a server keeps the weights it was started with"
    if serving == "vllm_server" and config.data_source == "policy":
        yield f"rollout.backend: {fixed}, and data_source policy samples from changing ones; set kind vllm or hf"
    if evaluating == "vllm_server":
        yield f"evaluation.backend: {fixed}, and each policy evaluated has others; set evaluation.backend.kind=vllm or hf"


def _of_advantage_and_update(config: RunSettings) -> Iterator[str]:
    advantage, objective = config.advantage, config.update.objective
    penalty = getattr(advantage, "kl_in_reward", 0.0)
    if penalty and isinstance(objective, GRPOConfig) and objective.beta > 0:
        yield (
            f"advantage.kl_in_reward={penalty:g} and update.objective.beta={objective.beta:g} would count the KL term "
            "twice; set one of them to 0"
        )
    grouped = advantage.kind in ("group", "pairs") or getattr(advantage, "baseline", None) == "group_mean"
    if grouped and config.rollout.G < 2:
        yield f"rollout.G: advantages within a group need at least 2 outputs per question, found {config.rollout.G}"
    yield from _of_step_rewards(config)
    if config.data_source != "demonstrations" and config.update.mini_batches > config.questions_per_step:
        yield (
            f"update.mini_batches: expected at most questions_per_step={config.questions_per_step}, found "
            f"{config.update.mini_batches}: the outputs of a question stay in one mini-batch"
        )
    if config.critic is not None and config.critic.mini_batches != config.update.mini_batches:
        yield (
            f"critic.mini_batches: expected {config.update.mini_batches}, as update.mini_batches, found "
            f"{config.critic.mini_batches}: policy and critic learn from the same mini-batches"
        )
    if config.reference_pass == "stage" and not config.update.needs_reference:
        yield f"reference_pass: update.objective {objective.kind} reads no reference here; set reference_pass=inline"
    longest = config.rollout.max_output_tokens
    if (length := getattr(objective, "length", None)) is not None and length < longest:
        yield (
            f"update.objective.length: expected at least rollout.max_output_tokens={longest}, found {length}: L is the longest "
            "output allowed, and a smaller one only makes every gradient larger"
        )
    for component in config.reward.components:
        if isinstance(component, OverlongConfig) and component.max_tokens != longest:
            yield (
                f"reward.components: {component.name!r} punishes fully from max_tokens={component.max_tokens} on, and "
                f"outputs end at rollout.max_output_tokens={longest}: with another border it would meet none of them, "
                "or whole ones like cut ones; set them equal"
            )


def _of_step_rewards(config: RunSettings) -> Iterator[str]:
    """Refuse process supervision and process models without rewards of steps."""
    plan, by_rules = config.reward_model, any(part.kind == "steps" for part in config.reward.components)
    learned = plan is not None and any(model.kind == "process" for model in plan.models)
    if isinstance(config.advantage, GroupConfig) and config.advantage.supervision == "process":
        if plan is None and not by_rules:
            yield (
                "advantage.supervision: process needs rewards of steps; add a component of kind `steps` to "
                "reward.components (built-in world), or a process model to reward_model.models"
            )
        if plan is not None and not learned:
            yield (
                "advantage.supervision: process needs rewards of steps, and the rewards are those of reward_model, which "
                "has an outcome model only; add {kind: process} to reward_model.models"
            )
    if plan is not None and learned and plan.step_labels.kind == "rules" and not by_rules:
        yield (
            "reward_model.step_labels: no rule labels the steps that the process model learns from; set "
            "reward_model.step_labels.kind=monte_carlo, or in the built-in world add a component of kind `steps` to "
            "reward.components"
        )


def _of_reward_models(config: RunSettings) -> Iterator[str]:
    """Refuse what reward models leave without effect, or cannot be combined with."""
    plan, reward = config.reward_model, config.reward
    if plan is None:
        return
    if config.advantage.kind in ("one", "correct", "pairs"):
        yield (
            f"reward_model: advantage.kind {config.advantage.kind} learns from the rules' verdicts or from no reward, and the "
            "models' scores would have no effect; set reward_model=null"
        )
    kept = unlearned_components(reward)
    for component in (part for part in reward.components if part not in kept):
        usual = type(component).model_fields["weight"].default
        if component.weight != usual:
            yield (
                f"reward.components: {component.name!r} has weight {component.weight:g}, and its verdicts are what the reward "
                f"models learn to give, whose score replaces it; set reward_model.weight, and this one to {usual:g}"
            )
    if reward.truncated == "as_unparseable" and plan.scoring.scale == "logit" and config.rollout.G < 2:
        yield (
            "reward.truncated: as_unparseable gives a cut output the lowest logit of its question's outputs, and rollout.G=1 "
            "leaves none to compare with; set truncated to as_is or no_reward, or reward_model.scoring.scale=sigmoid"
        )


def _of_the_ranks(config: RunSettings) -> Iterator[str]:
    """Refuse more ranks than a batch has outputs: some would only repeat others, with weight 0.

    A number that does not divide the batch is fine: micro-batches are dealt out whole (`stages/training/batching.py`).
    """
    groups = max(1, config.questions_per_step // config.update.mini_batches)
    outputs = groups * config.rollout.G
    yield from _too_many("update.training", config.update.training, outputs, "outputs of a mini-batch")
    if config.sft is not None:
        yield from _too_many("sft.training", config.sft.training, config.sft.batch_size, "demonstrations of a batch")
    if config.critic is not None:
        yield from _too_many("critic.training", config.critic.training, outputs, "outputs of a mini-batch")
    if (plan := config.reward_model) is not None:
        outputs = min(plan.questions, plan.training.questions_per_update) * config.rollout.G
        yield from _too_many("reward_model.training.training", plan.training.training, outputs, "outputs of an update")


def _too_many(key: str, training: TrainingConfig, rows: int, what: str) -> Iterator[str]:
    engine = training.engine
    if isinstance(engine, DeepSpeedEngineConfig) and engine.ranks > rows:
        yield (
            f"{key}.engine.ranks: expected at most {rows}, the {what}, found {engine.ranks}; a rank computes whole outputs, "
            "and one without any repeats another's for nothing: set fewer ranks, or a larger batch"
        )


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(names)
