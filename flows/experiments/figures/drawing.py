"""All figures of an experiment as files: PNG and SVG, the same bytes for the same results."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flows.experiments.figures.ageing import sketch_ageing
from flows.experiments.figures.bars import sketch_bars
from flows.experiments.figures.candidates import sketch_candidates
from flows.experiments.figures.curves import sketch_curves
from flows.experiments.figures.drawn import key_of, read_drawn, write_drawn
from flows.experiments.figures.figure import Figure, Sketch
from flows.experiments.figures.numbers import Study, read_study
from flows.experiments.results import ExperimentResult
from flows.places import Places
from pipeline.store import StoreError

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["draw_figures", "sketches"]

_KINDS: Final = ("curves", "candidates", "bars", "ageing")
_PLAIN: Final[dict[str, dict[str, Any]]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
"""Metadata that would change from day to day, or from version to version, is left out."""


def draw_figures(result: ExperimentResult, places: Places, folder: Path) -> list[Figure]:
    """Draw what the experiment's finished runs have to show; none where none finished.

    Figures that were there are replaced; those of the same numbers stay and are not drawn again.

    Args:
        folder: for the files, `<figure>.png` and `<figure>.svg`; made where it is not there.

    Raises:
        StoreError: the folder cannot be written.
    """
    study = read_study(result, places)
    key = key_of(study, places)
    earlier = read_drawn(folder, key)
    if earlier is not None:
        return earlier
    drawn = {sketch.name: sketch for sketch in _sketches(study, places)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in set(_KINDS) - drawn.keys():  # of what the experiment has no longer
            for suffix in _PLAIN:
                (folder / f"{name}.{suffix}").unlink(missing_ok=True)
        figures = [_written(sketch, folder) for sketch in drawn.values()]
        write_drawn(folder, key, figures)
        return figures
    except OSError as error:
        raise StoreError(
            f"figures: {error.filename or folder} cannot be written ({error.strerror or error}); runs and results are kept: "
            "mend the folder, and the same command draws them without computing anything again"
        ) from None


def sketches(result: ExperimentResult, places: Places) -> list[Sketch]:
    """The figures, drawn and not written."""
    return _sketches(read_study(result, places), places)


def _sketches(study: Study, places: Places) -> list[Sketch]:
    if not study.arms:
        return []
    makers: tuple[Callable[[], Sketch | None], ...] = (
        lambda: sketch_curves(study),
        lambda: sketch_candidates(study, places.open_store()),
        lambda: sketch_bars(study),
        lambda: sketch_ageing(study),
    )
    return [sketch for make in makers if (sketch := make())]


def _written(sketch: Sketch, folder: Path) -> Figure:
    files = {suffix: folder / f"{sketch.name}.{suffix}" for suffix in _PLAIN}
    for suffix, file in files.items():
        draft = folder / f".{file.name}.draft"
        try:
            draft.write_bytes(_bytes(sketch.name, sketch.canvas, suffix))
            os.replace(draft, file)
        finally:
            draft.unlink(missing_ok=True)
    return Figure(sketch.name, sketch.title, sketch.caption, files["png"], files["svg"])


def _bytes(name: str, canvas: Canvas, suffix: str) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": f"cohort-{name}"}):  # else its ids are drawn at random
        canvas.savefig(buffer, format=suffix, metadata=_PLAIN[suffix])
    return buffer.getvalue()
