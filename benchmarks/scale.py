"""Thousands of steps and a million rollouts: cost against size, with verdicts and plots.

    .venv/bin/python -m benchmarks.scale --out artifacts/bench-scale.json      # 2,000 steps, 1 M rollouts; minutes
    .venv/bin/python -m benchmarks.scale --quick                               # to see that it runs

A: a run of many steps whose policy, sampler and update are stand-ins that cost nothing (`scale_fakes.py`): what is left of a
step is the store, the ledger and the record, MLflow, and Prefect. Inline, the same again with everything cached, and through
Prefect. B: rollouts through the real stages `score` and `estimate_advantages`, whose memory a chunk bounds.

Each is a process of its own, one after the other. Compared are the last hundred steps with the first hundred (the very first
apart, which imports), by wall time and by processor time.
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
from typing import Any, Final

import pyarrow as pa

from benchmarks.scale_plots import plot_rollouts, plot_steps

_ENDS: Final = 100
"""Steps that are compared, at both ends."""
_RATIO: Final = 1.2
"""What the last steps may cost of the first."""
_MEMORY_MIB: Final = 1024.0
_COMPUTE_SECONDS: Final = 2.0
_RSS_KIB_A_STEP: Final = 32.0
"""Memory that a step may leave behind: its points, its calls and its digests, which the summary and the ledger are made of."""
_RUNS: Final = ("inline", "cached", "prefect")
_IMAGES: Final = Path(__file__).resolve().parents[1] / "docs" / "images"

Line = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    report: Line = {"date": time.strftime("%Y-%m-%d"), "load": os.getloadavg()[0], "steps": {}, "rollouts": []}
    with tempfile.TemporaryDirectory(prefix="cohort-scale-", dir=options.scratch) as folder:
        for run in options.runs:
            report["steps"][run] = _steps(Path(folder), run, options)
        for outputs in options.rollouts:
            report["rollouts"] += _worker("scale_rollouts", str(Path(folder) / f"rollouts-{outputs}"), str(outputs))
    report["verdicts"] = verdicts(report)
    print(_shown(report))
    if options.images:
        _draw(report, options.images)
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")


def _steps(folder: Path, run: str, options: argparse.Namespace) -> Line:
    """`cached` is `inline` once more in the same folder."""
    steps, engine = options.steps, "inline"
    if run == "prefect":
        steps, engine = options.prefect_steps, "prefect"
    lines = _worker("scale_worker", str(folder / engine), str(steps), engine)
    return {"by_step": lines[:-1], "end": lines[-1]}


def _worker(module: str, *arguments: str) -> list[Line]:
    """What a worker said, a line each."""
    print(f"{module} {' '.join(arguments[1:])}", file=sys.stderr, flush=True)
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{module} ended with {done.returncode}: {done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def ends(by_step: Sequence[Line], key: str) -> tuple[float, float]:
    """Median seconds of the first and of the last hundred steps, the very first apart; of a short run, of its halves."""
    values = [line[key] for line in by_step[1:]]
    size = min(_ENDS, len(values) // 2)
    return median(values[:size]), median(values[-size:])


def held(by_step: Sequence[Line], key: str) -> tuple[float, float]:
    """What the process held when its first tenth was over, and at its end."""
    looks = [line for line in by_step if key in line]
    return looks[len(looks) // 10][key], looks[-1][key]


def pool_threads() -> int:
    """Threads that a process may gain as it goes: pyarrow's pools start one more when there is work for it."""
    return pa.cpu_count() + pa.io_thread_count()


def verdicts(report: Line) -> dict[str, bool]:
    """Whether each thing that must hold did."""
    found = {}
    for run, measured in report["steps"].items():
        lines = measured["by_step"]
        first, last = ends(lines, "cpu_seconds")
        found[f"{run}: last steps cost at most {_RATIO} of the first (processor)"] = last <= _RATIO * first
        first, last = ends(lines, "seconds")
        found[f"{run}: last steps cost at most {_RATIO} of the first (wall)"] = last <= _RATIO * first
        grown = {key: held(lines, key)[1] - held(lines, key)[0] for key in ("rss_mib", "handles", "threads")}
        found[f"{run}: handles and threads flat"] = grown["handles"] <= 1 and grown["threads"] <= pool_threads()
        allowed = _RSS_KIB_A_STEP * len(lines) / 2**10
        found[f"{run}: at most {_RSS_KIB_A_STEP:.0f} KiB of memory a step"] = grown["rss_mib"] <= allowed
    if "cached" in report["steps"]:
        found["cached: nothing computed"] = report["steps"]["cached"]["end"]["executed"] == 0
    for line in report["rollouts"]:
        if line["stage"] != "write":
            name = f"{line['outputs']:,} {line['stage']}"
            found[f"{name}: under {_MEMORY_MIB:.0f} MiB"] = line["own_mib"] + line["mapped_mib"] < _MEMORY_MIB
        if line["stage"] == "advantages":
            found[f"{name}: under {_COMPUTE_SECONDS:.0f} s of compute"] = line["computed_seconds"] < _COMPUTE_SECONDS
    return found


def _shown(report: Line) -> str:
    """The report as text."""
    heads = ("run", "steps", "first ms", "last ms", "ratio", "cpu ms", "ratio", "MiB", "handles", "all s")
    lines = [f"{heads[0]:10}" + "".join(f"{head:>9}" for head in heads[1:])]
    for run, measured in report["steps"].items():
        by_step = measured["by_step"]
        (first, last), (cpu_first, cpu_last) = ends(by_step, "seconds"), ends(by_step, "cpu_seconds")
        memory, handles = held(by_step, "rss_mib"), held(by_step, "handles")
        lines.append(
            f"{run:10}{len(by_step):9,}{1e3 * first:9.1f}{1e3 * last:9.1f}{last / first:9.2f}{1e3 * cpu_last:9.1f}"
            f"{cpu_last / cpu_first:9.2f}{memory[0]:4.0f}-{memory[1]:<4.0f}{handles[0]:4.0f}-{handles[1]:<4.0f}"
            f"{measured['end']['seconds']:9.1f}"
        )
        parts = {part: 1e3 * median(line["parts"].get(part, 0.0) for line in by_step) for part in by_step[-1]["parts"]}
        shown = ", ".join(f"{part} {ms:.2f}" for part, ms in sorted(parts.items(), key=lambda each: -each[1]))
        lines.append(f"{'':10}  ms a step: {shown}")
    lines += [
        f"{line['outputs']:>9,} rollouts, {line['stage']:10}: {line['seconds']:7.2f} s, {line['computed_seconds']:7.2f} s "
        f"without the store, {line['own_mib']:6.0f} MiB of its own, {line['mapped_mib']:6.0f} MiB of mapped files"
        for line in report["rollouts"]
    ]
    lines += [f"{'holds' if held else 'FAILS':6} {name}" for name, held in report["verdicts"].items()]
    return "\n".join([*lines, f"load average at the start: {report['load']:.1f}"])


def _draw(report: Line, images: Path) -> None:
    images.mkdir(parents=True, exist_ok=True)
    if report["steps"]:
        plot_steps({run: measured["by_step"] for run, measured in report["steps"].items()}, images / "scale-steps.png")
    if report["rollouts"]:
        plot_rollouts(report["rollouts"], images / "scale-rollouts.png")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="of the runs without Prefect (2000)")
    parser.add_argument("--prefect-steps", type=int, default=2000, help="of the run through Prefect (2000)")
    parser.add_argument(
        "--rollouts", type=int, nargs="*", default=[65_536, 262_144, 1_000_000], help="how many outputs"
    )
    parser.add_argument(
        "--runs", nargs="*", choices=_RUNS, default=list(_RUNS), help="which runs; `cached` needs `inline`"
    )
    parser.add_argument("--scratch", help="folder for stores and databases (2 GB); where temporary files go by default")
    parser.add_argument("--images", type=Path, help=f"folder for the plots (those of the docs are in {_IMAGES})")
    parser.add_argument("--out", help="write the figures here, as JSON")
    parser.add_argument("--quick", action="store_true", help="60 steps, 30 through Prefect, 16,384 rollouts")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.prefect_steps, options.rollouts = 60, 30, [16_384]
    return options


if __name__ == "__main__":
    main()
