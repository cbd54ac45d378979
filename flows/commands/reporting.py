"""`cohort report`."""

from __future__ import annotations

import difflib

from flows.commands.options import Root, console
from flows.experiments.results import experiment_folder, read_experiment
from flows.places import Places
from pipeline.config import ConfigError

__all__ = ["report"]


def report(experiment: str, *, root: Root = None) -> None:
    """Write the report of an experiment from what its runs left; nothing is computed.

    `cohort ablate` and `cohort compare` write it at their end. Again after arms were pruned, moved or continued one by one.

    Parameters
    ----------
    experiment
        Name of the experiment: that of its folder under runs/.
    root
        As for `cohort run`.
    """
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
