"""Run as a script: two workers share the arms of an experiment, and one or the other is killed at random, again and again.

The first run, undisturbed, imports and warms everything in one process, which then forks the workers: twenty kills cost a
minute and not twenty imports of torch. It keeps to one thread, since a forked child of a process that used several may hang.
What a worker does is what `cohort child` and a worker of Prefect's do with an arm: `run_flow`, on a store that both have.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from flows.experiments.arms import PlannedExperiment, plan
from flows.experiments.results import read_summary
from flows.experiments.running import is_finished
from flows.runs.paths import Places
from flows.runs.record import run_folder
from flows.runs.session import run_flow
from flows.tracking import delivery
from pipeline.events import Event, StageDone, StageStarted, recording
from pipeline.experiment import Experiment
from pipeline.residency import evict
from pipeline.store.locks import try_lock


def work(planned: PlannedExperiment, places: Places) -> None:
    """Run arms that no other process runs until all are finished; note what is computed, and when it was committed."""
    claims = places.root / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    log = os.open(places.root / "stages.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(event: Event) -> None:
        match event:
            case StageStarted():
                os.write(log, f"{os.getpid()} started {event.key} {event.stage}\n".encode())
            case StageDone(cached=False):
                os.write(log, f"{os.getpid()} executed {event.key} {event.stage}\n".encode())

    with recording(note):
        while not all(is_finished(places, arm) for arm in planned.chosen):
            for arm in planned.chosen:
                with try_lock(claims / arm.name) as mine:
                    if mine and not is_finished(places, arm):
                        console = Console(file=io.StringIO())
                        run_flow(planned.against_baseline(arm), places, engine="inline", console=console, command="")
                        evict()
            time.sleep(0.01)


def fork(planned: PlannedExperiment, places: Places) -> int:
    """A worker in a process group of its own."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        work(planned, places)
        os._exit(0)
    except BaseException as error:
        print(f"worker failed: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)


def committed(places: Places) -> int:
    """Stage calls whose action record is there."""
    return len(list((places.store / "actions").glob("*/*.json")))


def digests(planned: PlannedExperiment, places: Places) -> dict[str, str]:
    """The content of the final policy of every arm."""
    found = {arm.name: read_summary(run_folder(places, arm.choice.config)) for arm in planned.chosen}
    store = places.open_store()
    return {name: store.manifest(summary.policy)["digest"] if summary else "" for name, summary in found.items()}


def disturb(planned: PlannedExperiment, places: Places, kills: int, calls: int, pause: float) -> Iterator[int]:
    """Let two workers run, and kill either at random once so many calls are committed; yields the pids of the killed.

    Args:
        calls: that the whole experiment makes: kills are spread over them.
        pause: seconds that a short call takes: the kill comes a random part of it later, inside a stage.
    """
    chance, workers = random.Random(7), [fork(planned, places), fork(planned, places)]
    for number in range(kills):
        while committed(places) < number * (calls - 1) // kills:
            time.sleep(0.001)
        time.sleep(chance.random() * pause)
        place = chance.randrange(2)
        os.killpg(workers[place], signal.SIGKILL)
        _, status = os.waitpid(workers[place], 0)
        if os.WIFSIGNALED(status):
            yield workers[place]
        workers[place] = fork(planned, places)
    for worker in workers:
        _, status = os.waitpid(worker, 0)
        assert status == 0, f"a worker ended with status {status}"


def main(file: Path, folder: Path, kills: int) -> None:
    """Print one JSON object: final policies undisturbed and disturbed, calls, and who was killed."""
    delivery.start_sender = lambda home: None  # MLflow is no part of this
    delivery.CLOSE_SECONDS = 0.0
    planned = plan(Experiment.from_yaml(file.read_text(encoding="utf-8")))
    golden, disturbed = Places(folder / "golden"), Places(folder / "disturbed")
    work(planned, golden)
    again = Places(folder / "again")
    os.waitpid(fork(planned, again), 0)
    moments = sorted(call["created"] for call in again.open_store().actions())
    # A short call's time: a longer pause would outlast the experiment's last calls, and kill who has ended.
    pause = statistics.quantiles([after - before for before, after in itertools.pairwise(moments)], n=4)[0]
    calls = committed(golden)
    killed = list(disturb(planned, disturbed, kills, calls, pause))
    places = {"golden": golden, "again": again, "disturbed": disturbed}
    found = {name: digests(planned, place) for name, place in places.items()}
    print(json.dumps({"digests": found, "calls": calls, "killed": killed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
