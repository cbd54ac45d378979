"""The questions of each step (Algorithm 1, line 5): drawn without replacement, as a function of (seed, step) alone."""

from __future__ import annotations

from pipeline.artifact import take_rows
from pipeline.stage import stage
from stages.tables import Questions
from stages.training.batching import sample_positions

__all__ = ["sample_batch"]


@stage(version="1")
def sample_batch(questions: Questions, *, size: int, step: int, seed: int) -> Questions:
    """D_b: the `size` questions of step `step` (0, 1, ...), no two alike.

    Steps walk through one shuffled order of the set after another: in every `len(questions)` draws each question comes once.

    Raises:
        DataError: the set has fewer than `size` questions.
    """
    table = questions.read()
    return Questions.write(take_rows(table, sample_positions(table.num_rows, size=size, step=step, seed=seed)))
