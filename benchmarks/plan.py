"""What `cohort plan` says of small models, against what their stages take: memory, and on a quiet machine time.

    .venv/bin/python -m benchmarks.plan                   # measures the device, then every case; minutes
    .venv/bin/python -m benchmarks.plan --quick           # two cases, to see that it runs
    .venv/bin/python -m benchmarks.plan --no-bench        # memory only: figures of time say nothing on a busy machine

Every case is a process of its own (`benchmarks/plan_worker.py`): a stage on a policy with random weights, all its outputs
different. Planned and measured figures are shown with their ratio. The device's rates are measured right before.
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
from typing import Any, Final

from benchmarks.plan_worker import Case
from flows.planning.machine import DeviceProfile, read_profile
from flows.planning.memory import Batch, hf_memory, sharing, training_memory
from flows.planning.shapes import shape_of
from flows.planning.work import decoding_work, scoring_work, seconds_of, takes_head_again, training_work
from stages.rollout import HFBackendConfig
from stages.training import TrainingConfig
from stages.training.hardware import has_cuda

_ADAM: Final = {"optimizer": {"kind": "adamw", "learning_rate": 1e-6}, "precision": "fp32", "threads": 1}
_SFT_STEPS: Final = 2
_MEMORY: Final = 0.15
_TIME: Final = 1.5


def _qwen(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }


_DEMO: Final = _qwen(96, 256, 3, 3, 3, 128)
"""0.35 M parameters: the policy of arithmetic_cpu, with a vocabulary of 128."""
_FIVE: Final = _qwen(256, 704, 6, 4, 4, 128)
"""4.9 M."""
_FORTY: Final = _qwen(512, 1408, 8, 8, 2, 32_000)
"""38.9 M, 16.4 M of them in the embedding."""


def _zero(stage: int) -> dict[str, Any]:
    return {**_ADAM, "engine": {"kind": "deepspeed", "zero_stage": stage}}


CASES: Final = (
    Case("sft, 0.35 M", "sft", _DEMO, rows=256, prompt=16, output=16, training=_ADAM),
    Case("update, 0.35 M", "update", _DEMO, rows=256, prompt=16, output=16, training=_ADAM),
    Case("rollout, 0.35 M", "rollout", _DEMO, rows=256, group=16, prompt=16, output=64, training=_ADAM),
    Case("sft, 4.9 M", "sft", _FIVE, rows=64, prompt=32, output=32, training=_ADAM),
    Case(
        "update, 4.9 M, reference",
        "update",
        _FIVE,
        rows=32,
        prompt=64,
        output=64,
        micro_batch_tokens=2048,
        training=_ADAM,
        beta=0.04,
    ),
    Case(
        "update, 4.9 M, recomputed",
        "update",
        _FIVE,
        rows=8,
        prompt=256,
        output=256,
        micro_batch_tokens=2048,
        training={**_ADAM, "activation_checkpointing": True},
    ),
    Case("rollout, 4.9 M", "rollout", _FIVE, rows=128, group=8, prompt=32, output=128, training=_ADAM),
    Case("update, 39 M", "update", _FORTY, rows=4, prompt=64, output=192, micro_batch_tokens=512, training=_ADAM),
    Case("update, 39 M, ZeRO 1", "update", _FORTY, rows=2, prompt=16, output=16, training=_zero(1)),
    Case("update, 39 M, ZeRO 3", "update", _FORTY, rows=2, prompt=16, output=16, training=_zero(3)),
    Case(
        "rollout, 23 M",
        "rollout",
        {**_FORTY, "vocab_size": 128},
        rows=64,
        group=8,
        prompt=32,
        output=128,
        training=_ADAM,
    ),
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    cases = [case for case in CASES if not options.quick or case.name.endswith("0.35 M")]
    chosen = [case for case in cases if not options.cases or case.name in options.cases]
    with tempfile.TemporaryDirectory(prefix="cohort-plan-", dir=options.scratch) as folder:
        profile = None if options.no_bench else _bench(Path(folder))
        rows = []
        for case, file in zip(chosen, _prepared(chosen, Path(folder)), strict=True):
            rows.append(_compared(case, profile, file))
            print(_line(rows[-1]), flush=True)
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "load": os.getloadavg()[0],
        "profile": None if profile is None else profile.model_dump(mode="json"),
        "rows": rows,
    }
    print(_verdict(rows))
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")


def planned(case: Case, profile: DeviceProfile | None) -> dict[str, float]:
    """MiB and seconds that the formulas of `cohort plan` give for a case."""
    shape = shape_of({**case.shape, "model_type": "qwen2"}, case.name)
    config = TrainingConfig.model_validate(case.training)
    rows, prompt, output, budget = case.rows, case.prompt, case.output, case.micro_batch_tokens
    group = 1 if case.stage == "sft" else case.group
    batch = Batch.of(rows, prompt, output, budget, sharing(config, group))
    again = takes_head_again(config.head_precision, half=config.bf16, gpu=has_cuda())
    match case.stage:
        case "rollout":
            memory = hf_memory(
                shape,
                HFBackendConfig(),
                outputs=rows,
                group=case.group,
                prompt=prompt,
                longest=output,
                half=config.bf16,
            )
            work = decoding_work(
                shape,
                rows / case.group,
                case.group,
                prompt,
                output,
                output,
                side_by_side=rows,
                half=config.bf16,
                again=again,
            )
        case "sft":
            memory = training_memory(shape, config, batch)
            work = training_work(shape, config, rows, prompt, output, budget, again=again).times(_SFT_STEPS)
        case "update":
            memory = training_memory(shape, config, batch, reference=case.beta > 0)
            work = training_work(shape, config, rows, prompt, output, budget, group=group, again=again)
            if case.beta:
                work += scoring_work(shape, config, rows, prompt, output, budget, group=group, again=again)
    found = {"mib": sum(memory.values()) / 2**20}
    if profile is not None:
        sampling = case.stage == "rollout"
        found["seconds"] = seconds_of(work, profile, shape.hidden, config.products, sampling=sampling, threads=1)
        written = {"sft": 4.0, "update": 12.0, "rollout": 0.0}[case.stage] * shape.parameters
        found["seconds"] += written / profile.disk + written / profile.hashing
    return found


def _bench(folder: Path) -> DeviceProfile:
    """The device's rates, by a process whose memory is gone afterwards."""
    command = [sys.executable, "-m", "flows.cli", "doctor", "--bench", "--root", str(folder)]
    subprocess.run(command, check=True, env=_surroundings(), stdout=sys.stderr)
    return read_profile(folder / "device.json")


def _prepared(cases: Sequence[Case], folder: Path) -> list[Path]:
    """A folder for each case, with its file and its policies, made by a process whose memory is gone afterwards."""
    files = [folder / str(number) / "case.json" for number in range(len(cases))]
    for case, file in zip(cases, files, strict=True):
        file.parent.mkdir()
        file.write_text(json.dumps(dataclasses.asdict(case)))
    program = f"from benchmarks.plan_worker import make_policies; make_policies({[str(file) for file in files]!r})"
    done = subprocess.run(
        [sys.executable, "-c", program], env=_surroundings(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"the policies could not be made: {done.stderr[-3000:]}")
    return files


def _compared(case: Case, profile: DeviceProfile | None, file: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.plan_worker", str(file)]
    done = subprocess.run(command, env=_surroundings(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case.name} ended with {done.returncode}: {done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    said = planned(case, profile)
    row: dict[str, Any] = {"case": case.name, "mib": found["peak_mib"], "planned_mib": said["mib"]}
    row["memory_ratio"] = said["mib"] / found["peak_mib"]
    if profile is not None:
        row |= {name: found[name] for name in ("seconds", "cpu_seconds")} | {"planned_seconds": said["seconds"]}
        row["time_ratio"] = said["seconds"] / found["seconds"]
        row["cpu_ratio"] = said["seconds"] / found["cpu_seconds"]
    return row


def _line(row: dict[str, Any]) -> str:
    memory = (
        f"{row['case']:28} {row['planned_mib']:9.1f} MiB planned {row['mib']:9.1f} measured {row['memory_ratio']:6.3f}"
    )
    if "time_ratio" not in row:
        return memory
    time_ = f"{row['planned_seconds']:7.2f} s planned {row['seconds']:7.2f} measured {row['time_ratio']:6.2f}"
    return f"{memory}   {time_}  cpu {row['cpu_seconds']:7.2f} {row['cpu_ratio']:6.2f}"


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    worst = max(abs(row["memory_ratio"] - 1) for row in rows)
    text = f"memory: within {worst:.1%} (wanted {_MEMORY:.0%})"
    if any("time_ratio" in row for row in rows):
        factor = max(max(row["time_ratio"], 1 / row["time_ratio"]) for row in rows)
        text += f"; time: within a factor of {factor:.2f} (wanted {_TIME}), load {os.getloadavg()[0]:.1f}"
    return text


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="the smallest model only")
    parser.add_argument("--no-bench", action="store_true", help="memory only")
    parser.add_argument("--scratch", help="folder for the policies' files (1 GB)")
    parser.add_argument("--out", help="write the figures here, as JSON")
    return parser.parse_args(arguments)


def _surroundings() -> dict[str, str]:
    """What is freed goes back to the system at once, so that the high-water mark is that of memory in use."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1"}
    return {**os.environ, **quiet, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


if __name__ == "__main__":
    main()
