"""Configure a study of a reward model on given solutions: settings, recipes, and which one a command means."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, PositiveInt, model_validator

from flows.config import PretrainedPolicy
from flows.config.resolve import differences, read_overrides, read_values
from pipeline.config import Config, ConfigError, parse_settings
from stages.data import ColumnsConfig, Feature, QuestionFileConfig, SolutionFileConfig
from stages.reward import AccuracyConfig, RewardConfig, unlearned_components
from stages.reward_model import GaugeConfig, ScoringConfig
from stages.reward_training import RewardTrainingConfig
from stages.sft import PolicyConfig, SFTConfig
from stages.text import BPETokenizerConfig, PromptConfig
from stages.training import MuonConfig, TrainingConfig

_SHORTCUTS: dict[str, tuple[Feature, ...]] = {
    "length": ("tokens",),
    "format": ("answered", "whole_answer", "answer_digits", "lines", "equations"),
    "author": ("author",),
    "question length": ("question_tokens",),
}


class RewardModelStudyConfig(Config):
    """An outcome reward model learned from labelled solutions, compared with baselines on questions it has not seen."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    "Name of the study: MLflow's run name and that of its report."
    experiment: str = Field("reward_models", pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    "MLflow experiment."
    seed: int = Field(0, ge=0)
    "Seed of the first training: the order of its questions."
    seeds: PositiveInt = 1
    "Trainings, each with the next seed. They share the trunk; another one comes with `policy.seed` and `sft.seed`."
    path: str = "."
    "Folder that the files' own paths are relative to."
    solutions: SolutionFileConfig
    "The solutions to learn from and to be measured on."
    max_disagreement: float = Field(0.0, ge=0, le=1)
    """Largest share of the solutions whose own label the rules may contradict. More is an error, less a warning; the rules'
    verdict is what counts."""
    held_out_share: float = Field(0.2, gt=0, lt=1)
    "Share of the questions that nothing is learned from, by a hash of their text."
    validation_share: float = Field(0.16, gt=0, lt=1)
    "Share of all questions, from the other ones, that settings are chosen on with `judged_on: validation`."
    judged_on: Literal["held_out", "validation"] = "held_out"
    """What the tables are of. `validation`: neither learns from nor looks at the held-out questions; for choosing settings.
    `held_out`: learns from all others, validation questions included; for reporting."""
    demonstrations: QuestionFileConfig | None = None
    """Questions with right solutions, which the tokenizer is made from and `sft` imitates; null: the tokenizer is made from the
    solutions to learn from."""
    answer_line: str = "#### {answer}"
    "Last line of a demonstration."
    prompt: PromptConfig = PromptConfig()
    "Text around a question."
    max_tokens: PositiveInt | None = None
    "Longer solutions, question included, are left out on both sides and counted; null: none is, and the window must hold all."
    policy: Annotated[PolicyConfig | PretrainedPolicy, Field(discriminator="kind")]
    "The trunk before any training."
    sft: SFTConfig | None = None
    "Supervised training of the trunk on the demonstrations before it becomes a reward model; null: none."
    reward: RewardConfig = RewardConfig(components=(AccuracyConfig(),))
    "The rules, whose verdict is the label."
    training: RewardTrainingConfig = RewardTrainingConfig()
    "Objective, passes, optimizer."
    scoring: ScoringConfig = ScoringConfig()
    "Batching and precision of the scores."
    gauges: GaugeConfig = GaugeConfig()
    "Intervals and bins."
    shortcuts: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9 ._-]{0,63}$")], tuple[Feature, ...]] = Field(
        default=_SHORTCUTS | {"all of these": tuple(each for features in _SHORTCUTS.values() for each in features)},
        min_length=1,
    )
    "Baselines: each a logistic regression on these features of the surface, fitted on the rows that the model learns from."

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        complaints = []
        if self.held_out_share + self.validation_share >= 1:
            complaints.append("held_out_share and validation_share: together they leave no question to learn from")
        if self.sft is not None and self.demonstrations is None:
            complaints.append("sft: imitates right solutions; name a file of them (demonstrations), or set sft to null")
        if empty := [name for name, features in self.shortcuts.items() if not features]:
            complaints.append(f"shortcuts: {empty[0]!r} has no feature")
        if unlearned := unlearned_components(self.reward):
            complaints.append(f"reward.components: {unlearned[0].name!r} says nothing of the label; leave it out")
        if complaints:
            raise ValueError("\n    ".join(complaints))
        return self


def gsm8k_solutions() -> RewardModelStudyConfig:
    """Train a small reward model from scratch on a CPU, on OpenAI's sampled GSM8K solutions by four models."""
    return RewardModelStudyConfig(
        name="gsm8k_solutions",
        path=".",  # --set path=FOLDER
        solutions=SolutionFileConfig(
            source=QuestionFileConfig(
                path="gsm8k_example_model_solutions.jsonl",
                columns=ColumnsConfig(answer=None, solution="ground_truth"),
                answer_marker="A:",
                remove_calculator_marks=True,  # ours: a third of the tokens, which repeat what is next to them
            ),
            authors=("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"),
            label="is_correct",
        ),
        demonstrations=QuestionFileConfig(path="gsm8k_train.jsonl", remove_calculator_marks=True),
        answer_line="A: {answer}",  # as the solutions end
        prompt=PromptConfig(suffix="\n"),  # ours
        max_tokens=1024,  # ours: the window; the one solution beyond it is a run of digits
        policy=PolicyConfig(
            settings={
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": 1024,
                "tie_word_embeddings": True,
            },  # ours: 1.1 M parameters, those of gsm8k_cpu
            tokenizer=BPETokenizerConfig(vocab_size=2048),  # ours
        ),
        sft=SFTConfig(
            training=TrainingConfig(optimizer=MuonConfig(learning_rate=3e-3), warmup_steps=40, threads=1),
            batch_size=32,
            max_steps=300,
            decay_steps=100,
            length_pool=8,
        ),  # ours: those of gsm8k_cpu
        reward=RewardConfig(
            components=(AccuracyConfig(verifier="exact"),)
        ),  # ours: all labels agree, no process needed
        training=RewardTrainingConfig(
            epochs=2,  # ours
            questions_per_update=16,  # ours
            micro_batch_tokens=4096,  # ours: larger ones are slower on a CPU
            training=TrainingConfig(optimizer=MuonConfig(learning_rate=2e-3), warmup_steps=10, threads=1),  # ours
        ),
        scoring=ScoringConfig(threads=1),
    )


STUDIES: dict[str, Callable[[], RewardModelStudyConfig]] = {"gsm8k_solutions": gsm8k_solutions}
"""Recipes of studies by name."""


class StudyChoice(NamedTuple):
    """A configuration, and the recipe that it is a variation of."""

    config: RewardModelStudyConfig
    base: RewardModelStudyConfig

    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Return the dotted keys whose value differs from the recipe's: what it was, what it is."""
        return differences(self.base, self.config)


def choose_study(source: str, files: Sequence[Path] = (), settings: Sequence[str] = ()) -> StudyChoice:
    """Return the configuration named by `source`, a recipe or a YAML file, changed by `files` and then by `settings`.

    Raises:
        ConfigError: no such recipe or file, all that is wrong in the result, or a reward function that is not there.
    """
    base = STUDIES[source]() if source in STUDIES else _from_file(source)
    changes = [change for file in files for change in read_overrides(file)] + parse_settings(settings)
    origin = " + ".join([source, *map(str, files), *(["--set"] if settings else [])])
    config = base.override(changes, source=origin) if changes else base
    config.reward.key()  # reads the files of reward functions, so that one that is not there is found here
    return StudyChoice(config, base)


def _from_file(source: str) -> RewardModelStudyConfig:
    if not Path(source).is_file():
        near = difflib.get_close_matches(source, STUDIES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"recipes: {', '.join(STUDIES)}"
        raise ConfigError(f"{source}: neither a recipe of a study nor a YAML file; {hint}")
    return RewardModelStudyConfig.parse(read_values(Path(source)), source=source)
