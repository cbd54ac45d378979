"""One GRPO step of ours against one of TRL's `GRPOTrainer`, interleaved, as a ratio.

    make bench                                            # both sides at full size, random weights
    .venv/bin/python -m benchmarks.step --workload sharp  # the demo's policy half-way; or words: word problems
    .venv/bin/python -m benchmarks.step --quick           # 4 questions, to see that it runs
    .venv/bin/python -m benchmarks.step --shape qwen2.5-0.5b --tokens 256 --sides ...    # for a GPU: see the README

Every side is a process of its own that computes a step on request; only one computes at a time. A round is one step of each
side, in an order that turns; medians over rounds are compared, so that a machine that is busy for a while is busy for all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, get_args

from benchmarks.floor import gemm_gflops
from benchmarks.workload import SHAPES, Kind, Workload, make_policy, make_questions, shape_of
from stages.training.batching import sample_positions
from stages.training.hardware import native_bf16

_ARITHMETIC = ("generation", "reference", "update", "load weights")
"""Phases that are the model's; rewards and advantages are neither, all others are orchestration."""
_SIZES: dict[Kind, tuple[int, int, int]] = {"random": (32, 16, 48), "sharp": (64, 16, 64), "words": (16, 8, 64)}
"""Questions, outputs of each, tokens of an output."""
_PAUSE = 2.0
"""Seconds between two sides, in which the process before frees its memory and its threads come to rest."""
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
    options = _options(arguments)
    with tempfile.TemporaryDirectory(prefix="cohort-bench-") as folder:
        workload = _prepare(options, folder)
        sides = [Side(name, workload, options.peer_python) for name in options.sides]
        try:
            rates = _run(sides, workload, options)
        finally:
            for side in sides:
                side.close()
    report = _report(sides, workload, rates, options)
    print(_shown(report))
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")


def _prepare(options: argparse.Namespace, folder: str) -> Workload:
    """Policy, questions, and the prompts in the order in which the pipeline draws them."""
    workload = Workload(
        folder=folder,
        kind=options.workload,
        chat=options.pretrained,
        questions=options.questions,
        group=options.group,
        tokens=options.tokens,
        steps=options.warmup + options.rounds,
        precision=options.precision,
        threads=options.threads,
        **SHAPES[options.shape],
    )
    if options.workload == "random":
        make_policy(workload)
        rows = make_questions(workload)
    else:
        given = ["--pretrained"] if options.pretrained else ["--policy", str(options.policy)] if options.policy else []
        program = [sys.executable, "-m", "benchmarks.policies", str(workload.save()), *given]
        subprocess.run([*program, *(["--quick"] if options.quick else [])], check=True, stdout=sys.stderr, env=_quiet())
        rows = [json.loads(line) for line in workload.question_file.read_text().splitlines()]
        workload = dataclasses.replace(workload, **shape_of(workload.policy))
    size, seed = workload.questions, workload.seed
    drawn = [p for step in range(workload.steps) for p in sample_positions(len(rows), size=size, step=step, seed=seed)]
    workload.prompt_file.write_text(json.dumps([workload.peer_row(rows[position]) for position in drawn]))
    return workload


def _run(sides: list[Side], workload: Workload, options: argparse.Namespace) -> list[dict[str, float]]:
    rates = []
    for number in range(options.warmup + options.rounds):
        rates.append(gemm_gflops(workload))
        turn = number % len(sides)
        for side in sides[turn:] + sides[:turn]:
            time.sleep(_PAUSE)
            side.step()
            last = side.steps[-1]
            print(f"{side.name}: {last['seconds']:.2f} s, load {last['load']:.1f}", file=sys.stderr)
    return rates[options.warmup :]


def _report(
    sides: list[Side],
    workload: Workload,
    rates: list[dict[str, float]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    rate = {name: median(part[name] for part in rates) for name in rates[0]}
    results = {side.name: _summary(side.steps[options.warmup :], rate) for side in sides}
    trl = {name: result for name, result in results.items() if name.startswith("trl")}
    best = min(trl, key=lambda name: trl[name]["seconds"]) if trl else None
    for result in results.values():
        if best:
            result["times_faster_than_trl"] = trl[best]["seconds"] / result["seconds"]
            result["times_less_processor_than_trl"] = trl[best]["cpu_seconds"] / result["cpu_seconds"]
    return {
        "workload": {key: value for key, value in vars(workload).items() if key != "folder"},
        "date": time.strftime("%Y-%m-%d"),
        "gemm_gflops": rate,
        "results": results,
        "trl_reference": best,
        "peak_tflops": options.peak_tflops,
    }


def _summary(steps: list[dict[str, Any]], rate: dict[str, float]) -> dict[str, Any]:
    """Medians over steps; the floor is that of the outputs which a side sampled itself."""
    seconds = median(step["seconds"] for step in steps)
    names = {name for step in steps for name in step["phases"]}
    phases = {name: median(step["phases"].get(name, 0.0) for step in steps) for name in sorted(names)}
    # The share is a median over steps of each step's own share: parts of different steps do not add up.
    outside = median(
        sum(took for name, took in step["phases"].items() if name not in (*_ARITHMETIC, *_REWARDS)) / step["seconds"]
        for step in steps
    )
    work = {
        name: median(step[name] for step in steps) for name in ("prompt_tokens", "output_tokens", "different", "reward")
    }
    speed = {"generation": rate["decode"], "reference": rate["train"], "update": rate["train"]}
    floor = {name: median(step["floor_flops"][name] for step in steps) / 1e9 / speed[name] for name in speed}
    return {
        "seconds": seconds,
        "spread": [min(step["seconds"] for step in steps), max(step["seconds"] for step in steps)],
        "cpu_seconds": median(step["cpu_seconds"] for step in steps),
        "load": median(step["load"] for step in steps),
        "orchestration_share": outside,
        "device_mib": max(step["device_mib"] for step in steps),
        "phases": phases,
        **work,
        "floor_s": floor,
        "times_the_floor": seconds / sum(floor.values()),
        "tokens_per_second": median(step["outputs"] * step["output_tokens"] for step in steps) / phases["generation"],
        "update_tflops": median(step["unshared_flops"] for step in steps) / 1e12 / phases["update"],
    }


def _shown(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"{'side':32} {'wall s':>8} {'cpu s':>8} {'x TRL':>7} {'x cpu':>7} {'x floor':>8} {'orchestr.':>9} {'load':>5}"
    ]
    for name, result in report["results"].items():
        faster, less = result.get("times_faster_than_trl", 0), result.get("times_less_processor_than_trl", 0)
        share = f"{result['orchestration_share']:9.1%}" if not name.startswith("trl") else f"{'':9}"
        times = f"{faster:7.2f} {less:7.2f} {result['times_the_floor']:8.2f}"
        lines.append(
            f"{name:32} {result['seconds']:8.2f} {result['cpu_seconds']:8.2f} {times} {share} {result['load']:5.1f}"
        )
    for name, result in report["results"].items():
        about = f"{result['prompt_tokens']:.0f} tokens of a prompt, {result['output_tokens']:.1f} of an output"
        lines.append(
            f"{name}: {about}, {result['different']:.0%} of the outputs different, reward {result['reward']:.2f}"
        )
    for name, result in report["results"].items():
        used = f", {result['update_tflops'] / report['peak_tflops']:.1%} of the peak" if report["peak_tflops"] else ""
        held = f", {result['device_mib']:,.0f} MiB of the device" if result["device_mib"] else ""
        rates = f"{result['tokens_per_second']:,.0f} tokens/s sampled, update {result['update_tflops']:.3g} TFLOP/s unshared"
        lines.append(f"{name}: {rates}{used}{held}")
    for name, result in report["results"].items():
        parts = sorted(result["phases"].items(), key=lambda item: -item[1])
        lines.append(f"{name}: " + ", ".join(f"{phase} {took:.3f}" for phase, took in parts if took >= 0.0005))
        lines.append("  floor: " + ", ".join(f"{phase} {took:.3f}" for phase, took in result["floor_s"].items()))
    lines.append(
        f"floor: what its outputs need, sharing all they can, at the measured product speed {report['gemm_gflops']}"
    )
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=get_args(Kind), default="random", help="what is sampled: see the README")
    parser.add_argument("--questions", type=int, help="of a step; by workload 32, 64, 16")
    parser.add_argument("--group", type=int, help="outputs of a question; 16, 16, 8")
    parser.add_argument("--tokens", type=int, help="of an output, at most; 48, 64, 64")
    parser.add_argument(
        "--policy", type=Path, help="sharp, words: a folder of `cohort export`, in place of one made first"
    )
    parser.add_argument("--pretrained", action="store_true", help="words: SmolLM2-135M-Instruct; downloads 93 MB")
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
    _refuse_unused(parser, options)
    if options.quick:
        options.questions, options.rounds = 4, 2
    questions, group, tokens = _SIZES[options.workload]
    options.questions, options.group = options.questions or questions, options.group or group
    options.tokens = options.tokens or tokens
    outputs = options.questions * options.group
    options.sides = options.sides or [
        "cohort:inline:eager:4096",
        "cohort:prefect:eager:4096",
        f"trl:eager:{min(64, outputs)}",
        f"trl:sdpa:{min(64, outputs)}",
    ]
    return options


def _refuse_unused(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.pretrained and (options.workload != "words" or options.policy):
        parser.error("--pretrained is the policy of --workload words; leave out --policy")
    if options.policy and options.workload == "random":
        parser.error("--policy: random weights are made here; add --workload sharp or words")
    if options.shape != "small" and options.workload != "random":
        parser.error("--shape is that of random weights; the other workloads have their policy's own")


def _quiet() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1"}


if __name__ == "__main__":
    main()
