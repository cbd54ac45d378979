"""One GRPO step of ours against one of TRL's `GRPOTrainer`, interleaved, as a ratio.

    make bench                                            # both sides at full size
    .venv/bin/python -m benchmarks.step --quick           # 4 questions, to see that it runs
    .venv/bin/python -m benchmarks.step --shape qwen2.5-0.5b --tokens 256 --sides ...    # for a GPU: see the README

Every side is a process of its own that computes a step on request; only one computes at a time. A round is one step of each
side, in an order that turns; medians over rounds are compared, so that a machine that is busy for a while is busy for all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.floor import floor_flops, gemm_gflops
from benchmarks.workload import SHAPES, Workload, make_policy, make_questions
from stages.training.batching import sample_positions
from stages.training.hardware import native_bf16

_ARITHMETIC = ("generation", "reference", "update", "load weights")
"""Phases that are the model's; rewards and advantages are neither, all others are orchestration."""
_REWARDS = ("rest of score", "rest of estimate_advantages", "reward_advantage")


class Side:
    """A worker process: one line in, one step, one JSON line out."""

    def __init__(self, name: str, workload: Workload, peer_python: str) -> None:
        kind, *options = name.split(":")
        python = peer_python if kind == "trl" else sys.executable
        command = [python, "-m", f"benchmarks.{kind}_worker", str(workload.save()), *options]
        log = Path(workload.folder) / f"{name.replace(':', '-')}.log"
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=_quiet()
            )
        self.name, self._log = name, log
        self.steps: list[dict[str, Any]] = []
        self._answer()

    def step(self) -> None:
        """Compute one step and keep what it took."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.steps.append(self._answer() | {"load": os.getloadavg()[0]})

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self._process.wait()}: {self._log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    with tempfile.TemporaryDirectory(prefix="cohort-bench-") as folder:
        workload = Workload(
            folder=folder,
            questions=options.questions,
            group=options.group,
            tokens=options.tokens,
            steps=options.warmup + options.rounds,
            precision=options.precision,
            threads=options.threads,
            **SHAPES[options.shape],
        )
        prompt_tokens = _prepare(workload)
        sides = [Side(name, workload, options.peer_python) for name in options.sides]
        try:
            rates = _run(sides, workload, options)
        finally:
            for side in sides:
                side.close()
    report = _report(sides, workload, prompt_tokens, rates, options)
    print(_shown(report))
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")


def _prepare(workload: Workload) -> float:
    """Policy, questions, and the prompts in the order in which the pipeline draws them; returns tokens per prompt."""
    make_policy(workload)
    rows = make_questions(workload)
    size, seed = workload.questions, workload.seed
    drawn = [p for step in range(workload.steps) for p in sample_positions(len(rows), size=size, step=step, seed=seed)]
    prompts = [rows[position]["question"] + "\n" for position in drawn]
    workload.prompt_file.write_text(json.dumps(prompts))
    return sum(map(len, prompts)) / len(prompts)  # one token a character


def _run(sides: list[Side], workload: Workload, options: argparse.Namespace) -> list[dict[str, float]]:
    rates = []
    for number in range(options.warmup + options.rounds):
        rates.append(gemm_gflops(workload))
        turn = number % len(sides)
        for side in sides[turn:] + sides[:turn]:
            side.step()
            last = side.steps[-1]
            print(f"{side.name}: {last['seconds']:.2f} s, load {last['load']:.1f}", file=sys.stderr)
    return rates[options.warmup :]


def _report(
    sides: list[Side],
    workload: Workload,
    prompt_tokens: float,
    rates: list[dict[str, float]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    flops = floor_flops(workload, prompt_tokens)
    rate = {name: median(part[name] for part in rates) for name in rates[0]}
    speed = {"generation": rate["decode"], "reference": rate["train"], "update": rate["train"]}
    results = {side.name: _summary(side.steps[options.warmup :]) for side in sides}
    for result in results.values():
        result |= _rates(result["phases"], flops["update"] / 1e12, workload)
    trl = {name: result for name, result in results.items() if name.startswith("trl")}
    best = min(trl, key=lambda name: trl[name]["seconds"]) if trl else None
    for result in results.values():
        if best:
            result["times_faster_than_trl"] = trl[best]["seconds"] / result["seconds"]
            result["times_less_processor_than_trl"] = trl[best]["cpu_seconds"] / result["cpu_seconds"]
    return {
        "workload": {key: value for key, value in vars(workload).items() if key != "folder"},
        "date": time.strftime("%Y-%m-%d"),
        "prompt_tokens": prompt_tokens,
        "gemm_gflops": rate,
        "floor_s": {phase: count / 1e9 / speed[phase] for phase, count in flops.items()},
        "floor_gflop": {phase: count / 1e9 for phase, count in flops.items()},
        "results": results,
        "trl_reference": best,
        "peak_tflops": options.peak_tflops,
    }


def _summary(steps: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = median(step["seconds"] for step in steps)
    names = {name for step in steps for name in step["phases"]}
    phases = {name: median(step["phases"].get(name, 0.0) for step in steps) for name in sorted(names)}
    # The share is a median over steps of each step's own share: parts of different steps do not add up.
    outside = median(
        sum(took for name, took in step["phases"].items() if name not in (*_ARITHMETIC, *_REWARDS)) / step["seconds"]
        for step in steps
    )
    return {
        "seconds": seconds,
        "spread": [min(step["seconds"] for step in steps), max(step["seconds"] for step in steps)],
        "cpu_seconds": median(step["cpu_seconds"] for step in steps),
        "load": median(step["load"] for step in steps),
        "orchestration_share": outside,
        "device_mib": max(step["device_mib"] for step in steps),
        "phases": phases,
    }


def _rates(phases: dict[str, float], update_tflop: float, workload: Workload) -> dict[str, float]:
    """Tokens sampled a second, and TFLOP/s of the update's products: what a model needs, recomputation apart."""
    tokens = workload.questions * workload.group * workload.tokens
    return {
        "tokens_per_second": tokens / phases["generation"],
        "update_tflops": update_tflop / phases["update"],
    }


def _shown(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{'side':32} {'wall s':>8} {'cpu s':>8} {'x TRL':>7} {'x cpu':>7} {'orchestr.':>9} {'load':>5}"]
    for name, result in report["results"].items():
        faster, less = result.get("times_faster_than_trl", 0), result.get("times_less_processor_than_trl", 0)
        share = f"{result['orchestration_share']:9.1%}" if not name.startswith("trl") else f"{'':9}"
        row = f"{result['seconds']:8.2f} {result['cpu_seconds']:8.2f} {faster:7.2f} {less:7.2f} {share} {result['load']:5.1f}"
        lines.append(f"{name:32} {row}")
    for name, result in report["results"].items():
        used = f", {result['update_tflops'] / report['peak_tflops']:.1%} of the peak" if report["peak_tflops"] else ""
        held = f", {result['device_mib']:,.0f} MiB of the device" if result["device_mib"] else ""
        rates = f"{result['tokens_per_second']:,.0f} tokens/s sampled, update {result['update_tflops']:.3g} TFLOP/s"
        lines.append(f"{name}: {rates}{used}{held}")
    for name, result in report["results"].items():
        parts = sorted(result["phases"].items(), key=lambda item: -item[1])
        lines.append(f"{name}: " + ", ".join(f"{phase} {took:.3f}" for phase, took in parts if took >= 0.0005))
    floor = ", ".join(f"{phase} {took:.2f}" for phase, took in report["floor_s"].items())
    lines.append(f"floor (s at the measured product speed {report['gemm_gflops']}): {floor}")
    return "\n".join(lines)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if native_bf16() else "fp32")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="of the policy (small)")
    parser.add_argument(
        "--peak-tflops", type=float, default=0.0, help="of the device by its data sheet, for comparison"
    )
    parser.add_argument("--peer-python", default=".venv-bench/bin/python")
    parser.add_argument("--out", help="write the figures here, as JSON")
    parser.add_argument("--quick", action="store_true", help="4 questions of 16 outputs, 2 rounds")
    parser.add_argument(
        "--sides", nargs="+", help="cohort:ENGINE:ATTENTION:MICRO_BATCH_TOKENS, trl:ATTENTION:MICRO_BATCH"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.questions, options.rounds = 4, 2
    outputs = options.questions * options.group
    options.sides = options.sides or [
        "cohort:inline:eager:4096",
        "cohort:prefect:eager:4096",
        f"trl:eager:{min(64, outputs)}",
        f"trl:sdpa:{min(64, outputs)}",
    ]
    return options


def _quiet() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1"}


if __name__ == "__main__":
    main()
