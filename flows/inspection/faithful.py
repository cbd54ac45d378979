"""Compare a configuration with the paper: list its numbers, what deviates from them, and what it leaves open.

`PAPER` is the only place that lists the paper's values for a run; `SILENT` names the fields it gives no value for. The reason
for our choice is the text under the field, or here where that says only what the field means; docs/decisions.md has what
others do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.config import IterativeRLConfig, PretrainedPolicy
from flows.config.methods import METHODS
from flows.config.methods import PAPER as TABLE_10
from flows.inspection.difference_view import broken, column, titled
from flows.wording import number


@dataclass(frozen=True)
class PaperValue:
    """The paper's value of a field."""

    key: str
    """Dotted key of the configuration."""
    value: Any
    where: str
    """Section, equation, table or figure."""
    note: str = ""
    objectives: tuple[str, ...] = ()
    """Objectives (`update.objective.kind`) that it holds for; empty: all."""


@dataclass(frozen=True)
class Deviation:
    """A field that is not as the paper has it."""

    key: str
    paper: str
    where: str
    here: Any


@dataclass(frozen=True)
class OwnChoice:
    """A field that the paper gives no value for."""

    key: str
    here: Any
    reason: str


PAPER: Final = (
    # Reinforcement learning: "The KL coefficient is 0.04. For each question, we sample 64 outputs. The max length is set to
    # 1024, and the training batch size is 1024." (4.2)
    PaperValue("update.training.optimizer.learning_rate", 1e-6, "4.2"),
    PaperValue("update.objective.beta", 0.04, "4.2", objectives=("grpo",)),
    PaperValue("rollout.G", 64, "4.2"),
    PaperValue("rollout.max_output_tokens", 1024, "4.2", "maximal length of 1,024, read as that of the output"),
    PaperValue("questions_per_step", 16, "4.2", "batch of 1,024, read as outputs: 16 questions of 64"),
    PaperValue("update.mu", 1, "4.2", "a single update following each exploration stage"),
    PaperValue("update.mini_batches", 1, "4.2", "a single update following each exploration stage"),
    PaperValue("iterations", 3, "5.2.1, Fig. 6", "one iteration and two further rounds"),
    PaperValue("update.training.adapter", None, "Algorithm 1", "all weights of pi_theta are trained"),
    PaperValue("dynamic_sampling", 0, "Algorithm 1"),
    PaperValue("curriculum", None, "Algorithm 1", "line 5 draws from all questions"),
    PaperValue("overlap", 0, "Algorithm 1", "line 7 samples from the policy as it is"),
    PaperValue("update.correction.kind", "none", "Eq. 3"),
    # The objectives as they are written.
    PaperValue("update.objective.divergence", "k3", "Eq. 4", objectives=("grpo",)),
    PaperValue("update.objective.aggregation", "sequence_mean", "Eq. 3", objectives=("grpo",)),
    PaperValue("update.objective.length_normalised", True, "Eq. 12", objectives=("dpo",)),
    PaperValue("advantage.baseline", "mean", "4.1.2", objectives=("grpo",)),
    PaperValue("advantage.scale", "std", "4.1.2", objectives=("grpo",)),
    PaperValue("advantage.kl_in_reward", 0.0, "Eq. 3", "in the loss, not in the reward", objectives=("grpo",)),
    # Models, data, prompt.
    PaperValue("policy.kind", "pretrained", "4.2", "DeepSeekMath-Instruct 7B"),
    PaperValue("data.kind", "files", "4.2", "144K questions related to GSM8K and MATH"),
    PaperValue(
        "prompt.template", "deepseek_math_en", "4.2", "chain-of-thought format; wording from the model's README"
    ),
    PaperValue("prompt.chat", "deepseek_math", "4.2", "turns from the model's README"),
    # Supervised fine-tuning, where the run has any.
    PaperValue("sft.training.optimizer.learning_rate", 5e-5, "3.2"),
    PaperValue("sft.training.schedule", "constant", "3.2"),
    PaperValue("sft.training.adapter", None, "3.2", "all weights are trained"),
    PaperValue("sft.batch_size", 256, "3.2"),
    PaperValue("sft.max_steps", 500, "3.2"),
    PaperValue("sft.stop_loss", None, "3.2", "500 steps, whatever the loss"),
    PaperValue("sft.decay_steps", 0, "3.2", "constant learning rate"),
    PaperValue("sft.aggregation", "sequence_mean", "Eq. 6"),
    # Reward models, where the method has any.
    PaperValue("reward_model.training.training.optimizer.learning_rate", 2e-5, "4.2"),
    PaperValue("reward_model.trunk", "base", "4.2", "the model before supervised fine-tuning"),
    PaperValue("reward_model.retrain", True, "4.1.4, Algorithm 1"),
    PaperValue("reward_model.replay.share", 0.1, "4.1.4"),
    PaperValue("reward_model.step_labels.kind", "monte_carlo", "4.2", "as in Math-Shepherd"),
    # Evaluation, Fig. 7.
    PaperValue("evaluation.temperature", 0.7, "Fig. 7"),
    PaperValue("evaluation.samples", 64, "Fig. 7"),
    PaperValue("evaluation.estimates.ks", (1, 4, 8, 16, 32, 64), "Fig. 7"),
)
"""The paper's values of a run. `deviations` has what depends on the method (Table 10) or on several fields at once."""

SILENT: Final = {
    "steps": "M of Algorithm 1, steps per iteration; Fig. 6 has about 5,300 in all.",
    "rollout.temperature": "1: what is sampled is the policy that is trained.",
    "rollout.top_p": "",
    "reward.truncated": "",
    "advantage.ddof": "",
    "advantage.eps": "",
    "advantage.degenerate": "",
    "advantage.truncated": "",
    "advantage.kl_in_reward": "",
    "advantage.gamma": "",
    "advantage.lam": "",
    "advantage.whiten": "",
    "update.objective.eps": "",
    "update.objective.beta": "",
    "update.training.optimizer.kind": "The usual one; the base model was trained with it (2.2.1).",
    "update.training.optimizer.betas": "torch's.",
    "update.training.optimizer.eps": "torch's.",
    "update.training.optimizer.weight_decay": "torch's AdamW, without decay.",
    "update.training.optimizer.decayed": "",
    "update.training.warmup_steps": "None: 4.2 gives one learning rate.",
    "update.training.schedule": "Constant: 4.2 gives one learning rate.",
    "update.training.max_grad_norm": "",
    "update.training.optimizer_state": "Carried: the moments of one stage are those of the next.",
    "update.merge_equal_outputs": "",
    "critic.mu": "",
    "critic.training.optimizer.learning_rate": "Its default, 1e-5, is ten times the policy's, as in verl.",
    "reward_model.questions": "",
    "reward_model.models": "",
    "reward_model.step_labels.samples": "",
    "reward_model.step_labels.estimate": "",
    "reward_model.step_labels.outputs_per_question": "",
    "reward_model.training.objective.kind": "Pointwise, as in Math-Shepherd, whose way 4.2 follows.",
    "reward_model.training.epochs": "",
    "reward_model.training.questions_per_update": "",
    "reward_model.training.decay": "",
    "reward_model.replay.share_of": "",
    "reward_model.weight": "",
}
"""Fields whose value the paper does not give, in the order of a step; with a reason where the field's own text has none."""

_ABSENT: Final = object()


def deviations(config: IterativeRLConfig) -> list[Deviation]:
    """Return every field that is not as in the paper. For a row of Table 10 that row counts, for later methods GRPO's."""
    found = [Deviation(paper.key, _text(paper), paper.where, _value(config, paper.key)) for paper in _missed(config)]
    return [*_method(config), *found]


def choices(config: IterativeRLConfig) -> list[OwnChoice]:
    """Return the fields the paper leaves open, with what this configuration has."""
    said = {paper.key for paper in PAPER if _holds(paper, config)}
    found = []
    for key, reason in SILENT.items():
        value = _value(config, key)
        if value is not _ABSENT and key not in said:
            found.append(OwnChoice(key, value, reason or _documentation(config, key)))
    return found


def _missed(config: IterativeRLConfig) -> Iterator[PaperValue]:
    for paper in PAPER:
        here = _value(config, paper.key)
        if paper.key == "reward_model.trunk" and here is not _ABSENT:
            if not _is_base(here, config):
                yield paper
            continue
        if here is _ABSENT or not _holds(paper, config) or here == paper.value:
            continue
        if paper.key == "evaluation.estimates.ks" and {1, *here} == set(paper.value):
            continue  # Pass@1 and Maj@1 are the accuracy, which is always measured
        yield paper


def _is_base(trunk: Any, config: IterativeRLConfig) -> bool:
    """Return whether it may be a model before supervised fine-tuning: this run's, or a pretrained one."""
    return isinstance(trunk, PretrainedPolicy) or (trunk == "base" and config.sft is not None)


def _method(config: IterativeRLConfig) -> Iterator[Deviation]:
    """Compare what a row of Table 10 decides: objective, data source, advantage, whose reward; and what the rules read."""
    objective = config.update.objective
    if objective.kind not in TABLE_10:
        yield Deviation("update.objective.kind", " or ".join(TABLE_10), "Table 10", objective.kind)
    row = METHODS[objective.kind if objective.kind in TABLE_10 else "grpo"]
    if config.data_source != row["data_source"]:
        yield Deviation("data_source", row["data_source"], "Table 10", config.data_source)
    if config.advantage.kind != row["advantage"]["kind"]:
        yield Deviation("advantage.kind", row["advantage"]["kind"], "Table 10", config.advantage.kind)
    learned = objective.kind not in TABLE_10 or objective.ROW.reward == "Model"
    if learned and config.reward_model is None:
        yield Deviation(
            "reward_model", "a model that learns from the rules' verdicts", "Table 10, 5.2.1", "null: rules"
        )
    kinds = {component.kind for component in config.reward.components}
    if kinds - {"accuracy", "steps"}:
        yield Deviation("reward.components", "the correctness of the answer", "5.2.1", ", ".join(sorted(kinds)))
    if config.sft is not None:
        yield Deviation("sft", "examples concatenated up to 4,096 tokens", "3.2", "each example by itself")


def _holds(paper: PaperValue, config: IterativeRLConfig) -> bool:
    """Return whether the paper's value is about this configuration."""
    if paper.key.startswith("reward_model.step_labels"):
        return config.reward_model is not None and any(model.kind == "process" for model in config.reward_model.models)
    return not paper.objectives or config.update.objective.kind in paper.objectives


def _text(paper: PaperValue) -> str:
    value = "null" if paper.value is None else str(paper.value)
    return f"{value} ({paper.note})" if paper.note else value


def _value(config: BaseModel, key: str) -> Any:
    """Return the value of a dotted key; `_ABSENT` where a section of it is null, or of a kind without that field."""
    value: Any = config
    for name in key.split("."):
        if not isinstance(value, BaseModel) or name not in type(value).model_fields:
            return _ABSENT
        value = getattr(value, name)
    return value


def _documentation(config: BaseModel, key: str) -> str:
    """Return the text under a field, in one line."""
    section, _, name = key.rpartition(".")
    owner = _value(config, section) if section else config
    text = type(owner).model_fields[name].description or ""
    return " ".join(text.replace("`", "").split())


_WIDE: Final = 110
"""Characters from which on there is room for keys in one line."""


def print_faithfulness(config: IterativeRLConfig, console: Console) -> None:
    """Print every deviation from the paper with its section, then our choices where it is silent, with their reasons."""
    found = deviations(config)
    room = 28 if console.width < _WIDE else 56
    if found:
        table = _table("field", "paper", "section", "here")
        for part in found:
            table.add_row(broken(part.key, room), Text(part.paper), part.where, Text(_shown(part.here)))
        fields = "field is" if len(found) == 1 else "fields are"
        console.print(titled(f"{len(found)} {fields} not as in DeepSeekMath (arXiv 2402.03300)", table))
    else:
        console.print("\nevery number of DeepSeekMath (arXiv 2402.03300) that concerns this configuration is as there")
    table = _table("field", "here", "our choice")
    for choice in choices(config):
        table.add_row(broken(choice.key, room), Text(_shown(choice.here)), Text(choice.reason))
    console.print(titled("the paper gives no value for (what others do: docs/decisions.md)", table))


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in headings:
        column(table, heading, fold=heading not in ("field", "section"))
    return table


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, BaseModel):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value)
    if isinstance(value, tuple):
        return ", ".join(str(getattr(part, "kind", part)) for part in value)
    return number(value)
