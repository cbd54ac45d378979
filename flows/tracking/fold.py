"""The fold of a log into the records that MLflow gets: parameters, curves, data, models, how the run ended."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from flows.runs.curve import Points
from flows.runs.ledger import Ledger
from flows.runs.record import RunRecord
from pipeline.event_log import LOG, LogReader
from pipeline.events import DriftDone, Event, Logged, RunEnded, RunStarted, StageDone, StepDone
from pipeline.progress import failsafe
from pipeline.store import current_store
from pipeline.tracking.records import Record, dataset, figure, model, note, point, tags

STATUS: Final = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
"""How an attempt ended -> the status of the run in MLflow."""
CURVE: Final = "learning_curve.png"
NOTE: Final = "note.md"
COMPLETIONS: Final = "completions.json"


class MlflowFold:
    """Folds a log as far as it is written. Events name calls; their metrics are read from the store in use."""

    def __init__(self, folder: Path, sent: int = 0) -> None:
        """Take the folder of a run or a study, and the number of the last event that was sent."""
        self.record = RunRecord(folder)
        self.records: list[Record] = []
        """What is to be sent."""
        self.status = ""
        """Status by the events alone; empty before the first point. A run is RUNNING where it has new points."""
        self.sent = sent
        self.number = 0
        """Number of the last event, and its time."""
        self.time = time.time()
        self._folder = folder
        self._reader = LogReader(folder / LOG)
        self._event = Event()
        self._last_step = 0
        self._ledger = Ledger()
        self._points = Points(log=lambda step, metrics: self._take_point(step, charted(metrics)))
        self._models = ModelsAndData(self._log)

    def read(self) -> None:
        """Note the events that were appended since; what cannot be read of one is left out, with a warning."""
        for event in self._reader.new():
            self._event = event
            for take in (self.record.take, self._ledger.take, self._points.take, self._models.take, self._take):
                with failsafe(f"event {event.number} of {self._folder}"):
                    take(event)
            self.number, self.time = event.number, event.time

    def note_sent(self) -> None:
        """Forget the records."""
        self.records, self.sent = [], self.number

    def _take(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._log(_run_record(event, self._folder.name))
            case Logged(kind="step"):
                self._take_point(event.about["step"], event.about["metrics"])
            case Logged():
                self._log({"kind": event.kind, "name": event.name, **event.about})
            case RunEnded():
                self.status = STATUS[event.status]
                if event.error:
                    reason = event.error if event.status == "failed" else event.error.partition(":")[0]
                    self._log(tags({"cohort.status_reason": reason[:1000]}))
                if event.policy:
                    self._conclude(event)

    def _conclude(self, event: RunEnded) -> None:
        """Log what a run came to."""
        finals = {f"final/{name}/{key}": value for name, part in event.final.items() for key, value in part.items()}
        bests = {f"best/{name}/accuracy": accuracy for name, (_, accuracy) in event.best.items()}
        # At the last step: MLflow's table shows those.
        self._log(point(self._last_step, {k: v for k, v in finals.items() if k.endswith("accuracy")} | bests))
        self._log(tags({"cohort.policy": event.policy}))
        self._models.conclude(event, self._ledger)
        for record in outcome_of(self._folder):
            self._log(record)

    def _take_point(self, step: int, metrics: Mapping[str, float]) -> None:
        self.status = "RUNNING"
        self._last_step = max(step, self._last_step)
        self._log(point(step, metrics))

    def _log(self, record: Record) -> None:
        if self._event.number > self.sent:
            self.records.append({**record, "time": self._event.time})


def starts_of(folder: Path) -> list[Record]:
    """Return what MLflow calls a run (experiment, name, parameters, tags) as each attempt has it."""
    events = LogReader(folder / LOG).new(kinds=(RunStarted,))
    return [_run_record(event, folder.name) for event in events if isinstance(event, RunStarted)]


def _run_record(event: RunStarted, key: str) -> Record:
    about = {"experiment": event.experiment, "params": event.params, "tags": event.tags}
    return {"kind": "run", "name": event.name, "key": key, **about, "time": event.time}


def outcome_of(folder: Path) -> Iterator[Record]:
    """Yield what a run left in its folder for people: learning curve, note, answers of the final policy."""
    if (folder / CURVE).is_file():
        yield figure(folder / CURVE)
    if (folder / NOTE).is_file():
        yield note((folder / NOTE).read_text(encoding="utf-8"))
    if (folder / COMPLETIONS).is_file():
        found = json.loads((folder / COMPLETIONS).read_text(encoding="utf-8"))
        yield {"kind": "table", "name": "completions", "columns": found["columns"], "data": found["data"]}


_LEFT_OUT: Final = re.compile(
    "|".join(
        [
            "policy/policy_loss",  # loss - beta * kl
            "policy/ratio_(mean|min)",  # 1 up to noise; the clipped share and the maximum say when not
            "policy/(outputs_computed|padding_share|trained_parameters)",
            "sft/padding_share",
            "reward/status_(ok|wrong)",  # the mean of the component that read the answer, and what is left of 1
            "reward/status_truncated",  # rollout/truncated_rate
            "reward/status_(timeout|error)",  # parts of reward/faults
            "reward/(missing|screened|failed)",  # parts of reward/frac_masked, and of reward/faults
            "rollout/(samples|tokens)",  # steps of progress/samples and progress/tokens
            "tool/calls",  # tool/calls_mean of each output
            "memory/tensors_mb",
            "eval/.*/no_verdict_rate",
            "eval/.*/greedy_accuracy_ci_(low|high)",
            r"eval/.*/(pass|maj)_at_\d+_ci_(low|high)",
            "rm/(auc_low|auc_high|cut_auc|length_auc|pair_accuracy|step_auc|pearson|rule_mean|rule_length|score_mean|score_length)",
            "rm/held_out_(accuracy|step_accuracy)/.*",
            "rm/held_out_auc/.*_old_policy",
        ]
    )
)
_AT_K: Final = re.compile(r"(.*/(?:pass|maj)_at_)(\d+)")
_HELD_OUT: Final = "rm/held_out_auc/"


def charted(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of a step that MLflow gets: about sixty, the same ones in every arm that has what they measure.

    MLflow makes a chart for each metric and is slow with hundreds. What is left out is said by another metric, or follows from
    some, and stays in the artifacts' own records. Of pass@k and maj@k that of the largest k is kept.

    Of reward models on held-out outputs of the newest policy: the AUC of those that rewarded the iteration, and that of those
    after it, which are the same where none was trained: so every arm with reward models has both.
    """
    largest: dict[str, int] = {}
    for kind, k in (found.groups() for name in metrics if (found := _AT_K.fullmatch(name))):
        largest[kind] = max(int(k), largest.get(kind, 0))
    kept = {
        name: value for name, value in metrics.items() if not _LEFT_OUT.fullmatch(name) and _is_largest(name, largest)
    }
    if kept.get("reward/model") == kept.get("reward/mean"):  # a model rewards alone
        kept.pop("reward/model", None)
    return kept | _ageing(metrics)


def _is_largest(name: str, largest: Mapping[str, int]) -> bool:
    found = _AT_K.fullmatch(name)
    return found is None or int(found[2]) == largest[found[1]]


def _ageing(metrics: Mapping[str, float]) -> dict[str, float]:
    """Where a measure is left out for being another one's, that one's: models not trained, a policy that has not moved."""
    before = metrics.get(f"{_HELD_OUT}old_model_new_policy", metrics.get(f"{_HELD_OUT}old_model_old_policy"))
    if before is None:
        return {}
    after = metrics.get(f"{_HELD_OUT}new_model_new_policy", before)
    return {f"{_HELD_OUT}old_model_new_policy": before, f"{_HELD_OUT}new_model_new_policy": after}


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
    """What MLflow's registry gets of a run: the data it read, the reward models it trained, the policies it came to.

    `take` is a fold of the events of one attempt after the other.
    """

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
