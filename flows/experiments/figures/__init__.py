"""The figures of an experiment, in the paper's layout: its results decide which, checks on the numbers what they say.

for figure in draw_figures(read_experiment(folder), places, folder / "figures"):
    print(figure.title, figure.caption)
"""

from __future__ import annotations

from flows.experiments.figures.drawing import Figure, draw_figures

__all__ = ["Figure", "draw_figures"]
