"""Run as a script: kills the smallest recipe at instants spread over its run, resumes it, and prints what came of it.

Arguments: a folder, the number of kills, settings of the recipe as JSON, and the bytes up to which a checkpoint is small.

One process does the uninterrupted run, which imports and warms everything, and then forks a child for each further one, so that
ten kills cost seconds and not ten imports of torch. It keeps to one thread throughout: a forked child of a process that used
several may hang.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import random
import re
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import psutil

from flows.config.recipes import arithmetic_smoke
from flows.runs import checkpoints
from pipeline.derivation.materialise import materialise
from pipeline.residency import evict
from pipeline.store import Store, use_store
from tests.flows.short_runs import executed_by

SETTINGS: dict[str, Any] = {}


def run(root: Path) -> dict[str, Any]:
    """Run the recipe in `root`: the content of its final policy, how many stages were executed, how many updates replayed."""
    with use_store(Store(root)) as store, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store.replay = functools.partial(materialise, store)
        content, executed = executed_by(arithmetic_smoke().override(SETTINGS))
    evict()
    said = [re.search(r"replaying (?:(\d+) x )?update_policy", str(warning.message)) for warning in caught]
    return {
        "content": content,
        "executed": len(executed),
        "sampled": executed.count("rollout"),
        "replayed": [int(found[1] or 1) for found in said if found],
        "first": executed[:1],
        "left": [path.name for path in (root / "drafts").iterdir()],
    }


def start(root: Path) -> int:
    """Fork a child that runs the recipe in `root` and leaves its result next to the store."""
    child = os.fork()
    if child:
        return child
    try:
        (root / "result.json").write_text(json.dumps(run(root)))
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


def adopt_orphans() -> None:
    """Become the parent of processes whose own parent dies: none of them stays unseen."""
    subreaper = 36
    assert ctypes.CDLL(None).prctl(subreaper, 1, 0, 0, 0) == 0


def remaining(seconds: float = 5.0) -> list[str]:
    """Return the command lines of processes below this one that a killed run left, and that do not end by themselves."""
    _, alive = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=seconds)
    return [" ".join(process.cmdline()) for process in alive]


def committed(root: Path) -> int:
    """Stage calls whose action record is there."""
    return len(list((root / "actions").glob("*/*.json")))


def await_commits(root: Path, count: int) -> None:
    """Wait until `count` stage calls are committed in `root`."""
    while committed(root) < count:
        time.sleep(0.002)


def main(folder: Path, kills: int) -> None:
    """Print one JSON object: the golden run and one entry per kill."""
    adopt_orphans()
    golden = run(folder / "golden")
    started = time.monotonic()
    again = finish(folder / "again")
    duration = time.monotonic() - started
    assert again == golden, f"two uninterrupted runs differ: {again} and {golden}"
    gap = duration / golden["executed"]
    chance = random.Random(0)
    trials = []
    for number in range(kills):
        root = folder / f"killed-{number}"
        child = start(root)
        # Instants spread over the run by what is committed, then a random part of a stage's time further, inside a stage.
        await_commits(root, number * (golden["executed"] - 1) // kills)
        time.sleep(gap * chance.random())
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        processes = remaining()
        kept = committed(root)
        sampled = sum(record["stage"] == "rollout" for record in Store(root).actions())
        trial = {"killed": os.WIFSIGNALED(status), "kept": kept, "sampled before": sampled, **finish(root)}
        trial["left"] += processes + remaining()
        trials.append(trial)
    print(json.dumps({"golden": golden, "trials": trials}))


if __name__ == "__main__":
    SETTINGS.update(json.loads(sys.argv[3]))
    checkpoints._SMALL = int(sys.argv[4])
    main(Path(sys.argv[1]), int(sys.argv[2]))
