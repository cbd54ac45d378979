"""Peak memory of one policy update at a large vocabulary: ours, a naive loss and TRL's `GRPOTrainer`, with the floor.

    make bench-memory                                     # Qwen2.5-0.5B's shape, 2 x 1,024 tokens; needs 14 GiB, minutes
    .venv/bin/python -m benchmarks.memory --quick         # two small layers, to see that it runs

Every side is a process of its own, one after the other, with random weights, activation checkpointing and AdamW in float32. A
small update first, so that the optimizer's state is there; then the one that is measured: the highest resident memory during
it, less that of a process that has updated a tiny model. The logits' share is measured, too: the side `one-token` makes the
same update with a loss of a single token a row, so that all but the logits is in its peak.
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
from typing import Any

from benchmarks.memory_work import MemoryWork

_BYTES = 4
"""Of a float32."""
_GIB = 1024.0
"""MiB."""
_SIDES = ("one-token", "cohort", "naive", "trl")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    with tempfile.TemporaryDirectory(prefix="cohort-memory-", dir=options.scratch) as folder:
        work = dataclasses.replace(options.work, folder=folder)
        _make_policy(work)
        _make_policy(work.tiny())
        results = {}
        for side in options.sides:
            results[side] = _measure(side, work, options.peer_python)
            print(f"{side}: {json.dumps(results[side])}", file=sys.stderr, flush=True)
    report = _report(work, results)
    print(_shown(report))
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")


def _make_policy(work: MemoryWork) -> None:
    """Random weights as a Hugging Face folder, by a process whose memory is gone afterwards."""
    program = f"from benchmarks.memory_work import MemoryWork, make_policy; make_policy(MemoryWork.load({str(work.save())!r}))"
    subprocess.run([sys.executable, "-c", program], check=True, env=_surroundings())


def _measure(side: str, work: MemoryWork, peer_python: str) -> dict[str, float]:
    python = peer_python if side == "trl" else sys.executable
    command = [python, "-m", "benchmarks.memory_worker", str(work.save()), side]
    done = subprocess.run(command, env=_surroundings(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} ended with {done.returncode}: {done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _report(work: MemoryWork, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    parameters = next(iter(results.values()))["parameters"]
    state = parameters * 4 * _BYTES / 2**20  # weights, gradients, two moments
    activations = work.layers * work.rows * (work.prompt + work.output) * work.hidden * _BYTES / 2**20
    logits = work.rows * work.output * work.vocabulary * _BYTES / 2**20
    least = results.get("one-token", {}).get("peak_mib")
    rows = {}
    for side, found in results.items():
        rows[side] = found | {"over_floor": found["peak_mib"] / (state + activations)}
        if least is not None:
            rows[side]["logits_share"] = (found["peak_mib"] - least) / found["peak_mib"]
    return {
        "work": {key: value for key, value in vars(work).items() if key != "folder"},
        "date": time.strftime("%Y-%m-%d"),
        "parameters": parameters,
        "floor_mib": {"state": state, "activations": activations},
        "logits_mib": logits,
        "results": rows,
    }


def _shown(report: dict[str, Any]) -> str:
    """The report as text."""
    state, activations = report["floor_mib"]["state"], report["floor_mib"]["activations"]
    lines = [f"{'side':24} {'peak GiB':>9} {'x floor':>8} {'logits':>7}"]
    lines.append(f"{'floor':24} {(state + activations) / _GIB:9.2f} {1:8.2f}")
    for side, found in report["results"].items():
        share = f"{found['logits_share']:z7.1%}" if "logits_share" in found else f"{'':7}"
        lines.append(f"{side:24} {found['peak_mib'] / _GIB:9.2f} {found['over_floor']:8.2f} {share}")
    lines.append(
        f"floor: weights, gradients and AdamW's moments of {report['parameters'] / 1e6:.0f} M parameters "
        f"{state / _GIB:.2f} GiB, a hidden state a layer and token {activations / _GIB:.2f} GiB; all logits once would be "
        f"{report['logits_mib'] / _GIB:.2f} GiB"
    )
    return "\n".join(lines)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(MemoryWork):
        if field.name != "folder":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--sides", nargs="+", choices=(*_SIDES, "cohort-full"), default=_SIDES)
    parser.add_argument("--peer-python", default=".venv-bench/bin/python")
    parser.add_argument("--scratch", help="folder for the policy's files (4 GB)")
    parser.add_argument("--out", help="write the figures here, as JSON")
    parser.add_argument("--quick", action="store_true", help="2 layers of 128, vocabulary 32,000, 2 x 256 tokens")
    options = parser.parse_args(arguments)
    given = {
        field.name: getattr(options, field.name) for field in dataclasses.fields(MemoryWork) if field.name != "folder"
    }
    if options.quick:
        given |= {"vocabulary": 32_000, "hidden": 128, "intermediate": 256, "layers": 2, "heads": 4, "kv_heads": 2}
        given |= {"prompt": 16, "output": 240}
    options.work = MemoryWork(folder="", **given)
    return options


def _surroundings() -> dict[str, str]:
    """What is freed goes back to the system at once, so that the high-water mark is that of memory in use; for all sides."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1"}
    return {**os.environ, **quiet, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


if __name__ == "__main__":
    main()
