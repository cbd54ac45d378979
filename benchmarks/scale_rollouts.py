"""Rollouts by the hundred thousand through score and advantages, in a process of its own; JSON lines on standard output.

    python -m benchmarks.scale_rollouts FOLDER OUTPUTS

64 outputs a question, of 4 to 40 tokens, written, scored by the exact rule and compared within their question by the real
stages on a real store. A line for each stage: seconds, and the highest memory it came to beyond what the process had before.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from benchmarks.timing import Clock, cpu_seconds
from pipeline.artifact import Artifact
from pipeline.store import Store, use_store
from stages.advantage import GroupConfig, estimate_advantages
from stages.reward import RewardConfig, score
from stages.tables import Questions, Rollouts

__all__ = ["GROUP", "PeakMemory", "make_outputs", "make_questions"]

GROUP: Final = 64
"""G, as in the paper (4.2)."""
_QUESTIONS_A_PART: Final = 64


class PeakMemory:
    """The highest memory of this process while the block runs, looked at a hundred times a second.

    `own` is what was allocated; `mapped` are pages of files, which the system takes back when it needs them.
    """

    def __init__(self) -> None:
        self.own = self.mapped = 0.0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._before = _resident()
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            own, mapped = _resident()
            self.own = max(self.own, own - self._before[0])
            self.mapped = max(self.mapped, mapped - self._before[1])


def _resident() -> tuple[float, float]:
    """MiB of this process's own memory and of the files it has mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if name[:3] == "Rss"}
    return kib["RssAnon"] / 2**10, (
        kib["RssFile"] + kib["RssShmem"]
    ) / 2**10  # a file in memory (tmpfs) is shared memory


def make_questions(count: int) -> Questions:
    """Questions with answers from 0 to 99."""
    ids = [f"q{number:06d}" for number in range(count)]
    answers = [str(number % 100) for number in range(count)]
    return Questions.write(
        {
            "question_id": ids,
            "question": [f"What is {a}?" for a in answers],
            "answer": answers,
            "solution": [None] * count,
        }
    )


def make_outputs(questions: Questions, *, seed: int = 0) -> Rollouts:
    """`GROUP` outputs of each question: some words, then a number that is right for one output in two."""
    asked = questions.read(["question_id", "answer"])
    names, answers = asked["question_id"].to_pylist(), asked["answer"].to_pylist()
    parts = (
        _part(names[start : start + _QUESTIONS_A_PART], answers[start : start + _QUESTIONS_A_PART], f"{seed}/{start}")
        for start in range(0, len(names), _QUESTIONS_A_PART)
    )
    return Rollouts.write(parts)


def _part(names: list[str], answers: list[str], seed: str) -> pa.Table:
    drawn = random.Random(seed)
    texts = [
        "so " * drawn.randrange(12) + f"#### {answer if drawn.random() < 0.5 else drawn.randrange(100)}"
        for answer in answers
        for _ in range(GROUP)
    ]
    length = np.array([len(text) for text in texts])
    offsets = pa.array(np.concatenate([[0], np.cumsum(length)]), pa.int32())
    letters = np.frombuffer("".join(texts).encode(), dtype=np.uint8).astype(np.int32)
    ends = np.arange(len(letters)) - np.repeat(np.cumsum(length) - length, length) + 1
    rows = len(texts)
    columns = {
        "question_id": pa.array(np.repeat(names, GROUP).tolist()),
        "sample": pa.array(np.tile(np.arange(GROUP), len(names)), pa.int32()),
        "prompt_ids": pa.array([[0, 1, 2, 3]] * rows, pa.list_(pa.int32())),
        "output_ids": pa.ListArray.from_arrays(offsets, pa.array(letters)),
        "logprobs": pa.ListArray.from_arrays(offsets, pa.array(np.full(len(letters), -0.5, dtype=np.float32))),
        "finish_reason": pa.array(["stop"] * rows),
        "text": pa.array(texts),
        "text_ends": pa.ListArray.from_arrays(offsets, pa.array(ends, pa.int32())),
        "temperature": pa.array(np.ones(rows, dtype=np.float32)),
        "seed": pa.array(np.zeros(rows, dtype=np.int64)),
    }
    return pa.table(columns)


def _measured(clock: Clock, stage: str, work: Callable[[], Any]) -> Iterator[tuple[Artifact, dict[str, Any]]]:
    clock.take()
    began, cpu = time.perf_counter(), cpu_seconds()
    with PeakMemory() as peak:
        made = work()
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    parts = clock.take()
    computed = seconds - sum(parts.values())
    yield (
        made,
        {
            "stage": stage,
            "seconds": seconds,
            "cpu_seconds": cpu,
            "store_seconds": parts.get("store", 0.0),
            "computed_seconds": computed,
            "own_mib": peak.own,
            "mapped_mib": peak.mapped,
        },
    )


def main() -> None:
    root, outputs = Path(sys.argv[1]), int(sys.argv[2])
    reward = RewardConfig.model_validate({"components": [{"kind": "accuracy", "verifier": "exact"}]})
    clock = Clock()
    for path in (
        "pipeline.store.store:Store.path",
        "pipeline.store.store:seal_folder",
        "pipeline.store.store:Store.record",
    ):
        clock.watch_path("store", path)
    with use_store(Store(root)):
        # Small ones first, so that what is imported and allocated once is there.
        few = make_questions(2)
        some = make_outputs(few, seed=1)
        estimate_advantages(score(some, few, reward), some, GroupConfig())
        questions = make_questions(outputs // GROUP)
        made: dict[str, Any] = {}
        for stage, work in {
            "write": lambda: make_outputs(questions),
            "score": lambda: score(made["write"], questions, reward),
            "advantages": lambda: estimate_advantages(made["score"], made["write"], GroupConfig()),
        }.items():
            for artifact, figures in _measured(clock, stage, work):
                made[stage] = artifact
                print(json.dumps({"outputs": outputs, "digest": artifact.digest, **figures}), flush=True)


if __name__ == "__main__":
    main()
