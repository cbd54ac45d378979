"""Make the configuration of a first run: look, sample, plan, in this order, so that what cannot be used is said at once."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from flows.algorithm.data_check import examine_data
from flows.algorithm.models import EarlyTokenizer, early_tokenizer
from flows.config import IterativeRLConfig
from flows.first_run.page import nested, page
from flows.first_run.survey import Survey, survey
from flows.first_run.trial import Sizes, Trial, candidates_for, sizes_for, try_prompts
from flows.planning.request import Request, room_for_checkpoint, subject_of
from flows.runs.paths import Places
from flows.wording import duration, number, percent, size
from pipeline.config import ConfigError
from pipeline.store import use_store
from stages.text import PromptConfig, turn_end
from stages.training.hardware import has_cuda

_QUESTIONS: Final = 6
_OUTPUTS: Final = 4
"""Of each question, in a trial; ours."""
_LONGEST: Final = {"cpu": 128, "gpu": 512}
"""Tokens of an output in a trial, by what samples; ours."""
_MARGIN: Final = 1.25
"""Of the output budget over the 95th percentile of outputs that ended; ours."""
_WEAK: Final = 0.05
"""Share of right outputs below which demonstrations come first, where there are any; ours."""
_RATE: Final = 1e-5
"""Learning rate; ours for models below a billion parameters, ten times the paper's of 7 B. An adapter has ten times that."""
_HELD_OUT: Final = 64
"""Questions of the held-out set that are evaluated; ours."""
_SHOWN: Final = 80
"""Characters of an output."""

Say = Callable[[str, str], None]
"""Takes a topic and a sentence about it."""


@dataclass(frozen=True)
class Wishes:
    """What `cohort init` is asked for."""

    model: str
    data: Path
    held_out: Path | None
    minutes: float
    question: str | None = None
    answer: str | None = None


def begin(wishes: Wishes, places: Places, say: Say) -> str:
    """Return the YAML of a first run.

    Raises:
        ConfigError: data, model or machine that no run can use, before anything is sampled.
    """
    found = survey(wishes.data, question=wishes.question, answer=wishes.answer)
    say("data", str(found))
    settings = _start(wishes, found)
    early = early_tokenizer(_parsed(settings), None, fetch=True)
    chat = _has_chat(early)
    window = "any number of" if early.window is None else number(early.window)
    ends = ", ".join(map(str, early.tokenizer.convert_ids_to_tokens(sorted(early.ends)))) or "nothing"
    template = "has a chat template" if chat else "has no chat template of its own: questions are continued as text"
    say("model", f"{template}; reads {window} tokens; outputs end at {ends}")
    numbers, chinese = set(found.kinds) <= {"number"}, found.script == "CJK"
    candidates = candidates_for(chat=chat, numbers=numbers, chinese=chinese, able=has_cuda())
    settings |= {"prompt": _plain(candidates[0].prompt), "rollout.max_output_tokens": _budget(early)}
    request = _request()
    config = _usable(settings, found, places, request, say)
    say(
        "trial",
        f"{config.questions_per_step} questions x {_OUTPUTS} outputs of at most {config.rollout.max_output_tokens} tokens",
    )
    trials: list[Trial] = []
    with use_store(places.open_store()):
        for trial in try_prompts(config, candidates):
            say("trial", f"{_named(trial)}: {trial}")
            trials.append(trial)
    best = max(trials, key=lambda trial: trial.rank)
    settings |= {"prompt": _plain(best.prompt), "rollout.max_output_tokens": _longest(best, config)}
    if best.temperature != 1:
        settings["rollout.temperature"] = best.temperature
    first = _demonstrate(best, found)
    if first:
        settings |= _SFT
    sizes = sizes_for(
        _parsed(settings),
        places,
        _measured(request, best, settings),
        questions=len(found.questions),
        minutes=wishes.minutes,
    )
    settings |= sizes.settings
    if "update.training.adapter" in sizes.settings:
        settings["update.training.optimizer"] = {"kind": "adamw", "learning_rate": 10 * _RATE}
    _parsed(settings)
    reasons = _reasons(found, best, config, sizes, demonstrated=first)
    for sentence in (*reasons["steps"], *reasons["sft"]):
        say("run", sentence)
    return page([*_head(wishes)], _ordered(settings), reasons)


def _parsed(settings: Mapping[str, Any]) -> IterativeRLConfig:
    return IterativeRLConfig.parse(nested(settings), source="cohort init")


def _start(wishes: Wishes, found: Survey) -> dict[str, Any]:
    """Return the settings that are known before the model was read."""
    model = Path(wishes.model).expanduser()
    file = found.file.model_dump(mode="json", exclude_defaults=True) | {"path": wishes.data.name}
    held_out = {}
    if wishes.held_out is not None:
        other = survey(wishes.held_out, question=wishes.question, answer=wishes.answer).file
        place = str(wishes.held_out.resolve())
        held_out = {
            "held_out": other.model_dump(mode="json", exclude_defaults=True) | {"path": place, "limit": _HELD_OUT}
        }
    return {
        "name": _name(wishes),
        "data.kind": "files",
        "data.path": str(wishes.data.resolve().parent),
        "data.train": file,
        "data.evaluation": held_out,
        "data.max_prompt_tokens": "drop",
        "policy": {"kind": "pretrained", "path": str(model.resolve()) if model.exists() else wishes.model},
        "steps": _QUESTIONS,
        "questions_per_step": min(_QUESTIONS, len(found.questions)),
        "rollout.G": _OUTPUTS,
        "reward.components": [{"kind": "accuracy", "verifier": "exact" if found.exact else "math_verify"}],
        "update.training.optimizer": {"kind": "adamw", "learning_rate": _RATE},
        "update.micro_batch_tokens": 16384 if has_cuda() else 4096,
        "evaluation": {"every": 10, "samples": 0},
        "keep": {"checkpoints": 2, "optimizer": 1},
    }


_SFT: Final[dict[str, Any]] = {
    "sft.training.optimizer": {"kind": "adamw", "learning_rate": _RATE},
    "sft.training.warmup_steps": 10,
    "sft.batch_size": 16,
    "sft.max_steps": 100,
    "sft.decay_steps": 20,
}


def _name(wishes: Wishes) -> str:
    words = f"{wishes.data.stem}-{Path(wishes.model).name.removesuffix('.gguf')}".lower()
    return re.sub(r"[^a-z0-9._-]+", "-", words).strip("-._")[:64] or "first-run"


def _has_chat(early: EarlyTokenizer) -> bool:
    """Return whether the model answers in its chat template: it has one, and outputs end as that ends an answer."""
    if not early.tokenizer.chat_template:
        return False
    end = turn_end(early.tokenizer, PromptConfig(chat="tokenizer"))
    return end is None or end in early.ends


def _budget(early: EarlyTokenizer) -> int:
    most = _LONGEST["gpu" if has_cuda() else "cpu"]
    return most if early.window is None else max(1, min(most, early.window // 2))


def _request() -> Request:
    """Return the machine to plan for: this one, with its GPU where torch has one."""
    if not has_cuda():
        return Request()
    import torch

    return Request(gpus=1, gpu_memory=torch.cuda.get_device_properties(0).total_memory / 2**30)


def _measured(request: Request, trial: Trial, settings: Mapping[str, Any]) -> Request:
    """Return the request with the lengths of the trial, those of outputs at most the budget."""
    mean = min(trial.mean_length, settings["rollout.max_output_tokens"])
    return replace(request, mean_output_tokens=mean, prompt_tokens=trial.prompt_tokens)


def _usable(settings: dict[str, Any], found: Survey, places: Places, request: Request, say: Say) -> IterativeRLConfig:
    """Return the configuration of the trial; leave `drop` in the settings only where a prompt is too long.

    Raises:
        ConfigError: everything that `cohort check` would say.
    """
    from flows.doctor.devices import memory, processors
    from flows.doctor.examination import subject_of as machine

    config = _parsed(settings)
    seen = examine_data(config)
    subject = subject_of(config, places, request)
    lacking = room_for_checkpoint(subject)
    if complaints := [*seen.complaints, *([lacking] if lacking else [])]:
        raise ConfigError("\n  ".join(["this cannot be run:", *complaints]))
    this = machine(places, dict(os.environ), quick=True)
    parts = [finding.found for check in (processors, memory) for finding in check(this)]
    say(
        "machine",
        "; ".join([*parts, f"{size(subject.free or 0)} free on the disk", "a GPU" if has_cuda() else "no GPU"]),
    )
    say("model", f"{number(subject.given.shape.parameters)} parameters")
    if seen.sizes.get("train") == len(found.questions):
        del settings["data.max_prompt_tokens"]
    for note in seen.notes:
        say("data", note)
    return config


def _longest(trial: Trial, config: IterativeRLConfig) -> int:
    """Return the output budget: the 95th percentile of outputs that ended, with a margin; the trial's where half did not."""
    most = config.rollout.max_output_tokens
    if 2 * len(trial.lengths) < trial.findings.outputs:
        return most
    ended = sorted(trial.lengths)
    common = ended[math.ceil(0.95 * len(ended)) - 1]
    return max(8, min(most, 8 * math.ceil(_MARGIN * common / 8)))


def _demonstrate(trial: Trial, found: Survey) -> bool:
    return trial.right < _WEAK * trial.findings.outputs and found.solutions == len(found.questions)


def _named(trial: Trial) -> str:
    prompt = trial.prompt
    asked = repr(prompt.instruction) if prompt.instruction else prompt.template
    return f"{asked if asked != 'raw' else 'no instruction'}, temperature {trial.temperature:g}"


def _plain(prompt: PromptConfig) -> dict[str, Any]:
    return prompt.model_dump(mode="json", exclude_defaults=True)


def _ordered(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections in the order of a run, `sft` also where there is none."""
    values = {"sft": None} | nested(settings)
    order = ("name", "data", "prompt", "policy", "sft", "steps", "questions_per_step", "rollout", "reward", "update")
    return {name: values[name] for name in [*order, *(name for name in values if name not in order)]}


def _head(wishes: Wishes) -> Iterator[str]:
    yield f"Written by `cohort init` for {wishes.model} and {wishes.data}; `cohort check`, `plan` and `run` read it."
    yield "Precision, attention and threads are left to `auto`; every other setting has its default (docs/configuration.md)."


def _reasons(
    found: Survey, best: Trial, config: IterativeRLConfig, sizes: Sizes, *, demonstrated: bool
) -> dict[str, list[str]]:
    """Return what was found and assumed, by section."""
    plan, seen = sizes.plan, best.findings
    step, _ = plan.of_a_step()
    held_out = [] if config.data.evaluation else ["No held-out set was named (--held-out): nothing is evaluated."]
    ended = f"{len(best.lengths)} of {seen.outputs} outputs of the trial ended within {config.rollout.max_output_tokens} tokens"
    weak = f"{best.right} of {seen.outputs} outputs were right"
    if demonstrated:
        sft = f"{weak}, so the data's own solutions are imitated first; that costs most of the first minutes."
    elif best.right < _WEAK * seen.outputs:
        sft = f"{weak} and not every question has a solution: with solutions (column `solution`) fine-tuning would come first."
    else:
        sft = f"{weak}: there is something to reward, so no fine-tuning comes first."
    signal = f"{percent(best.signal)} of the trial's questions had a signal (unequal rewards)."
    if not best.signal:
        signal += " Where the first step has none either, the run stops: take easier questions or a stronger model."
    return {
        "data": [f"{found}.", *held_out],
        "prompt": [
            f"The best of those tried, on {seen.questions} questions: {best}.",
            f"The end of an output: {best.example[-_SHOWN:]!r}",
        ],
        "sft": [sft],
        "steps": [
            signal,
            f"A step is planned to take {duration(step)}, the run {duration(plan.seconds)}, at its peak {size(plan.peak)} of "
            f"{size(plan.given.machine.memory)}, and to leave {size(plan.kept)} on the disk.",
            *(f"To fit the memory: {text}." for text in sizes.remedies),
        ],
        "rollout": [f"{ended}."],
        "reward": [f"Answers are compared as {'numbers and names' if found.exact else 'formulas too'}."],
        "update": ["The learning rate is ours, for a small model: lower it where the KL term grows quickly."],
    }
