"""The parts of a run's configuration, and `RunSettings`, all of its fields."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from flows.runs.checkpoints import CheckpointConfig
from flows.runs.retention import KeepConfig
from pipeline.config import Config
from stages.advantage import AdvantageConfig, GroupConfig
from stages.critic import CriticConfig
from stages.data import ArithmeticConfig, DemonstrationConfig, PromptLimitConfig, QuestionFileConfig
from stages.environment import EnvironmentConfig
from stages.evaluation import EvaluationConfig
from stages.models import COMMIT
from stages.reward import RewardConfig
from stages.reward_model import GaugeConfig, GaugeLimits, ScoringConfig
from stages.reward_training import (
    ReplayConfig,
    RewardModelConfig,
    RewardTrainingConfig,
    RuleStepsConfig,
    StepLabelsConfig,
)
from stages.rollout import BackendConfig, RolloutConfig
from stages.selection import PassRateBand
from stages.sft import PolicyConfig, SFTConfig
from stages.text import PromptConfig
from stages.update import DataSource, UpdateConfig

SetName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
"""As names of runs: it is part of metrics' names."""


class PretrainedPolicy(Config):
    """A policy made by others: a folder in Hugging Face format, a GGUF file, or a model of the hub."""

    kind: Literal["pretrained"] = "pretrained"
    "Selects an existing model."
    path: str = Field(min_length=1)
    """Folder with config.json, safetensors and tokenizer; or a file that ends in .gguf, whose weights are dequantised (needs
    `pip install 'cohort-rl[gguf]'`). Where there is none of that name, `owner/name` of a model on the hub (HF_ENDPOINT names a
    mirror)."""
    revision: str | None = Field(None, pattern=r"^[A-Za-z0-9][\w./-]*$")
    """Commit, tag or branch of a model on the hub; null: `main`. A name is resolved to a commit once, and later runs keep that
    commit. Of a folder, the digest of its Python code (`trust_remote_code`)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model, for architectures that transformers lacks. It runs with your rights: read it
    first. Needs a pinned `revision`; a refused model names what to set."""

    @model_validator(mode="after")
    def _pinned_code(self) -> Self:
        if self.trust_remote_code and not re.fullmatch(COMMIT, self.revision or ""):
            raise ValueError(
                "trust_remote_code: code is trusted as it was read, so pin it: set revision to the 40 hexadecimal digits of a "
                f"commit (of a folder: the digest that the refusal of its code names), found {self.revision}"
            )
        return self


class ArithmeticData(Config):
    """The built-in world: demonstrations by a mixture of authors, questions of its train split, held-out sets."""

    kind: Literal["arithmetic"] = "arithmetic"
    "Selects the built-in world."
    demonstrations: DemonstrationConfig = DemonstrationConfig()
    "What supervised fine-tuning imitates (train split)."
    train: ArithmeticConfig
    "Questions for RL (train split)."
    evaluation: dict[SetName, ArithmeticConfig]
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
    evaluation: dict[SetName, QuestionFileConfig]
    "Named held-out sets."
    max_prompt_tokens: PromptLimitConfig = PromptLimitConfig()
    "How long a prompt may be in every set, and whether longer ones stop the run before it starts or are left out."


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
        """Return whether the policy after `step` is to be evaluated."""
        return step == last or (self.every > 0 and step % self.every == 0)

    def modes(self, rollout: RolloutConfig) -> list[tuple[str, RolloutConfig, EvaluationConfig]]:
        """Return name, sampling (that of training but for G, temperature and backend) and estimates of its parts."""
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
        usual = type(self).model_fields["temperature"].default
        if not self.samples and self.temperature != usual:
            raise ValueError(
                f"temperature: no samples are drawn (samples=0), and greedy decoding has none; expected {usual:g}, found "
                f"{self.temperature:g}"
            )
        return self


class PreflightConfig(Config):
    """Shares at which a run stops before its first update; null = never. The defaults stop what cannot learn.

    Verdicts are those of the rules, also where a learned model rewards: its scores differ even for outputs without an answer.
    """

    truncated: float | None = Field(0.99, gt=0, le=1)
    """Of the outputs, those cut at the length limit and not scored as they are (`reward.truncated`). Ours: what one output in
    a hundred has learned to end is not worth a run, and the limit of tokens is nearly always what is wrong."""
    unreadable: float | None = Field(0.99, gt=0, le=1)
    """Of the outputs, those whose answer was not read: truncated, unparseable, timed out, failed. Ours, for the same reason: a
    component that rewards form gives them unequal rewards, and hides that the rule reward is 0 whatever they answer."""
    without_signal: float | None = Field(1.0, gt=0, le=1)
    """Of the questions, those that the method learns nothing from (`Findings.silent`). At 1 the first update would change
    nothing, or only repeat the KL term; with few questions a smaller share is often chance."""


class RewardModelPlan(Config):
    """Learned rewards (DeepSeekMath, 4.1.2-4.1.4): models that learn from rule labels (5.2.1), again after every iteration."""

    models: tuple[RewardModelConfig, ...] = Field((RewardModelConfig(),), min_length=1, max_length=2)
    "An outcome model, a process model, or one of each; the process model's step rewards serve process supervision."
    trunk: Literal["base", "initial_policy"] | PretrainedPolicy = "base"
    """Whose trunk a model begins with: `base`, the model before this run's supervised fine-tuning (4.2), `initial_policy`, or a
    model of others with the policy's tokenizer. A base made from scratch knows nothing; take `initial_policy` there."""
    questions: PositiveInt = 1024
    "Training questions whose outputs (`rollout.G` each) are labelled per training. The paper gives no number."
    step_labels: StepLabelsConfig = RuleStepsConfig()
    """Where a process model's labels come from: `rules`, exact and of the built-in world only, or `monte_carlo`, completions
    of each step as in Math-Shepherd, which the paper follows (4.2)."""
    training: RewardTrainingConfig = RewardTrainingConfig()
    "Objective, passes, optimizer."
    scoring: ScoringConfig = ScoringConfig()
    "The scale of scores."
    weight: float = Field(1.0, gt=0)
    """Factor of the model's score in the reward. The components of `reward` that say something else than the labels (form,
    language, length, functions) are added by their own weights; a scale of `sigmoid` makes the two commensurable."""
    retrain: bool = True
    """Algorithm 1, line 11: train on after each iteration; false = the models stay as they were before the first, and are
    written without the moments of their optimizer, which no training reads."""
    replay: ReplayConfig = ReplayConfig()
    "How much history joins the fresh labels (4.1.4: 10 %)."
    gauges: GaugeConfig = GaugeConfig()
    "How the models are compared with the rules, on the outputs of every step."
    limits: GaugeLimits = GaugeLimits()
    "Gauges that stop the run."
    held_out_questions: NonNegativeInt = 128
    """Questions of the first held-out set whose outputs show, after every iteration, how the models have aged and what
    retraining restored (`rm/held_out_auc/...`); 0 = not measured. Ours."""

    @property
    def fitting(self) -> RewardTrainingConfig:
        """`training`, whose moments are not kept where no later training reads them."""
        return self.training if self.retrain else self.training.override({"training.optimizer_state": "none"})

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
        if not self.retrain and self.replay != ReplayConfig():
            raise ValueError(
                "replay: with retrain=false no labels join older ones; leave replay out, or set retrain=true"
            )
        return self


class CurriculumConfig(Config):
    """Draw the questions whose pass rate lies in a band, evict what is solved, refill where the band runs dry. Ours.

    With `overlap` too the rewards of the step before are known: outputs are scored before an update begins.
    """

    band: PassRateBand = PassRateBand()
    "Which pass rates are drawn first; then those below the band follow, then those above it."
    window: PositiveInt = 32
    """Steps whose rewards count, of a question those of the last step that drew it. Of earlier steps nothing is known any more:
    what they evicted is unseen again."""
    rewards: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{12,64}$")], ...] = ()
    """First estimates: tables of rewards of questions of `data.train`, of this run's policy or of another's, by their names as
    `cohort show RUN --step N` prints them, the newest last. Each counts as a step before the first."""

    @model_validator(mode="after")
    def _all_within_the_window(self) -> Self:
        if len(self.rewards) > self.window:
            raise ValueError(
                f"window: expected at least {len(self.rewards)}, the number of `rewards`, found {self.window}; the first of "
                "them would not count"
            )
        return self


class RunSettings(Config):
    """The settings of a run, without the check that they fit together (`flows.config.IterativeRLConfig` has it)."""

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
    teacher: PretrainedPolicy | None = None
    """A model with the policy's tokenizer, for what learns from one: `advantage.kind` or `data_source` is `teacher`. A policy
    trained here is one after `cohort export RUN FOLDER`."""
    sft: SFTConfig | None = None
    "Supervised fine-tuning before RL; null = RL starts from the policy as given."
    iterations: int = Field(1, ge=0)
    "I of Algorithm 1: how often the reference becomes the policy."
    steps: int = Field(ge=1)
    "M of Algorithm 1: exploration stages per iteration."
    questions_per_step: int = Field(16, ge=1)
    "Questions of an exploration stage. The paper's batch of 1,024 is read as outputs: 16 questions of 64 (4.2)."
    data_source: DataSource = "policy"
    """Whose outputs are learned from (Table 10): the policy's as it is (online), the initial policy's (offline), demonstrations
    (as many as there would be outputs), or those of `teacher` (SFT: distillation by sequences)."""
    overlap: Literal[0, 1] = 0
    """How many updates the policy that samples a step's outputs is behind the one that learns from them. 0: none, the paper's.
    1: outputs of step k come from policy k-1, the one before the update of step k-1; the first two steps of an iteration are
    both sampled from its first policy. Then pi_old is an earlier policy: set `update.old_logprobs=rollout`, whose ratio is
    clipped against the policy that sampled, or `update.correction.kind=truncated`, which weighs outputs by policy k over
    policy k-1. The lag is part of the keys."""
    side_by_side: Literal["auto", "always", "never"] = "auto"
    """Whether the outputs that `overlap` takes from an earlier policy are sampled while it is updated, in a process of their
    own. It changes no result, no key, and not which run it is. `auto`: where the two share the cores of a CPU: backend `hf`,
    without dynamic_sampling, `rollout.backend.threads` and `update.training.threads` set, and no more of both than cores.
    Elsewhere, on GPUs too, the two run in turns, and no time is saved."""
    dynamic_sampling: NonNegativeInt = 0
    """DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): up to so many further draws of questions per step, to replace
    groups whose rewards are all equal. 0, the paper's: such groups stay."""
    curriculum: CurriculumConfig | None = None
    """Questions by how often the policy gets them right: their earlier rewards. null, the paper's: each question comes once in
    every pass through the set."""
    rollout: RolloutConfig = RolloutConfig()
    "Sampling of the G outputs per question."
    environment: EnvironmentConfig | None = None
    """What answers calls within outputs: tools. Outputs have several turns then; what the environment writes is not learned
    from, and counts towards `rollout.max_output_tokens`. null, the paper's RL: outputs of one turn."""
    reward: RewardConfig = RewardConfig()
    """r by rules: what is learned from. With `reward_model` its labels and gauges come from the component that reads the answer
    and from `steps`, whose place the model's score takes; the other components and `truncated` hold for the reward as ever."""
    reward_model: RewardModelPlan | None = None
    "r by learned models in place of the verdict on the answer; null: rules. For data that is scored (not demonstrations)."
    advantage: AdvantageConfig = GroupConfig()
    "A-hat: what the gradient coefficient is made of."
    critic: CriticConfig | None = None
    "PPO's learned value function; null for every other method."
    update: UpdateConfig = UpdateConfig()
    "The policy update."
    reference_pass: Literal["inline", "stage"] = "inline"
    """Where pi_ref scores the outputs. `inline`: in the update, loaded with the policy. `stage`: before it, in a cached pass
    that loads and frees the reference. The same values up to their last bits (`stages/logprobs/stage.py`)."""
    evaluation: EvaluationPlan = EvaluationPlan()
    "Held-out evaluation."
    preflight: PreflightConfig = PreflightConfig()
    "When the run stops before its first update, since there is nothing to learn from."
    checkpoint: CheckpointConfig = CheckpointConfig()
    "Which steps leave a checkpoint on disk."
    keep: KeepConfig = KeepConfig()
    "What stays on disk while the run goes on."
