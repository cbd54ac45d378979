"""What an update costs outside of its arithmetic: with every policy written at once, written from a copy, and not written.

    .venv/bin/python -m benchmarks.checkpoints            # 39 M parameters, 8 questions x 8 outputs x 64 tokens; minutes
    .venv/bin/python -m benchmarks.checkpoints --quick    # a small model, to see that it runs

One process and one engine. Rounds of one update of each kind, in an order that turns. Arithmetic is `optimizer_step` and the
reference's forward passes. Bytes are those that are new on the disk after the stage, and after its writer. Prints medians, and
one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.cohort_worker import _configs
from benchmarks.timing import Clock
from benchmarks.workload import Workload, make_policy, make_questions
from pipeline.derivation.materialise import materialise
from pipeline.store import Store, use_store
from pipeline.store.context import Payloads, writing_payloads
from stages.advantage import GroupConfig, estimate_advantages
from stages.data import QuestionFileConfig, read_questions
from stages.models import ExternalCheckpointConfig, import_checkpoint
from stages.reward import score
from stages.rollout import rollout
from stages.text import PromptConfig
from stages.update import update_policy

_KINDS: Final[tuple[Payloads, ...]] = ("now", "background", "never")
_FORTY: Final = {"hidden": 512, "layers": 12, "heads": 8, "kv_heads": 8, "intermediate": 1536, "vocabulary": 512}
"""39 M parameters."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model, one round")
    parser.add_argument(
        "--rounds", type=int, default=4, help="updates of each kind that count, after one that does not"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"questions": 2, "group": 2, "tokens": 8} if asked.quick else {"questions": 8, "group": 8, "tokens": 64}
        shape = {} if asked.quick else _FORTY
        workload = Workload(folder, steps=1, precision=asked.precision, **sizes, **shape)
        found = measure(workload, 1 if asked.quick else asked.rounds)
    for kind, figures in found.items():
        print(f"{kind:<11}", "  ".join(f"{name} {value:,.4g}" for name, value in figures.items()))
    print(json.dumps(found))


def measure(workload: Workload, rounds: int) -> dict[str, dict[str, float]]:
    """Return medians of each kind: seconds of the stage, those outside of arithmetic and their share, bytes written."""
    import stages.training.loop
    from stages.training.writer import writer
    from stages.update.loss import MiniBatch

    clock = Clock()
    clock.watch("arithmetic", stages.training.loop, "optimizer_step")
    clock.watch("arithmetic", MiniBatch, "logprobs")
    taken: dict[str, list[dict[str, float]]] = {kind: [] for kind in _KINDS}
    root = Path(workload.folder) / "store"
    with use_store(Store(root)) as store:
        store.replay = functools.partial(materialise, store)
        update, policy = _prepared(workload)
        for number in range(rounds + 1):
            for kind in (_KINDS[(number + turn) % len(_KINDS)] for turn in range(len(_KINDS))):
                clock.take()
                before, started = _bytes(root), time.perf_counter()
                with writing_payloads(kind):
                    policy = update(policy, seed=1000 * number + _KINDS.index(kind))
                seconds = time.perf_counter() - started
                at_once = _bytes(root) - before
                writer().wait()
                outside = seconds - clock.take()["arithmetic"]
                taken[kind].append(
                    {
                        "seconds": seconds,
                        "outside": outside,
                        "share": outside / seconds,
                        "bytes": at_once,
                        "bytes later": _bytes(root) - before - at_once,
                    }
                )
    return {
        kind: {name: median(each[name] for each in figures[1:]) for name in figures[0]}
        for kind, figures in taken.items()
    }


def _prepared(workload: Workload) -> tuple[Any, Any]:
    """Return the update of a policy on sampled outputs, and the policy."""
    make_policy(workload)
    make_questions(workload)
    sampling, reward, learning = _configs(workload, "eager", 4096)
    questions = read_questions(QuestionFileConfig(path=str(workload.question_file)))
    policy = import_checkpoint(ExternalCheckpointConfig(path=workload.policy))
    outputs = rollout(policy, questions, PromptConfig(suffix="\n"), sampling, seed=0)
    advantages = estimate_advantages(score(outputs, questions, reward), outputs, GroupConfig())
    return lambda given, seed: update_policy(given, policy, outputs, advantages, learning, seed=seed), policy


def _bytes(root: Path) -> int:
    """Return the bytes on the disk, linked files once."""
    states = {(state.st_dev, state.st_ino): state.st_size for state in map(Path.lstat, root.rglob("*")) if state}
    return sum(states.values())


if __name__ == "__main__":
    main()
