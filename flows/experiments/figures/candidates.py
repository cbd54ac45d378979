"""Maj@K and Pass@K against the number of candidates K, before against after RL (DeepSeekMath, Fig. 7).

Changes are estimated question by question: with the samples of both policies for one and the same question, resampled over
questions. The samples are those of the evaluations, found through the runs' ledgers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from flows.experiments.figures.claims import bounds_are, change, listed, raises_majority_not_pass, words
from flows.experiments.figures.figure import Sketch
from flows.experiments.figures.numbers import Estimate, Study, Trained, measured
from flows.experiments.figures.style import Look, draw_line, grid, legend_below
from flows.experiments.figures.votes import Tally, differences, tallies
from flows.learning_curve import COLOURS
from pipeline.store import Store
from stages.kernels.voting import Interval, bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["sketch_candidates"]

_FEWEST: Final = 3
"""Different K that make a curve."""
_RESAMPLES: Final = 1000
_UNDEFINED: Final = "the reward says that samples are wrong and not what they answered"
_KINDS: Final = {"maj": "Maj@K", "pass": "Pass@K"}
_COLOUR: Final = {"maj": COLOURS[0], "pass": COLOURS[1]}
_LINES: Final = {"before": Look("", "o", "--"), "after": Look("", "s", "-")}


@dataclass(frozen=True)
class _Panel:
    """An arm on a held-out set."""

    arm: str
    set: str
    ks: list[int]
    lines: Mapping[tuple[str, str], Mapping[int, Estimate]]
    """Kind and time -> K -> estimate; without Maj@K where it is undefined."""
    changes: Mapping[tuple[str, int], list[Interval]]
    """Kind and K -> interval of the change with each seed; empty where the samples are gone."""


def sketch_candidates(study: Study, store: Store) -> Sketch | None:
    """A column per held-out set, a row per arm; None where Pass@K was estimated at fewer than three K."""
    found = [_panel(study, arm, held_out, store) for arm in study.arms for held_out in study.sets]
    panels = [panel for panel in found if len(panel.ks) >= _FEWEST]
    if not panels:
        return None
    arms, sets = (
        list(dict.fromkeys(names)) for names in zip(*((one.arm, words(one.set)) for one in panels), strict=True)
    )
    canvas, axes = grid(arms, sets)
    for panel in panels:
        _draw(axes[panel.arm, words(panel.set)], panel)
    for place in axes.keys() - {(panel.arm, words(panel.set)) for panel in panels}:
        axes[place].set_visible(False)
    legend_below(canvas, axes[panels[0].arm, words(panels[0].set)])
    title = f"{study.result.experiment.name}: Maj@K and Pass@K, before and after (layout of the paper's Fig. 7)"
    return Sketch("candidates", title, _caption(study, panels), canvas)


def _panel(study: Study, arm: str, held_out: str, store: Store) -> _Panel:
    runs = study.arms[arm]
    times = {time: [getattr(one.run, time)[held_out] for one in runs] for time in ("before", "final")}
    every = [metrics for values in times.values() for metrics in values]
    ks = _ks(every, "pass")
    if len(ks) < _FEWEST:
        return _Panel(arm, held_out, [], {}, {})
    # Maj@K is undefined where the votes of a question are not known.
    kinds = [kind for kind in _KINDS if _ks(every, kind) == ks]
    lines = {
        (kind, time): {k: measured(values, f"{kind}_at_{k}") for k in ks}
        for kind in kinds
        for time, values in zip(_LINES, times.values(), strict=True)
    }
    pairs = [_tallies(one, held_out, store) for one in runs]
    changes: dict[tuple[str, int], list[Interval]] = {}
    for kind, k in ((kind, k) for kind in kinds for k in ks):
        found = [_change(pair, kind, k) for pair in pairs if pair]
        changes[kind, k] = [one for one in found if one] if len(found) == len(runs) and all(found) else []
    return _Panel(arm, held_out, ks, lines, changes)


def _ks(every: Sequence[Mapping[str, float]], kind: str) -> list[int]:
    """The K that all of them were estimated at."""
    name = re.compile(rf"{kind}_at_(\d+)")
    found = [{int(at[1]) for key in metrics if (at := name.fullmatch(key))} for metrics in every]
    return sorted(set.intersection(*found))


def _tallies(one: Trained, held_out: str, store: Store) -> tuple[dict[str, Tally], dict[str, Tally]] | None:
    """By question, before the first step and after the last."""
    calls = [call for call in (one.ledger.evaluations if one.ledger else ()) if call.set == held_out]
    sampled = {call.step: call.artifacts.get("count_votes") for call in calls if call.mode == "sampled"}
    before, after = (
        tallies(store, sampled[step]) if sampled else None
        for step in (min(sampled, default=0), max(sampled, default=0))
    )
    return (before, after) if before and after else None


def _change(pair: tuple[Mapping[str, Tally], Mapping[str, Tally]], kind: str, k: int) -> Interval | None:
    found = differences(*pair, kind, k)
    return None if found is None else bootstrap_interval(found, resamples=_RESAMPLES, seed=0)


# ------------------------------------------------------------------------------------------------ drawing, saying


def _draw(axes: Axes, panel: _Panel) -> None:
    for (kind, time), points in panel.lines.items():
        look = Look(_COLOUR[kind], _LINES[time].mark, _LINES[time].line)
        draw_line(axes, points, look, f"{_KINDS[kind]}, {time}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(panel.ks, [str(k) for k in panel.ks])
    axes.minorticks_off()
    axes.set_ylim(top=1.02)
    axes.set_xlabel("K, candidates")
    axes.set_ylabel("accuracy")


def _caption(study: Study, panels: list[_Panel]) -> str:
    every = [point for panel in panels for points in panel.lines.values() for point in points.values()]
    sentences = [f"Lines: mean of {study.seeds}. Bands: {bounds_are(every)}."]
    if any(intervals for panel in panels for intervals in panel.changes.values()):
        sentences.append("Changes: one for each seed, with the 95 % interval of a paired bootstrap over questions.")
    for panel in panels:
        k = panel.ks[-1]
        if ("maj", "before") not in panel.lines:
            sentences.append(f"{words(panel.set).capitalize()}: {panel.arm} has no Maj@K, since {_UNDEFINED}.")
            continue
        majority, passed = (panel.changes.get((kind, k), []) for kind in _KINDS)
        said = raises_majority_not_pass(panel.arm, k, majority, passed, panel.lines["pass", "before"][k])
        sentences.append(f"{words(panel.set).capitalize()}: {said}")
        raised = [str(k) for k in panel.ks if change(panel.changes.get(("pass", k), [])) == "raised"]
        if raised:
            sentences.append(f"Pass@K is raised at K = {listed(raised)}.")
    return " ".join(sentences)
