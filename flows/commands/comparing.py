"""`cohort diff`, `replay` and `report`: two runs or artifacts, a stage call and its repetition, the arms of an experiment."""

from __future__ import annotations

import difflib
import shlex
from typing import Annotated

from flows.commands.options import Limit, Root, Settings, console
from flows.inspection.artifact_diff import print_artifact_difference
from flows.inspection.history import find_run, history_of
from flows.runs.paths import Places
from flows.wording import duration
from pipeline.config import ConfigError
from pipeline.events import StageDone, recording
from pipeline.store import use_store


def diff(before: str, after: str, *, limit: Annotated[int, Limit] = 5, root: Root = None) -> None:
    """Show what differs between two runs, or between two artifacts of one type.

    Parameters
    ----------
    before
        A run of `cohort runs`, or the digest of an artifact or its beginning.
    after
        Another.
    limit
        Rows or tensors of artifacts, or changed settings per stage of runs.
    """
    places, out = Places.under(root), console()
    runs = [find_run(places, what) for what in (before, after)]
    with use_store(places.open_store()) as store:
        if runs[0] and runs[1]:
            from flows.inspection.run_diff import print_run_difference

            histories = [history_of(places, store, run) for run in runs if run]
            print_run_difference(store, histories[0], histories[1], out, limit=limit)
            return
        # Compared with an artifact, a run means its final policy, as for `cohort lineage`.
        digests = [
            run.policy if run and run.policy else store.resolve(what)
            for run, what in zip(runs, (before, after), strict=True)
        ]
        print_artifact_difference(store, digests[0], digests[1], out, limit=limit)


def replay(
    stage: str,
    *,
    run: str,
    step: int | None = None,
    iteration: int | None = None,
    evaluation: str | None = None,
    settings: Settings = (),
    limit: Annotated[int, Limit] = 5,
    root: Root = None,
) -> None:
    """Compute one stage of a run again from its cached artifacts, with other settings; the run stays as it is.

    Parameters
    ----------
    stage
        A stage: `score`, `estimate_advantages`, `update_policy`, `evaluate`, ...
    run
        A run of `cohort runs`.
    step
        Which step of the run; 0 is what came before the first.
    iteration
        Iteration, counted from 1: then --step counts within it, and without --step its last step is meant.
    evaluation
        A call of an evaluation after the step, as `in_domain/sampled`, and not the step's own.
    settings
        `key=value`: a field of the stage's configuration (`scale=none`), or a parameter (`seed=3`, `policy=DIGEST`).
    limit
        Rows or tensors to show.
    """
    from flows.inspection.replay import choose_call, prepare_replay

    places, out = Places.under(root), console()
    record = find_run(places, run)
    if record is None:
        raise ConfigError(
            f"--run: no run is named {run}; `cohort runs --root {shlex.quote(str(places.root))}` lists them"
        )
    done: list[StageDone] = []
    with (
        use_store(places.open_store()) as store,
        recording(lambda event: done.append(event) if isinstance(event, StageDone) else None),
    ):
        history = history_of(places, store, record)
        call = choose_call(history, stage, _step(history.config.steps, step, iteration), evaluation)
        prepared = prepare_replay(store, history, call, settings)
        result = prepared.run()
        took = duration(done[-1].seconds)
        how = f"found in the store; it took {took}" if done[-1].cached else f"computed in {took}"
        where = f"step {call.step}" + (f", {evaluation}" if evaluation else "")
        out.print(f"[bold]{stage}[/] of {record.folder.name}, {where}: {how}", soft_wrap=True)
        calls = (prepared.recorded, store.action(result.action or ""))
        print_artifact_difference(store, call.digest, result.digest, out, limit=limit, calls=calls)


def _step(per_iteration: int, step: int | None, iteration: int | None) -> int:
    """Return the step of the whole run that --step and --iteration mean."""
    if iteration is None:
        if step is None:
            raise ConfigError("expected --step K, or --iteration I, or both; `cohort show RUN` lists the steps")
        return step
    if iteration < 1:
        raise ConfigError(f"--iteration {iteration}: iterations count from 1")
    if step is not None and not 1 <= step <= per_iteration:
        raise ConfigError(f"--step {step}: an iteration of this run has the steps 1 to {per_iteration}")
    return (iteration - 1) * per_iteration + (per_iteration if step is None else step)


def report(experiment: str, *, root: Root = None) -> None:
    """Write the report of an experiment again, for example after arms were pruned, moved or continued one by one.

    Parameters
    ----------
    experiment
        Name of the experiment: that of its folder under runs/.
    """
    from flows.experiments.results import experiment_folder, read_experiment

    places = Places.under(root)
    result = read_experiment(experiment_folder(places, experiment))
    if result is None:
        raise ConfigError(f"{experiment}: {_advice(places, experiment)}")
    from flows.experiments.figures import draw_figures
    from flows.experiments.report import write_report

    figures = draw_figures(result, places, experiment_folder(places, experiment) / "figures")
    console().print(f"report  [cyan]{write_report(result, places, figures)}[/]", soft_wrap=True)


def _advice(places: Places, name: str) -> str:
    known = sorted(file.parent.name for file in places.runs.glob("*/experiment.json"))
    if not known:
        return f"no experiment was run in {places.root}; `cohort ablate` runs one, --root names another place"
    near = difflib.get_close_matches(name, known, n=1)
    return f"no experiment of that name; did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
