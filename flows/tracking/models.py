"""What MLflow's registry gets of a run: the data it read, the reward models it trained, and the policies it came to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from flows.runs.ledger import Ledger
from pipeline.events import DriftDone, Event, RunEnded, RunStarted, StageDone, StepDone
from pipeline.store import current_store
from pipeline.tracking.records import Record, dataset, model

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


class ModelsAndData:
    """Logs data sets and models as they come to be; `take` is a fold of the events of one attempt after the other."""

    def __init__(self, log: Callable[[Record], None]) -> None:
        self._log = log
        self._tags: dict[str, str] = {}
        self._sets: list[str] = []
        self._step = 0
        self._iteration = 0
        self._trained: list[Record] = []
        """Reward models whose measure on held-out outputs is still to come."""
        self._kinds: dict[str, str] = {}
        """Digest of a reward model -> its kind."""

    def take(self, event: Event) -> None:
        """Note one event."""
        match event:
            case RunStarted():
                self._start(event)
            case StageDone():
                self._take_stage(event.stage, event.result, event.key)
            case StepDone():
                self._flush()
                self._step, self._iteration = event.step, event.iteration + 1
            case DriftDone():
                keys = [event.made[which] for which in _AGEING if which in event.made]
                self._flush(current_store().action(keys[0])["metrics"].get("rm/auc") if keys else None)

    def conclude(self, event: RunEnded, ledger: Ledger) -> None:
        """Log the policies of a run that ended well, the final one last."""
        self._flush()
        for policy in policies_of(event, ledger, self._tags):
            self._log(policy)

    def _start(self, event: RunStarted) -> None:
        arm = {"arm": event.tags.get("arm", event.name), "seed": event.params.get("seed", "")}
        self._tags = {"run": event.name, "experiment": event.experiment, **arm}
        # A flow makes its data before anything else, in this order (`flows.algorithm.data.prepare_data`).
        held_out = [key.split(".")[2] for key in event.params if key.startswith("data.evaluation.")]
        self._sets = ["train", "demonstrations", *dict.fromkeys(held_out)]
        self._step = self._iteration = 0

    def _flush(self, held_out_auc: float | None = None) -> None:
        """Log the reward models that were trained last, with their AUC on held-out outputs where it is known."""
        models, self._trained = self._trained, []
        for made in models:
            if held_out_auc is not None and len(models) == 1:  # several models are measured as one
                made["tags"]["held_out_auc"] = f"{held_out_auc:.4f}"
            self._log(made)

    def _take_stage(self, stage: str, digest: str, key: str) -> None:
        if stage in _DATA_STAGES and self._sets:
            name = self._sets.pop(0)
            if name == "demonstrations" and stage == "read_questions":  # a set without solutions has none
                name = self._sets.pop(0)
            use = {"train": "training", "demonstrations": "supervised fine-tuning"}.get(name, "evaluation")
            self._log(dataset(name, digest, context=use, rows=current_store().manifest(digest)["rows"]))
        elif stage == "create_reward_model":
            config = current_store().action(key)["arguments"]["config"]["config"]
            self._kinds[digest] = config["kind"]
        elif stage == "train_reward_model":
            tags = {**self._tags, "iteration": str(self._iteration), **self._described(digest, key)}
            self._trained.append(model(REWARD_MODEL, digest, self._step, tags))

    def _described(self, digest: str, key: str) -> dict[str, str]:
        """Return kind and training metrics of a reward model."""
        call = current_store().action(key)
        metrics = call.get("metrics", {})
        tags = {name: f"{metrics[f'rm/{name}']:.4g}" for name in ("loss", "train_accuracy") if f"rm/{name}" in metrics}
        if kind := self._kinds.get(call["arguments"].get("model", {}).get("artifact", "")):
            self._kinds[digest] = tags["kind"] = kind
        return tags


def policies_of(event: RunEnded, ledger: Ledger, tags: dict[str, str]) -> list[Record]:
    """Return the best policy on the first held-out set, where that is another one that RL made, and last the final one."""
    accuracies = {
        f"accuracy.{name}": f"{metrics.get('accuracy', metrics.get('greedy_accuracy')) or 0.0:.4f}"
        for name, metrics in event.final.items()
    }
    steps = max(ledger.steps, default=0)
    final = model(POLICY, event.policy, steps, {**tags, "which": "final", **accuracies})
    held_out = next(iter(event.best), None)
    step, accuracy = event.best[held_out] if held_out else (0, 0.0)
    digest = ledger.steps.get(step, {}).get("update_policy", event.policy)
    if digest == event.policy:
        return [final]
    best = {**tags, "which": "best", f"accuracy.{held_out}": f"{accuracy or 0.0:.4f}"}
    return [model(POLICY, digest, step, best), final]
