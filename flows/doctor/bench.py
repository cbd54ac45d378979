"""`cohort doctor --bench`: what this machine computes, moves and writes in a second, as the profile that `cohort plan` takes.

One thread of a CPU, or the first GPU. A matrix product, a large addition and a synced file give the rates. A small model's own
training step and decoding give what formulas cannot know: the share of those rates that a model reaches (`training`,
`decoding`) and the fixed cost of a layer, from a model so small that there is nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from flows.doctor.rates import measured_rates, median_seconds
from flows.planning.machine import DEVICE_FILE, DeviceProfile
from flows.planning.shapes import ModelShape
from flows.planning.work import Work, decoding_work, seconds_of, training_work
from flows.records import write_json
from stages.training import TrainingConfig, native_bf16

if TYPE_CHECKING:
    from flows.places import Places

__all__ = ["bench", "calibrated"]

_VOCABULARY: Final = 128


@dataclass(frozen=True)
class Trial:
    """A small model's step: rows of so many tokens."""

    shape: ModelShape
    rows: int
    prompt: int
    output: int


_TINY: Final = Trial(ModelShape("tiny", 32, 64, 4, 2, 2, 16, _VOCABULARY, tied=True), rows=1, prompt=8, output=8)
"""All fixed costs."""
_SMALL: Final = Trial(ModelShape("small", 256, 704, 4, 4, 4, 64, _VOCABULARY, tied=True), rows=32, prompt=32, output=32)
"""Like what a CPU trains."""
_LARGE: Final = Trial(
    ModelShape("large", 2048, 5632, 4, 16, 16, 128, 32_000, tied=True), rows=16, prompt=512, output=512
)
"""Like what a GPU trains."""


def bench(places: Places, announce: Callable[[str], None] = lambda text: None) -> DeviceProfile:
    """Measure, and leave the profile below the root, where `cohort plan` finds it.

    Args:
        announce: is told what is being measured.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        profile = measured_rates(places, device, announce)
        trial = _LARGE if device == "cuda" else _SMALL
        precision = "bf16" if device == "cuda" or native_bf16() else "fp32"
        announce("a small model's training steps")
        training = [_training_seconds(each, device, precision) for each in (_TINY, trial)]
        announce("a small model's decoding")
        decoding = [_decoding_seconds(each, device, precision) for each in (_TINY, trial)]
        profile = calibrated(profile, trial, precision, training, decoding)
        if device == "cpu" and (cores := _cores()) > 1:
            announce("all threads")
            torch.set_num_threads(cores)
            profile = profile.override(
                {"threads": cores, "parallel": training[1] / _training_seconds(trial, device, precision)}
            )
    finally:
        torch.set_num_threads(threads)
    places.root.mkdir(parents=True, exist_ok=True)
    write_json(places.root / DEVICE_FILE, profile.model_dump(mode="json"))
    return profile


def calibrated(
    profile: DeviceProfile, trial: Trial, precision: str, training: list[float], decoding: list[float]
) -> DeviceProfile:
    """The profile with which the formulas give what the trials took.

    Args:
        training, decoding: seconds of a step of the tiny model and of `trial`.
    """
    bare = profile.override({"training": 1.0, "decoding": 1.0, "layer_seconds": 0.0, "token_seconds": 0.0})
    works = [(_training_work(each, precision), _decoding_work(each, precision)) for each in (_TINY, trial)]
    layer = training[0] / works[0][0].layers
    token = decoding[0] / works[0][1].layers
    busy = seconds_of(works[1][0], bare, trial.shape.hidden, precision)
    sampling = seconds_of(works[1][1], bare, trial.shape.hidden, precision, sampling=True)
    return profile.override(
        {
            "layer_seconds": layer,
            "token_seconds": token,
            # Where fixed costs are nearly all, noise could leave nothing for the rest.
            "training": busy / max(0.1 * training[1], training[1] - layer * works[1][0].layers),
            "decoding": sampling / max(0.1 * decoding[1], decoding[1] - token * works[1][1].layers),
        }
    )


def _training_work(trial: Trial, precision: str) -> Work:
    config = TrainingConfig.model_validate({"precision": precision})
    return training_work(trial.shape, config, trial.rows, trial.prompt, trial.output, 1 << 30)


def _decoding_work(trial: Trial, precision: str) -> Work:
    given, sampled, half = trial.prompt, trial.output, precision == "bf16"
    return decoding_work(trial.shape, trial.rows, 1, given, sampled, sampled, side_by_side=trial.rows, half=half)


def _training_seconds(trial: Trial, device: str, precision: str) -> float:
    """Forward, backward and AdamW on random rows, as the policy update has them."""
    import torch

    from stages.training.batching import Row, collate
    from stages.training.engine import autocast
    from stages.training.forward import completion_logprobs

    model = _model(trial, device, torch.float32, "eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    ids = torch.randint(0, _VOCABULARY, (trial.rows, trial.prompt + trial.output)).tolist()
    rows = [Row(row[: trial.prompt], row[trial.prompt :]) for row in ids]
    batch = collate(rows, range(trial.rows)).to(device)
    config = TrainingConfig.model_validate({"precision": precision})

    def step() -> None:
        with autocast(device, config):
            logp_BO = completion_logprobs(model, batch, with_entropy=True, max_logits=config.max_logits).logp_BO
        torch.autograd.backward(logp_BO.mean())
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return median_seconds(step, device)


def _decoding_seconds(trial: Trial, device: str, precision: str) -> float:
    """Every row its prompt and all its tokens, as a rollout has them."""
    import torch

    from stages.rollout.attention import GROUPED
    from stages.rollout.generator import Prompt, Sampling
    from stages.rollout.hf import HFGenerator

    model = _model(trial, device, torch.bfloat16 if precision == "bf16" else torch.float32, GROUPED)
    generator = HFGenerator(model, batch_rows=trial.rows)
    ids = torch.randint(0, _VOCABULARY, (trial.rows, trial.prompt)).tolist()
    prompts = [Prompt(f"q{number}", row, [number]) for number, row in enumerate(ids)]
    return median_seconds(lambda: generator.generate(prompts, Sampling(1.0, trial.output, ())), device)


def _model(trial: Trial, device: str, dtype: Any, attention: str) -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = trial.shape
    description = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=trial.prompt + trial.output,
        tie_word_embeddings=shape.tied,
        attn_implementation=attention,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2ForCausalLM(description).to(device, dtype).eval()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
