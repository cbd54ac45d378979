"""All figures of an experiment as files: PNG and SVG, the same bytes for the same results.

Figures of unchanged results are not drawn again, since matplotlib takes seconds to import. In their folder lies figures.json: a
key over all that they are made from (numbers, this code, matplotlib), titles, captions, and the digests of the files. Anything
that differs, also a file that was touched, means that they are drawn anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flows.experiments.figures.candidates import sketch_candidates
from flows.experiments.figures.numbers import Study, read_study
from flows.experiments.figures.sketches import Sketch, sketch_ageing, sketch_bars, sketch_calls, sketch_curves
from flows.experiments.results import ExperimentResult
from flows.runs import curve
from flows.runs.paths import Places
from flows.runs.record import write_bytes, write_json
from pipeline.store import StoreError

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

_KINDS: Final = ("curves", "candidates", "bars", "ageing", "calls")
_PLAIN: Final[dict[str, dict[str, Any]]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
"""Metadata that would change from day to day, or from version to version, is left out."""
_FILE: Final = "figures.json"


@dataclass(frozen=True)
class Figure:
    """A figure in files."""

    name: str
    """Of its files, without their endings."""
    title: str
    """The experiment, what is drawn, and the figure of the paper that is laid out so."""
    caption: str
    """How to read it, and what it shows: sentences that checks on its numbers chose."""
    folder: Path

    @property
    def png(self) -> Path:
        """The picture in pixels."""
        return self.folder / f"{self.name}.png"

    @property
    def svg(self) -> Path:
        """The picture in lines."""
        return self.folder / f"{self.name}.svg"


def draw_figures(result: ExperimentResult, places: Places, folder: Path) -> list[Figure]:
    """Draw what the experiment's finished runs have to show; none where none finished.

    Figures that were there are replaced; those of the same numbers stay and are not drawn again.

    Args:
        folder: for the files, `<figure>.png` and `<figure>.svg`; made where it is not there.

    Raises:
        StoreError: the folder cannot be written.
    """
    study = read_study(result, places)
    key = _key(study, places)
    earlier = _read_drawn(folder, key)
    if earlier is not None:
        return earlier
    drawn = _sketches(study, places)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in set(_KINDS) - {sketch.name for sketch in drawn}:  # of what the experiment has no longer
            for suffix in _PLAIN:
                (folder / f"{name}.{suffix}").unlink(missing_ok=True)
        figures = [_written(sketch, folder) for sketch in drawn]
        about = [{"name": one.name, "title": one.title, "caption": one.caption} for one in figures]
        write_json(folder / _FILE, {"key": key, "figures": about, "files": _digests(figures)})
        return figures
    except OSError as error:
        raise StoreError(
            f"figures: {error.filename or folder} cannot be written ({error.strerror or error}); runs and results are kept: "
            "make the folder writable, and the same command draws them without computing anything again"
        ) from None


def sketches(result: ExperimentResult, places: Places) -> list[Sketch]:
    """Draw the figures without writing them."""
    return _sketches(read_study(result, places), places)


def _sketches(study: Study, places: Places) -> list[Sketch]:
    if not study.arms:
        return []
    makers: tuple[Callable[[], Sketch | None], ...] = (
        lambda: sketch_curves(study),
        lambda: sketch_candidates(study, places.open_store()),
        lambda: sketch_bars(study),
        lambda: sketch_ageing(study),
        lambda: sketch_calls(study),
    )
    return [sketch for make in makers if (sketch := make())]


def _written(sketch: Sketch, folder: Path) -> Figure:
    figure = Figure(sketch.name, sketch.title, sketch.caption, folder)
    for file in (figure.png, figure.svg):
        write_bytes(file, _bytes(sketch.name, sketch.canvas, file.suffix.removeprefix(".")))
    return figure


def _bytes(name: str, canvas: Canvas, suffix: str) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": f"cohort-{name}"}):  # else its ids are drawn at random
        canvas.savefig(buffer, format=suffix, metadata=_PLAIN[suffix])
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ what was drawn last


def _key(study: Study, places: Places) -> str:
    """Return a digest of everything that figures are made from."""
    experiment = study.result.experiment
    runs = [
        {
            "run": [one.run.arm, one.run.seed, one.run.steps, one.run.policy, one.run.before, one.run.final],
            "curve": {str(step): dict(metrics) for step, metrics in one.curve.items()},
            "policies": sorted(one.policies),
            "samples": [
                [call.step, call.set, call.mode, digest, places.payload(digest).exists()]
                for call in (one.ledger.evaluations if one.ledger else ())
                if (digest := call.artifacts.get("count_votes"))
            ],
        }
        for runs in study.arms.values()
        for one in runs
    ]
    names = [experiment.name, experiment.baseline, *(arm.name for arm in study.result.arms)]
    sources = [*sorted(Path(__file__).parent.glob("*.py")), Path(curve.__file__)]
    about = [names, runs, [_digest(file) for file in sources], version("matplotlib")]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _read_drawn(folder: Path, key: str) -> list[Figure] | None:
    """Return the figures in the folder, if they are those of this key and as they were written."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        found = [Figure(one["name"], one["title"], one["caption"], folder) for one in known["figures"]]
        if known["key"] == key and known["files"] == _digests(found):
            return found
    return None


def _digests(figures: Sequence[Figure]) -> dict[str, str]:
    return {file.name: _digest(file) for one in figures for file in (one.png, one.svg)}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
