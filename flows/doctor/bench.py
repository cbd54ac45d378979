"""`cohort doctor --bench`: what this machine computes, moves and writes in a second, as the profile that `cohort plan` takes.

One thread of a CPU, or the first GPU. A matrix product, a large addition and a synced file give the rates. A small model's own
training step and decoding give what formulas cannot know: the share of those rates that a model reaches (`training`,
`decoding`) and the fixed cost of a layer, from a model so small that there is nothing else.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil

from flows.planning.machine import DEVICE_FILE, DeviceProfile
from flows.planning.shapes import ModelShape
from flows.planning.work import Work, decoding_work, seconds_of, training_work
from flows.runs.paths import Places, nearest
from flows.runs.record import write_json
from stages.training import TrainingConfig, native_bf16
from stages.training.hardware import cores

_VOCABULARY: Final = 128


class Trial(NamedTuple):
    """A step of a small model."""

    shape: ModelShape
    rows: int
    prompt: int
    """Tokens of each row."""
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
    """Measure, and write the profile below the root, where `cohort plan` finds it.

    Args:
        announce: is called with the name of each measurement.
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
        if device == "cpu" and (count := cores()) > 1:
            announce("all threads")
            torch.set_num_threads(count)
            profile = profile.override(
                {"threads": count, "parallel": training[1] / _training_seconds(trial, device, precision)}
            )
    finally:
        torch.set_num_threads(threads)
    places.root.mkdir(parents=True, exist_ok=True)
    write_json(places.root / DEVICE_FILE, profile.model_dump(mode="json"))
    return profile


def calibrated(
    profile: DeviceProfile, trial: Trial, precision: str, training: list[float], decoding: list[float]
) -> DeviceProfile:
    """Return the profile with which the formulas give the measured seconds.

    Args:
        training, decoding: seconds of a step of the tiny model and of `trial`.
    """
    plain = profile.override({"training": 1.0, "decoding": 1.0, "layer_seconds": 0.0, "token_seconds": 0.0})
    works = [(_training_work(each, precision), _decoding_work(each, precision)) for each in (_TINY, trial)]
    layer = training[0] / works[0][0].layers
    token = decoding[0] / works[0][1].layers
    busy = seconds_of(works[1][0], plain, trial.shape.hidden, precision)
    sampling = seconds_of(works[1][1], plain, trial.shape.hidden, precision, sampling=True)
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
    """Time forward, backward and AdamW on random rows, as in the policy update."""
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
    """Time a rollout in which every row has its prompt and all its tokens."""
    import torch

    from stages.rollout.generator import Prompt, Sampling
    from stages.rollout.hf import HFGenerator
    from stages.rollout.kv_cache import GROUPED

    model = _model(trial, device, torch.bfloat16 if precision == "bf16" else torch.float32, GROUPED)
    generator = HFGenerator(model, batch_rows=trial.rows)
    ids = torch.randint(0, _VOCABULARY, (trial.rows, trial.prompt)).tolist()
    prompts = [Prompt(f"q{number}", row, [number]) for number, row in enumerate(ids)]
    return median_seconds(lambda: generator.generate(prompts, Sampling(1.0, trial.output, ())), device)


def _model(trial: Trial, device: str, dtype: Any, attention: str) -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = trial.shape
    config = Qwen2Config(
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
        return Qwen2ForCausalLM(config).to(device, dtype).eval()


_WIDTHS: Final = (64, 128, 256, 512, 1024, 2048)
_PACKAGES: Final = ("torch", "transformers")
_REPEATS: Final = 5
_PATIENCE: Final = 1.0
"""Seconds after which a measurement is not repeated."""
_MIB: Final = 1 << 20


def measured_rates(places: Places, device: str, announce: Callable[[str], None]) -> DeviceProfile:
    """Return a profile of the first GPU or of one thread, without the share that a model reaches."""
    import torch

    announce("matrix products")
    tables = {
        kind: {str(width): _product_rate(width, dtype, device) for width in _WIDTHS}
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    announce("memory, disk, hashing")
    bandwidth, reading = _memory_rates(device)
    data = bytes(64 * _MIB)
    cuda = device == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{_processor()}, one thread"
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else psutil.virtual_memory().total
    return DeviceProfile(
        name=name,
        kind="gpu" if cuda else "cpu",
        memory=float(memory),
        fp32=tables["fp32"],
        bf16=tables["bf16"],
        bandwidth=bandwidth,
        reading=reading,
        disk=_disk_rate(nearest(places.root)),
        hashing=len(data) / median_seconds(lambda: hashlib.sha256(data).digest(), "cpu"),
        source=f"cohort doctor --bench, load {os.getloadavg()[0]:.1f}",
        date=time.strftime("%Y-%m-%d %H:%M"),
        packages={package: importlib.metadata.version(package) for package in _PACKAGES},
    )


def _product_rate(width: int, dtype: Any, device: str) -> float:
    """Return FLOP/s of [rows, width] x [width, 2.75 width], as in an MLP."""
    import torch

    columns = 11 * width // 4
    rows = max(64, int((2e11 if device == "cuda" else 2e8) / (2 * width * columns)))
    given = torch.randn(rows, width, device=device).to(dtype)
    weight = torch.randn(columns, width, device=device).to(dtype)
    seconds = median_seconds(lambda: torch.nn.functional.linear(given, weight), device)
    return 2.0 * rows * width * columns / seconds


def _memory_rates(device: str) -> tuple[float, float]:
    """Return bytes a second of an addition, which reads two tensors and allocates a third, and of a sum.

    The tensor is larger than any cache.
    """
    import torch

    one = torch.ones(16 * _MIB if device == "cpu" else 256 * _MIB, device=device)
    added, summed = median_seconds(lambda: one + one, device), median_seconds(one.sum, device)
    return 3 * one.nbytes / added, one.nbytes / summed


def _disk_rate(folder: Path) -> float:
    """Return bytes a second into a file that is synced and removed."""
    data = os.urandom(64 * _MIB)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".cohort-bench-") as file:
        started = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return len(data) / (time.perf_counter() - started)


def median_seconds(work: Callable[[], object], device: str) -> float:
    """Return the median seconds of `work` after a first run of it."""
    import torch

    # Processor time of a single thread is hardly touched by what else the machine does.
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def timed() -> float:
        started = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - started

    timed()
    until, taken = time.perf_counter() + _PATIENCE, [timed()]
    while len(taken) < _REPEATS and time.perf_counter() < until:
        taken.append(timed())
    return statistics.median(taken)


def _processor() -> str:
    """Return the CPU's own name, where the system has it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
