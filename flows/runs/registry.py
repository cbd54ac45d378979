"""What MLflow's registry gets of a run: the data it read, the reward models it trained, and the policies it came to."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Final

from flows.config import IterativeRLConfig
from flows.runs.ledger import Ledger
from flows.runs.summary import Summary
from pipeline.artifact import Artifact
from pipeline.events import DriftDone, Event, StageDone, StepDone
from pipeline.store import StoreError, current_store
from pipeline.tracking import Tracker
from pipeline.tracking.registry import TrackedModel
from stages.models import Checkpoint, reward_kind

__all__ = ["POLICY", "REWARD_MODEL", "Registrar", "policies_of"]

POLICY: Final = "policy"
REWARD_MODEL: Final = "reward-model"

_DATA_STAGES: Final = (
    "arithmetic_questions",
    "arithmetic_demonstrations",
    "read_questions",
    "demonstrations_from_solutions",
)
_AGEING: Final = ("new_model_new_policy", "new_model_old_policy", "old_model_old_policy")
"""Where drift measures the models that were trained last: on the policy they were trained for, where that was asked."""


class Registrar:
    """Tells a tracker of data sets and reward models as they come to be; `take` is a fold."""

    def __init__(self, tracker: Tracker, config: IterativeRLConfig, tags: Mapping[str, str]) -> None:
        self._tracker = tracker
        arm = {"arm": tags.get("arm", config.name), "seed": str(config.seed)}
        self._tags = {"run": config.name, "experiment": config.experiment, **arm}
        # A flow makes its data before anything else, in this order (`flows.algorithm.data.prepare_data`).
        self._sets = ["train", "demonstrations", *config.data.evaluation]
        self._step = 0
        self._iteration = 0
        self._trained: list[TrackedModel] = []
        """Reward models whose measure on held-out outputs is still to come."""

    def take(self, event: Event) -> None:
        """Note one event."""
        match event:
            case StageDone():
                self._take_stage(event.stage, event.result, event.key)
            case StepDone():
                self.flush()
                self._step, self._iteration = event.step, event.iteration + 1
            case DriftDone():
                keys = [event.made[which] for which in _AGEING if which in event.made]
                self.flush(current_store().action(keys[0])["metrics"].get("rm/auc") if keys else None)

    def flush(self, held_out_auc: float | None = None) -> None:
        """Register the reward models that were trained last, with their AUC on held-out outputs where it is known."""
        models, self._trained = self._trained, []
        for model in models:
            # Several models are measured as one.
            known = {} if held_out_auc is None or len(models) > 1 else {"held_out_auc": f"{held_out_auc:.4f}"}
            self._tracker.log_model(TrackedModel(model.name, model.digest, model.step, {**model.tags, **known}))

    def conclude(self, summary: Summary, ledger: Ledger) -> None:
        """Register the policies of a run that ended well."""
        self.flush()
        for model in policies_of(summary, ledger, self._tags):
            self._tracker.log_model(model)

    def _take_stage(self, stage: str, digest: str, key: str) -> None:
        if stage in _DATA_STAGES and self._sets:
            name = self._sets.pop(0)
            if name == "demonstrations" and stage == "read_questions":  # a set without solutions has none
                name = self._sets.pop(0)
            use = {"train": "training", "demonstrations": "supervised fine-tuning"}.get(name, "evaluation")
            rows = current_store().manifest(digest)["rows"]
            self._tracker.log_dataset(name, digest, context=use, rows=rows)
        elif stage == "train_reward_model":
            tags = {**self._tags, "iteration": str(self._iteration), **_described(digest, key)}
            self._trained.append(TrackedModel(REWARD_MODEL, digest, self._step, tags))


def policies_of(summary: Summary, ledger: Ledger, tags: Mapping[str, str]) -> list[TrackedModel]:
    """The best policy on the first held-out set, where that is another one that RL made, and last the final one."""
    accuracies = {
        f"accuracy.{name}": f"{metrics.get('accuracy', metrics.get('greedy_accuracy', 0.0)):.4f}"
        for name, metrics in summary.after.items()
    }
    final = TrackedModel(POLICY, summary.policy, summary.steps, {**tags, "which": "final", **accuracies})
    held_out = next(iter(summary.best), None)
    step, accuracy = summary.best[held_out] if held_out else (0, 0.0)
    digest = ledger.steps.get(step, {}).get("update_policy", final.digest)
    if digest == final.digest:
        return [final]
    return [
        TrackedModel(POLICY, digest, step, {**tags, "which": "best", f"accuracy.{held_out}": f"{accuracy:.4f}"}),
        final,
    ]


def _described(digest: str, key: str) -> dict[str, str]:
    """Kind and training metrics of a reward model; without the kind where its files were pruned."""
    metrics = Artifact(digest, key).metrics
    tags = {name: f"{metrics[f'rm/{name}']:.4g}" for name in ("loss", "train_accuracy") if f"rm/{name}" in metrics}
    with contextlib.suppress(StoreError):
        tags["kind"] = reward_kind(Checkpoint(digest))
    return tags
