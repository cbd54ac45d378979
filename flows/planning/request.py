"""Look up everything a plan is made from, by a configuration and the command line; compute, download and change nothing.

Lengths and sizes that no configuration has come from the last run of the same name, else from assumptions that are printed.
Which stage calls the store has already is found by calling the flow itself on a store that only finds.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from flows.algorithm.data import below
from flows.config import ArithmeticData, FileData, IterativeRLConfig, RewardModelPlan
from flows.planning.machine import machine_of, on_devices, settled
from flows.planning.plan import evaluations_of
from flows.planning.shapes import shape_for, teacher_shape
from flows.planning.stages import EVALUATION_CALLS, checkpoint_bytes
from flows.planning.work import Given, Lengths
from flows.runs.ledger import Ledger, read_ledger
from flows.runs.paths import Places, nearest
from flows.runs.record import read_records
from flows.wording import size
from pipeline.config import ConfigError
from pipeline.events import recording
from pipeline.store import MissingArtifactError, Store, StoreError, use_store
from stages.reward_training import MonteCarloConfig
from stages.tables import Rollouts

_SHARE: Final = 0.5
"""Of the longest output; ours."""
_PROMPTS: Final = {"arithmetic": 17.0, "files": 128.0}
"""Tokens of a prompt: of the built-in world's questions as characters, of word problems with an instruction; ours."""
_KNOWN_SETS: Final = {"gsm8k_test.jsonl": 1319, "math_test.jsonl": 5000}
"""Questions of published test sets (Cobbe et al. 2021; Hendrycks et al. 2021), where the file is not here."""
_QUESTIONS: Final = 1000
"""Of any other set that is not here; ours."""
_AS_MEASURED: Final = "as those of the last step that was run"


@dataclass(frozen=True)
class Request:
    """Options of the command line; None: not given."""

    device: str | None = None
    gpus: int | None = None
    gpu_memory: float | None = None
    """GiB of one device."""
    nodes: int | None = None
    model_config: Path | None = None
    prompt_tokens: float | None = None
    mean_output_tokens: float | None = None


@dataclass(frozen=True)
class Subject:
    """What is planned, how much of it is there, and what had to be assumed."""

    given: Given
    progress: Progress
    assumptions: tuple[str, ...]
    free: float | None = None
    """Bytes that are free on the disk of the root; None: unknown."""


def subject_of(config: IterativeRLConfig, places: Places, request: Request) -> Subject:
    """Look everything up that a plan needs; raise as `machine_of`, `shape_for` and `lengths_for`."""
    machine = machine_of(
        places, device=request.device, gpus=request.gpus, gpu_memory=request.gpu_memory, nodes=request.nodes
    )
    config, of_devices = on_devices(config, request.gpus, request.nodes)
    store = places.open_store()
    progress = progress_of(config, store)
    config, of_auto = settled(config, machine)
    shape, of_shape = shape_for(config, places, progress.ledger, request.model_config)
    teacher, of_teacher = teacher_shape(config, shape)
    lengths, of_lengths = lengths_for(
        config, places, store, progress.ledger, prompt=request.prompt_tokens, output=request.mean_output_tokens
    )
    sizes, of_sizes = sizes_for(config)
    free = None
    with contextlib.suppress(OSError):
        free = float(shutil.disk_usage(nearest(places.root)).free)
    here = not (request.device or request.gpus or request.gpu_memory or request.nodes)
    taken = _sft_steps(store, progress.ledger)
    given = Given(config, shape, machine, lengths, sizes, taken, free if here else None, teacher)
    assumed = [*of_devices, *of_auto, *of_shape, *of_teacher, *of_lengths, *of_sizes, *_uncounted(given)]
    return Subject(given, progress, tuple(assumed), free)


def room_for_checkpoint(subject: Subject) -> str | None:
    """Say that the disk does not hold one checkpoint of the policy, and what to do; None: it does, or nothing is known."""
    given = subject.given
    needed = checkpoint_bytes(given.shape, given.config.update.training)
    if subject.free is None or subject.free >= needed:
        return None
    return (
        f"a checkpoint of {size(needed)} does not fit: {size(subject.free)} are free below the root; move it (--root), free "
        "space (`cohort prune`), or set update.training.optimizer_state=none or an adapter, whose checkpoints are smaller"
    )


def lengths_for(
    config: IterativeRLConfig,
    places: Places,
    store: Store,
    ledger: Ledger,
    *,
    prompt: float | None,
    output: float | None,
) -> tuple[Lengths, list[str]]:
    """Return tokens of prompts and outputs, and where they come from.

    Args:
        prompt, output: from the command line; they win.

    Raises:
        ConfigError: a mean beyond the longest output, or no positive number.
    """
    longest = config.rollout.max_output_tokens
    if output is not None and not 0 < output <= longest:
        raise ConfigError(
            f"--mean-output-tokens: expected above 0, at most rollout.max_output_tokens={longest}, found {output:g}"
        )
    if prompt is not None and prompt < 1:
        raise ConfigError(f"--prompt-tokens: expected at least 1, found {prompt:g}")
    said: list[str] = []
    found = {} if prompt and output else _measured(config, places, store, ledger)
    if output is None:
        output = found.get("output", _SHARE * longest)
        why = f", {_AS_MEASURED}" if "output" in found else ", half of the longest (--mean-output-tokens)"
        said.append(f"outputs have {output:.0f} tokens{why}")
    if prompt is None:
        prompt = found.get("prompt", _PROMPTS[config.data.kind])
        why = f", {_AS_MEASURED}" if "prompt" in found else " (--prompt-tokens)"
        said.append(f"prompts have {prompt:.0f} tokens{why}")
    said.append(f"in every batch some output has all {longest} tokens, and no two outputs of a group are equal")
    return Lengths(prompt, output, longest), said


def sizes_for(config: IterativeRLConfig) -> tuple[dict[str, int], list[str]]:
    """Return the questions of every held-out set, and what was assumed about them."""
    match config.data:
        case ArithmeticData():
            return {name: part.count for name, part in config.data.evaluation.items()}, []
        case FileData():
            found, said = {}, []
            for name, part in config.data.evaluation.items():
                count = _lines(Path(below(config.data.path, part).path).expanduser())
                if count is None:
                    count = _KNOWN_SETS.get(Path(part.path).name, _QUESTIONS)
                    said.append(f"data.evaluation.{name} is not here: {count} questions")
                found[name] = count if part.limit is None else min(count, part.limit)
            return found, said


def _sft_steps(store: Store, ledger: Ledger) -> int | None:
    """Return the optimizer steps of the supervised fine-tuning that the store has; None: it has none."""
    for key, call in ledger.calls.items():
        if call.stage == "supervised_finetuning":
            with contextlib.suppress(StoreError):
                return int(store.action(key)["metrics"]["sft/steps"])
    return None


def _measured(config: IterativeRLConfig, places: Places, store: Store, ledger: Ledger) -> dict[str, float]:
    """Return mean lengths of the outputs of a step: this configuration's last, else that of the last run of its name."""
    for known in _ledgers(config, places, ledger):
        for made in reversed(known.steps.values()):
            outputs = made.get("continue_dialogues", made.get("rollout"))  # of all turns, where there are several
            if outputs is not None and (found := _means(store, outputs)):
                return found
    return {}


def _ledgers(config: IterativeRLConfig, places: Places, ledger: Ledger) -> Iterator[Ledger]:
    yield ledger
    for record in reversed(list(read_records(places))):
        if record.name == config.name and (known := read_ledger(record.folder)) is not None:
            yield known


def _means(store: Store, digest: str) -> dict[str, float]:
    import pyarrow.compute as pc

    with contextlib.suppress(StoreError, ValueError, OSError), use_store(store):  # pruned, or moved away
        table: Any = Rollouts(digest).read(["prompt_ids", "output_ids"])
        means = {
            name: pc.mean(pc.list_value_length(table.column(f"{name}_ids"))).as_py() for name in ("prompt", "output")
        }
        return {name: float(mean) for name, mean in means.items() if mean}
    return {}


def _lines(file: Path) -> int | None:
    """Count the rows of a file with one question a line; None: it is not here, or of another format."""
    if file.suffix != ".jsonl" or not file.is_file():  # a pipe would never end
        return None
    with contextlib.suppress(OSError), file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
    return None


def _uncounted(given: Given) -> list[str]:
    """Name what the plan leaves out or takes at its most, and where the rates come from."""
    config, said = given.config, []
    if config.sft and given.sft_steps is None:
        said.append("supervised fine-tuning takes all of sft.max_steps")
    said += given.machine.assumptions
    if config.dynamic_sampling:
        said.append("no further draws of dynamic_sampling")
    if config.environment is not None:
        said.append("outputs of one turn: neither calls to the environment nor the reading of a dialogue at each turn")
    if config.reward_model is not None and config.reward_model.step_labels.kind == "monte_carlo":
        said.append("the continuations of reward_model.step_labels are not counted")
    return said


@dataclass(frozen=True)
class Progress:
    """How much of a run is in the store."""

    ledger: Ledger
    found: int
    """Stage calls that would be reused."""
    total: int
    """Stage calls of the run; an upper bound where the flow decides on its way."""
    ended: bool
    """Whether the run would compute nothing."""
    note: str = ""
    """Why the flow could not be followed to the first missing call; empty where it could."""

    @property
    def steps(self) -> int:
        """Return the number of steps that are there."""
        return len(self.ledger.steps)


def progress_of(config: IterativeRLConfig, store: Store) -> Progress:
    """Follow the flow through the calls that are recorded, to the first that is not; nothing is computed or verified."""
    from flows.iterative_rl import iterative_rl

    ledger, note, ended = Ledger(), "", False
    try:
        with use_store(cast(Store, _OnlyFinds(store))), recording(ledger.take):
            iterative_rl(config)
        ended = True
    except MissingArtifactError:
        pass
    except Exception as error:  # a file of questions, a model or a server that is not there: the plan is made without
        note = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
    total = len(ledger.calls) if ended else sum(count for _, count in calls_of(config))
    return Progress(ledger, len(ledger.calls), max(total, len(ledger.calls)), ended, note)


class _OnlyFinds:
    """A store in which a call that is not recorded is an error, before anything is computed."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def find(self, key: str, *, own: bool = False) -> dict[str, Any]:
        return self._store.action(key)

    def path(self, digest: str) -> Path:
        return self._store.path(digest, replay=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def calls_of(config: IterativeRLConfig) -> Iterator[tuple[str, int]]:
    """Count the stage calls of each part of the flow, equal calls once."""
    data, steps = config.data, config.iterations * config.steps
    sets = len(data.evaluation)
    match data:
        case ArithmeticData():
            yield "data", 2 + sets
        case FileData():
            yield "data", 1 + (config.sft is not None) + sets + (1 + sets)  # read, then limited
    yield "policy", 1 + sum(part is not None for part in (config.teacher, config.sft, config.critic))
    yield "evaluations", evaluations_of(config) * sets * len(config.evaluation.modes(config.rollout)) * EVALUATION_CALLS
    apart = int(config.update.needs_reference and config.reference_pass == "stage")
    # At an iteration's first step the reference is the policy: no pass.
    yield "steps", steps * (_calls_of_a_step(config) + apart) - apart * config.iterations
    if config.reward_model is not None:
        yield "reward models", _calls_of_reward_models(config, config.reward_model)


def _calls_of_a_step(config: IterativeRLConfig) -> int:
    sampled = 1 if config.data_source == "demonstrations" else 2 + config.scores_outputs  # questions, outputs, rewards
    learned = 3 if config.reward_model is not None else 0  # scores, gauges, what is learned from
    valued = 2 if config.critic is not None else 0
    return sampled + learned + valued + config.compares_policies + 2  # advantages, update


def _calls_of_reward_models(config: IterativeRLConfig, plan: RewardModelPlan) -> int:
    kinds = len(plan.models)
    trainings = 1 + (max(0, config.iterations - 1) if plan.retrain else 0)
    completed = 4 if isinstance(plan.step_labels, MonteCarloConfig) else 0
    each = 4 + completed + kinds  # questions, outputs, rewards, labels
    mixed = trainings - 1
    drift = 0
    if plan.held_out_questions and config.data.evaluation:
        # Questions; outputs, rewards, scores and gauges of the first policy and of each iteration's last; after a retraining
        # scores and gauges of both models and both policies, of which those of the old model on the old policy were there.
        drift = 1 + 4 * (1 + config.iterations) + 4 * mixed
    return kinds + trainings * each + mixed + drift
