"""Maj@K and Pass@K against the number of candidates K, before against after RL (DeepSeekMath, Fig. 7).

Changes are estimated question by question: with the samples of both policies for one and the same question, resampled over
questions. The samples are those of the evaluations, found through the runs' ledgers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from flows.experiments.figures.claims import bounds_are, change, listed, raises_majority_not_pass, words
from flows.experiments.figures.numbers import Estimate, Study, Trained, measured
from flows.experiments.figures.sketches import Look, Sketch, draw_line, grid, legend_below
from flows.runs.curve import COLOURS
from pipeline.store import Store, StoreError, use_store
from stages.kernels.estimators import Interval, bootstrap_interval, maj_at_k, pass_at_k, wilson_interval
from stages.tables import Votes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    """Draw a column per held-out set, a row per arm; None where Pass@K was estimated at fewer than three K."""
    found = [_panel(study, arm, held_out, store) for arm in study.arms for held_out in study.sets]
    panels = [panel for panel in found if panel]
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
    return Sketch("candidates", title, " ".join(_about(study, panels)), canvas)


def _panel(study: Study, arm: str, held_out: str, store: Store) -> _Panel | None:
    runs = study.arms[arm]
    times = {time: [getattr(one.run, time)[held_out] for one in runs] for time in ("before", "final")}
    every = [metrics for values in times.values() for metrics in values]
    ks = _ks(every, "pass")
    if len(ks) < _FEWEST:
        return None
    # Maj@K is undefined where the votes of a question are not known.
    kinds = [kind for kind in _KINDS if _ks(every, kind) == ks]
    lines = {
        (kind, time): {k: measured(values, f"{kind}_at_{k}") for k in ks}
        for kind in kinds
        for time, values in zip(_LINES, times.values(), strict=True)
    }
    pairs = [_before_and_after(one, held_out, store) for one in runs]
    changes: dict[tuple[str, int], list[Interval]] = {}
    for kind, k in ((kind, k) for kind in kinds for k in ks):
        found = [one for pair in pairs if pair and (one := _change(*pair, kind, k))]
        changes[kind, k] = found if len(found) == len(runs) else []
    return _Panel(arm, held_out, ks, lines, changes)


def _ks(every: Sequence[Mapping[str, float]], kind: str) -> list[int]:
    """Return the K that all of them were estimated at."""
    name = re.compile(rf"{kind}_at_(\d+)")
    found = [{int(at[1]) for key in metrics if (at := name.fullmatch(key))} for metrics in every]
    return sorted(set.intersection(*found))


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


def _about(study: Study, panels: Sequence[_Panel]) -> Iterator[str]:
    every = [point for panel in panels for points in panel.lines.values() for point in points.values()]
    yield f"Lines: mean of {study.seeds}. Bands: {bounds_are(every)}."
    if any(intervals for panel in panels for intervals in panel.changes.values()):
        over = "of a paired bootstrap over questions; where all changed alike, Wilson's"
        yield f"Changes: one for each seed, with the 95 % interval {over}."
    for panel in panels:
        k, place = panel.ks[-1], words(panel.set).capitalize()
        if ("maj", "before") not in panel.lines:
            yield f"{place}: {panel.arm} has no Maj@K, since {_UNDEFINED}."
            continue
        majority, passed = (panel.changes.get((kind, k), []) for kind in _KINDS)
        said = raises_majority_not_pass(panel.arm, k, majority, passed, panel.lines["pass", "before"][k])
        yield f"{place}: {said}"
        raised = [str(k) for k in panel.ks if change(panel.changes.get(("pass", k), [])) == "raised"]
        if raised:
            yield f"Pass@K is raised at K = {listed(raised)}."


# ------------------------------------------------------------------------------------------------ changes by question


@dataclass(frozen=True)
class Tally:
    """The samples of a question, as `count_votes` counted them."""

    samples: int
    correct: int
    wrong: tuple[int, ...] | None
    """How many samples gave each distinct wrong answer; None where that is not known."""

    def at(self, kind: str, k: int) -> float | None:
        """Return `maj` or `pass` at K, as `stages.evaluation` estimates it; None where Maj@K is undefined."""
        if kind == "pass":
            return pass_at_k(self.samples, self.correct, k)
        return None if self.wrong is None else maj_at_k(self.samples, self.correct, self.wrong, k)


def tallies(store: Store, digest: str | None) -> dict[str, Tally] | None:
    """Read tallies by question from a table of votes; None where its payload is not in the store."""
    if digest is None:
        return None
    try:
        with use_store(store):
            rows = Votes(digest).rows()
    except StoreError:
        return None
    return {
        row["question_id"]: Tally(row["samples"], row["correct"], None if row["wrong"] is None else tuple(row["wrong"]))
        for row in rows
    }


def change_interval(difference_Q: Sequence[float]) -> Interval:
    """Return the mean of one difference per question, each in [-1, 1], with its 95 % interval over questions.

    The percentile bootstrap. Where all Q questions have the same difference d it has no width, which would claim certainty from
    a few questions. The share of questions with another difference is then at most u = z^2 / (Q + z^2) (Wilson), so that the
    mean lies between d - u (1 + d) and d + u (1 - d).
    """
    found = bootstrap_interval(difference_Q, resamples=_RESAMPLES, seed=0)
    if min(difference_Q) < max(difference_Q):
        return found
    d, unseen = difference_Q[0], wilson_interval(0.0, len(difference_Q)).high
    return Interval(d, d - unseen * (1 + d), d + unseen * (1 - d))


def _before_and_after(one: Trained, held_out: str, store: Store) -> tuple[dict[str, Tally], dict[str, Tally]] | None:
    """Read tallies before the first step and after the last."""
    calls = [call for call in (one.ledger.evaluations if one.ledger else ()) if call.set == held_out]
    sampled = {call.step: call.artifacts.get("count_votes") for call in calls if call.mode == "sampled"}
    if not sampled:
        return None
    before, after = tallies(store, sampled[min(sampled)]), tallies(store, sampled[max(sampled)])
    return (before, after) if before and after else None


def _change(before: Mapping[str, Tally], after: Mapping[str, Tally], kind: str, k: int) -> Interval | None:
    """Return the change of Maj@K or Pass@K; None where it is undefined for a question.

    Raises:
        ValueError: the two are not of the same questions.
    """
    if before.keys() != after.keys():
        example = min(before.keys() ^ after.keys())
        raise ValueError(f"before and after are not of the same questions, for example {example!r} is in one of them")
    pairs = [(before[name].at(kind, k), after[name].at(kind, k)) for name in before]
    found = [new - old for old, new in pairs if old is not None and new is not None]
    return change_interval(found) if len(found) == len(pairs) else None
