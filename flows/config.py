"""The whole configuration of a run: what `cohort run` reads, overrides and hands to the flow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from flows.preflight import PreflightConfig
from flows.pretrained import PretrainedPolicy
from pipeline.config import Config
from stages.advantage import AdvantageConfig, GroupConfig
from stages.critic import CriticConfig
from stages.data import ArithmeticConfig, DemonstrationConfig, QuestionFileConfig
from stages.evaluation import EvaluationConfig
from stages.prompts import PromptConfig
from stages.reward import OverlongConfig, RewardConfig
from stages.reward_model import GaugeConfig, GaugeLimits, ScoringConfig
from stages.reward_training import (
    ReplayConfig,
    RewardModelConfig,
    RewardTrainingConfig,
    RuleStepsConfig,
    StepLabelsConfig,
)
from stages.rollout import BackendConfig, RolloutConfig
from stages.sft import PolicyConfig, SFTConfig
from stages.update import DataSource, GRPOConfig, UpdateConfig

__all__ = ["ArithmeticData", "EvaluationPlan", "FileData", "IterativeRLConfig", "PretrainedPolicy", "RewardModelPlan"]


class ArithmeticData(Config):
    """The built-in world: demonstrations by a mixture of authors, questions of its train split, held-out sets."""

    kind: Literal["arithmetic"] = "arithmetic"
    "Selects the built-in world."
    demonstrations: DemonstrationConfig = DemonstrationConfig()
    "What supervised fine-tuning imitates (train split)."
    train: ArithmeticConfig
    "Questions for RL (train split)."
    evaluation: dict[str, ArithmeticConfig]
    "Named held-out sets."

    @model_validator(mode="after")
    def _one_border(self) -> ArithmeticData:
        """Train and held-out sets share nothing only if all draw the border between them at the same place."""
        shares = {part.held_out_share for part in (self.demonstrations.chains, self.train, *self.evaluation.values())}
        if len(shares) > 1:
            raise ValueError(f"held_out_share must be the same in every set, found {sorted(shares)}")
        return self


class FileData(Config):
    """Question sets in files or data sets of others."""

    kind: Literal["files"] = "files"
    "Selects question files."
    path: str = "."
    "Folder that the sets' own paths are relative to."
    train: QuestionFileConfig
    "Questions for RL; those with solutions are the demonstrations of supervised fine-tuning."
    evaluation: dict[str, QuestionFileConfig]
    "Named held-out sets."


class EvaluationPlan(Config):
    """When and how the policy is evaluated; the first and the last policy always are."""

    every: int = Field(10, ge=0)
    "Steps between evaluations; 0 = only before and after."
    samples: int = Field(8, ge=0)
    "Outputs per question for mean@k, pass@k and maj@k; 0 = greedy only."
    temperature: float = Field(1.0, gt=0)
    "Temperature of those samples. The paper's Fig. 7 has 0.7; 1 is the policy as it is trained."
    greedy: bool = True
    "Also decode greedily."
    backend: BackendConfig | None = None
    "What decodes held-out outputs; null = what decodes those of training."
    estimates: EvaluationConfig = EvaluationConfig()
    "The K of pass@K and maj@K, and the bootstrap."

    def is_due(self, step: int, last: int) -> bool:
        """Whether the policy after `step` is to be evaluated."""
        return step == last or (self.every > 0 and step % self.every == 0)

    def modes(self, rollout: RolloutConfig) -> list[tuple[str, RolloutConfig, EvaluationConfig]]:
        """What an evaluation runs: name, sampling (that of training but for G, temperature and backend), and estimates."""
        modes = []
        if self.backend is not None:
            rollout = rollout.override({"backend": self.backend.model_dump(mode="json")})
        if self.greedy:
            modes.append(
                ("greedy", rollout.override({"G": 1, "temperature": 0.0}), self.estimates.override({"ks": [1]}))
            )
        if self.samples:
            sampling = rollout.override({"G": self.samples, "temperature": self.temperature})
            modes.append(("sampled", sampling, self.estimates))
        return modes

    @model_validator(mode="after")
    def _enough_samples(self) -> EvaluationPlan:
        if self.samples and max(self.estimates.ks) > self.samples:
            raise ValueError(
                f"estimates.ks: {max(self.estimates.ks)} needs as many samples per question, found {self.samples}"
            )
        return self


class RewardModelPlan(Config):
    """Learned rewards (DeepSeekMath, 4.1.2-4.1.4): models that learn from rule labels (5.2.1), again after every iteration."""

    models: tuple[RewardModelConfig, ...] = Field((RewardModelConfig(),), min_length=1, max_length=2)
    "An outcome model, a process model, or one of each; the process model's step rewards serve process supervision."
    trunk: Literal["base", "initial_policy"] = "base"
    """Whose trunk a model begins with: `base`, the model before supervised fine-tuning (4.2), or `initial_policy`. A base made
    from scratch knows nothing; take `initial_policy` there."""
    questions: PositiveInt = 1024
    "Training questions whose outputs (`rollout.G` each) are labelled per training. The paper gives no number."
    step_labels: StepLabelsConfig = RuleStepsConfig()
    """Where a process model's labels come from: `rules`, exact and of the built-in world only, or `monte_carlo`, completions
    of each step as in Math-Shepherd, which the paper follows (4.2)."""
    training: RewardTrainingConfig = RewardTrainingConfig()
    "Objective, passes, optimizer."
    scoring: ScoringConfig = ScoringConfig()
    "How scores become rewards."
    retrain: bool = True
    "Algorithm 1, line 11: train on after each iteration; false = the models stay as they were before the first."
    replay: ReplayConfig = ReplayConfig()
    "How much history joins the fresh labels (4.1.4: 10 %)."
    gauges: GaugeConfig = GaugeConfig()
    "How the models are held against the rules, on the outputs of every step."
    limits: GaugeLimits = GaugeLimits()
    "Gauges that stop the run."
    held_out_questions: NonNegativeInt = 128
    """Questions of the first held-out set whose outputs show, after every iteration, how the models have aged and what
    retraining mended (`rm/held_out_auc/...`); 0 = not measured. Ours."""

    @model_validator(mode="after")
    def _one_of_each_kind(self) -> Self:
        kinds = [model.kind for model in self.models]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"models: expected at most one of each kind, found {kinds}")
        if "process" in kinds and self.training.objective.kind == "bradley_terry":
            raise ValueError("training.objective: steps have no pairs; a process model needs pointwise")
        if "process" not in kinds and self.step_labels.kind == "monte_carlo":
            raise ValueError(
                "step_labels: monte_carlo labels steps, and no model learns from them; add {kind: process} to models, or set "
                "step_labels.kind=rules"
            )
        return self


class IterativeRLConfig(Config):
    """Algorithm 1: I iterations of M steps, from a policy made here or by others; GRPO, or another row of Table 10."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    "Name of the run: MLflow's run name and the folder of its summary."
    experiment: str = Field("cohort", pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    "MLflow experiment, one per study."
    seed: int = Field(0, ge=0)
    "Seed of everything random in the flow."
    data: Annotated[ArithmeticData | FileData, Field(discriminator="kind")]
    "Where questions and demonstrations come from."
    prompt: PromptConfig = PromptConfig()
    "How a question becomes the policy's input."
    policy: Annotated[PolicyConfig | PretrainedPolicy, Field(discriminator="kind")]
    "The model before supervised fine-tuning."
    sft: SFTConfig | None = None
    "Supervised fine-tuning before RL; null = RL starts from the policy as given."
    iterations: int = Field(1, ge=0)
    "I of Algorithm 1: how often the reference becomes the policy."
    steps: int = Field(ge=1)
    "M of Algorithm 1: exploration stages per iteration."
    questions_per_step: int = Field(16, ge=1)
    "Questions of an exploration stage. The paper's batch of 1,024 is read as outputs: 16 questions of 64 (4.2)."
    data_source: DataSource = "policy"
    """Whose outputs are learned from (Table 10): the policy's as it is (online), the initial policy's (offline), or
    demonstrations (as many as there would be outputs)."""
    dynamic_sampling: NonNegativeInt = 0
    """DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): up to so many further draws of questions per step, to replace
    groups whose rewards are all equal. 0, the paper's: such groups stay."""
    rollout: RolloutConfig = RolloutConfig()
    "Sampling of the G outputs per question."
    reward: RewardConfig = RewardConfig()
    "r by rules: what is learned from, or with `reward_model` what its labels and gauges come from."
    reward_model: RewardModelPlan | None = None
    "r by learned models in place of the rules; null: rules. For data that is scored at all (not demonstrations)."
    advantage: AdvantageConfig = GroupConfig()
    "A-hat: what the gradient coefficient is made of."
    critic: CriticConfig | None = None
    "PPO's learned value function; null for every other method."
    update: UpdateConfig = UpdateConfig()
    "The policy update."
    reference_pass: Literal["inline", "stage"] = "inline"
    """Where pi_ref scores the outputs. `inline`: in the update, loaded beside the policy. `stage`: before it, in a cached pass
    that loads and frees the reference. The same values up to their last bits (`stages/logprobs/reference.py`)."""
    evaluation: EvaluationPlan = EvaluationPlan()
    "Held-out evaluation."
    preflight: PreflightConfig = PreflightConfig()
    "When the run stops before its first update, since there is nothing to learn from."

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        complaints = [*self._misfits_of_the_row(), *self._misfits_of_the_outputs(), *self._misfits_of_the_parts()]
        if complaints:
            raise ValueError("\n    ".join(complaints))
        return self

    def _misfits_of_the_row(self) -> Iterator[str]:
        """What does not belong to the objective's row of Table 10."""
        kind, row = self.update.objective.kind, self.update.objective.ROW
        if self.data_source not in row.sources:
            yield f"data_source: {kind} learns from {_either(row.sources)}, found {self.data_source}"
        if self.advantage.kind not in row.advantages:
            yield f"advantage.kind: {kind} takes {_either(row.advantages)}, found {self.advantage.kind}"
        if (self.advantage.kind == "gae") != (self.critic is not None):
            yield "critic: advantage.kind gae (PPO) needs one, and nothing else does; set critic={} or null"
        if self.data_source == "initial_policy" and row.uses_ratio and self.update.old_logprobs != "rollout":
            yield (
                f"update.old_logprobs: {kind} on outputs of the initial policy needs that policy's log-probabilities in its "
                "ratio; set update.old_logprobs=rollout"
            )

    def _misfits_of_the_outputs(self) -> Iterator[str]:
        """What does not go with where the outputs come from, and how they are sampled."""
        source, update, sampled = self.data_source, self.update, self.rollout.temperature
        yield from self._misfits_of_a_server()
        if self.dynamic_sampling and source != "policy":
            yield "dynamic_sampling: only outputs of the current policy can be drawn again"
        if update.correction.kind != "none" and source != "policy":
            yield (
                "update.correction: its weights compare rollout engine and trainer for one and the same policy, and these "
                f"outputs are not the current one's (data_source: {source}); set update.correction.kind=none"
            )
        if source == "demonstrations":
            if update.old_logprobs == "rollout":
                yield "update.old_logprobs: no engine recorded any for demonstrations; set update.old_logprobs=trainer"
            sampled = 1.0  # what demonstrations are recorded with
        if sampled == 0:
            yield "rollout.temperature: greedy outputs come from no distribution; nothing can be learned from them by RL"
        if update.temperature not in (None, sampled):
            yield f"update.temperature: {update.temperature:g} differs from that of the outputs, {sampled:g}"

    def _misfits_of_a_server(self) -> Iterator[str]:
        """A server keeps the weights that it was started with, and training changes the policy's."""
        serving, evaluating = self.rollout.backend.kind, (self.evaluation.backend or self.rollout.backend).kind
        fixed = "a server keeps the weights it was started with"
        if serving == "vllm_server" and self.data_source == "policy":
            yield f"rollout.backend: {fixed}, and data_source policy samples from changing ones; set kind vllm or hf"
        if evaluating == "vllm_server":
            yield f"evaluation.backend: {fixed}, and each policy evaluated has others; set evaluation.backend.kind=vllm or hf"

    def _misfits_of_the_parts(self) -> Iterator[str]:
        advantage, objective = self.advantage, self.update.objective
        penalty = getattr(advantage, "kl_in_reward", 0.0)
        if penalty and isinstance(objective, GRPOConfig) and objective.beta > 0:
            yield (
                f"advantage.kl_in_reward={penalty:g} and update.objective.beta={objective.beta:g} would count the KL term "
                "twice; set one of them to 0"
            )
        if advantage.kind in ("group", "pairs") and self.rollout.G < 2:
            yield f"rollout.G: advantages within a group need at least 2 outputs per question, found {self.rollout.G}"
        yield from self._misfits_of_the_steps()
        longest = self.rollout.max_output_tokens
        for component in self.reward.components:
            if isinstance(component, OverlongConfig) and component.max_tokens != longest:
                yield (
                    f"reward.components: {component.name!r} punishes fully from max_tokens={component.max_tokens} on, and "
                    f"outputs end at rollout.max_output_tokens={longest}: with another border it would meet none of them, "
                    "or whole ones like cut ones; set them equal"
                )

    def _misfits_of_the_steps(self) -> Iterator[str]:
        """What process supervision and process models lack."""
        plan, by_rules = self.reward_model, any(part.kind == "steps" for part in self.reward.components)
        learned = plan is not None and any(model.kind == "process" for model in plan.models)
        if isinstance(self.advantage, GroupConfig) and self.advantage.supervision == "process":
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


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(names)
