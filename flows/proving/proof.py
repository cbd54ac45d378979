"""Run a few steps by each engine, kill one run and resume it, and compare what was planned with what was measured.

python -m flows.proving.proof OVERRIDES.yaml ROOT trains as a file of overrides says, without MLflow or Prefect: one such run.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Final

import yaml

from flows.config.resolve import choose
from flows.iterative_rl import iterative_rl
from flows.planning.machine import DEVICE_FILE, PRESETS
from flows.planning.plan import plan_of
from flows.planning.request import Request, subject_of
from flows.proving.shape import HALF_BILLION, SMALL, Shape, engines, make_model, settings_of
from flows.runs.paths import Places
from pipeline.config import ConfigError
from pipeline.store import Store, use_store
from pipeline.store.context import package_versions
from pipeline.workers.group import importing_ours
from stages.rollout import require_backend

_RECIPE: Final = "arithmetic_smoke"
_LINES: Final = 12
_NO_TIME: Final = "not run: no time was left (--minutes)"
Result = dict[str, Any]


def prove(folder: Path, *, minutes: float, vllm_python: Path | None, announce: Callable[[str], None]) -> Result:
    """Return what this machine did, as plain values.

    Args:
        folder: an empty one to work in.
        minutes: no run goes on after this time.
        vllm_python: interpreter of the environment that has vLLM.
        announce: called with what is being done.
    """
    import torch

    from stages.training import native_bf16

    end, started, cuda = time.monotonic() + 60 * minutes, time.monotonic(), torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for devices, and says so
    shape, half = (HALF_BILLION if cuda else SMALL), cuda or native_bf16()
    announce("making a model with random weights")
    make_model(shape, folder / "model")
    device = _device()
    arms: list[Result] = []
    for name, engine in engines(vllm_python).items():
        announce(f"{shape.steps} steps: {name}")
        file = folder / f"{len(arms)}.yaml"
        file.write_text(yaml.safe_dump(settings_of(shape, folder / "model", engine, half=half)))
        arms.append({"name": name, **_arm(file, folder / str(len(arms)), shape, end, device)})
    announce("a run that is killed and resumed")
    return {
        "machine": _machine(),
        "shape": dataclasses.asdict(shape),
        "precision": "bf16" if half else "fp32",
        "rates": device,
        "engines": arms,
        "resumed": _killed(folder / "0.yaml", folder / "killed", arms[0], end),
        "seconds": time.monotonic() - started,
    }


def is_proved(result: Mapping[str, Any]) -> bool:
    """Return whether every engine ran, and the run that was killed went on."""
    return not any(part["error"] for part in (*result["engines"], result["resumed"]))


def _machine() -> Result:
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return {
        "system": system,
        "cpus": os.cpu_count(),
        "memory": memory,
        "gpus": gpus,
        "packages": dict(package_versions()),
    }


def _device() -> str | None:
    """Return whose rates are this machine's: what was measured here, or its GPU's data sheet; None: neither is known."""
    import torch

    measured = Places.under(None).root / DEVICE_FILE
    if measured.is_file():
        return str(measured)
    name = torch.cuda.get_device_name(0).lower() if torch.cuda.is_available() else ""
    return next((preset for preset in PRESETS if name and preset.partition("-")[0] in name), None)


def _arm(file: Path, root: Path, shape: Shape, end: float, device: str | None) -> Result:
    """Run the steps, and return medians without the first; `error` is None where it ran."""
    if time.monotonic() > end:
        return {"error": _NO_TIME}
    started = time.monotonic()
    error, _ = _trained(file, root, end)
    seconds = time.monotonic() - started
    if error:
        return {"error": error, "seconds": seconds}
    records = Store(root / "store").actions()
    sampled = [r["metrics"] for r in records if r["stage"] == "rollout" and r["arguments"]["config"]["config"]["G"] > 1]
    updates = [r for r in records if r["stage"] == "update_policy"]
    learned = [r["metrics"] for r in updates]

    def typical(metrics: list[dict[str, float]], name: str) -> float | None:
        values = [each[name] for each in metrics[1:] if name in each]
        return median(values) if values else None

    found = {
        "sampling_tokens_per_s": typical(sampled, "rollout/tokens_per_s"),
        "sampling_seconds": typical(sampled, "rollout/seconds"),
        "update_seconds": typical(learned, "time/update"),
        "update_peak_mb": typical(learned, "memory/update_mb"),
        "mismatch_mean": typical(learned, "rollout/mismatch_mean"),
        "mismatch_kl": typical(learned, "rollout/mismatch_kl"),
    }
    return {
        "error": None,
        "seconds": seconds,
        **found,
        "content": updates[-1]["content"],
        "planned": _planned(file, root, device, found["update_seconds"]),
    }


def _planned(file: Path, root: Path, device: str | None, update_seconds: float | None) -> Result:
    """Return what `cohort plan` says of the run, and which share of the device's rate the update used (MFU).

    Where the device's rates are unknown the plan assumes some, and the share is undefined.
    """
    config = choose(_RECIPE, [file], []).config
    plan = plan_of(subject_of(config, Places(root), Request(device=device)).given)
    stages = {stage.name: stage for stage in plan.stages}
    update, profile, training = stages["update"], plan.given.machine.profile, plan.given.config.update.training
    rate = profile.rate(plan.given.shape.hidden, training.precision) * profile.speed(training.threads)
    return {
        "rates": profile.name,
        "assumed": device is None,
        "sampling_seconds": stages["rollout"].seconds,
        "update_seconds": update.seconds,
        "update_flops": update.work.flops,
        "update_mfu": update.work.flops / update_seconds / rate if update_seconds and device else None,
    }


def _killed(file: Path, root: Path, undisturbed: Mapping[str, Any], end: float) -> Result:
    """Kill a run after its first update and give the same command again."""
    if time.monotonic() > end or undisturbed["error"]:
        return {"error": undisturbed["error"] or _NO_TIME}
    root.mkdir()
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            _command(file, root), stdout=log, stderr=log, start_new_session=True, env=_surroundings()
        )
        while process.poll() is None and not _updates(root) and time.monotonic() < end:
            time.sleep(0.02)
        killed = process.poll() is None
        if killed:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = len(_updates(root))
    error, text = _trained(file, root, end)
    if error:
        return {"error": error}
    replayed = re.search(r"replaying (?:(\d+) x )?update_policy", " ".join(text.split()))
    content = _updates(root)[-1]["content"]
    return {
        "error": None,
        "killed": killed,
        "updates_before": before,
        "updates_replayed": int(replayed[1] or 1) if replayed else 0,
        "equal": content == undisturbed["content"],
    }


def _trained(file: Path, root: Path, end: float) -> tuple[str | None, str]:
    """Run to the end; return the last lines where that failed or took too long, and all that was printed."""
    left = max(1.0, end - time.monotonic())
    try:
        done = subprocess.run(
            _command(file, root), capture_output=True, text=True, check=False, env=_surroundings(), timeout=left
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {left:.0f} s: no time was left (--minutes)", ""
    text = done.stdout + done.stderr
    return ("\n".join(text.splitlines()[-_LINES:]) or "it printed nothing") if done.returncode else None, text


def _updates(root: Path) -> list[dict[str, Any]]:
    return [record for record in Store(root / "store").actions() if record["stage"] == "update_policy"]


def _command(file: Path, root: Path) -> list[str]:
    return [sys.executable, "-m", "flows.proving.proof", str(file), str(root)]


def _surroundings() -> dict[str, str]:
    """Return the environment of a run: this one's, but for a store that is not the root's."""
    return importing_ours({name: value for name, value in os.environ.items() if name != "COHORT_STORE"})


def _train(file: Path, root: Path) -> None:
    config = choose(_RECIPE, [file], []).config
    require_backend(config.rollout.backend)
    with use_store(Places(root).open_store()):
        iterative_rl(config)


if __name__ == "__main__":
    try:
        _train(Path(sys.argv[1]), Path(sys.argv[2]))
    except ConfigError as error:
        sys.exit(f"configuration: {error}")
