"""Run as a script: kills the smallest recipe at instants spread over its run, resumes it, and prints what came of it.

One process imports everything once and forks a child for each run, so that ten kills cost seconds, not ten imports of torch. It
computes nothing itself: forked children of a process that used threads may hang.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from flows.iterative_rl import iterative_rl
from flows.recipes import arithmetic_smoke
from pipeline.progress import listen
from pipeline.store import Store, use_store


def preload() -> None:
    """Import what the stages import when they run."""
    import torch

    torch.set_num_threads(1)
    import stages.rollout.hf
    import stages.training.torch_engine
    import stages.update.steps  # noqa: F401


def start(root: Path) -> int:
    """Fork a child that runs the recipe in `root` and leaves its final digest and stage outcomes beside the store."""
    child = os.fork()
    if child:
        return child
    executed: list[str] = []

    def note(topic: str, values: dict[str, Any]) -> None:
        if topic == "stage" and values["outcome"] == "executed":
            executed.append(values["name"])

    try:
        with use_store(Store(root)), listen(note):
            digest = iterative_rl(arithmetic_smoke()).digest
        (root / "result.json").write_text(json.dumps({"digest": digest, "executed": len(executed)}))
        os._exit(0)
    except BaseException as error:
        print(f"child failed: {error!r}", file=sys.stderr)
        os._exit(1)


def finish(root: Path) -> dict[str, Any]:
    """Run to the end."""
    _, status = os.waitpid(start(root), 0)
    assert status == 0, f"the run in {root} ended with status {status}"
    result: dict[str, Any] = json.loads((root / "result.json").read_text())
    return result


def committed(root: Path) -> int:
    """Stage calls whose action record is there."""
    return len(list((root / "actions").glob("*/*.json")))


def main(folder: Path, kills: int) -> None:
    """Print one JSON object: the golden run and one entry per kill."""
    preload()
    started = time.monotonic()
    golden = finish(folder / "golden")
    duration = time.monotonic() - started
    trials = []
    for number in range(kills):
        root = folder / f"killed-{number}"
        instant = duration * (number + 0.5) / kills
        child = start(root)
        time.sleep(instant)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kept = committed(root)
        trials.append({"instant": instant, "killed": os.WIFSIGNALED(status), "kept": kept, **finish(root)})
    print(json.dumps({"golden": golden, "duration": duration, "trials": trials}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
