"""Which samples share a forward row: the tree of prefixes sampled so far, kept as a map from sample to row.

All outputs of a question start in one row, its prefill. When the outputs of a row choose different tokens, the row forks;
when its last output ends, the row is free. Rows stay packed in 0..n-1, so a model never computes for a finished output, and
never computes one prefix twice. Each fork and each freed row costs at most one copy of a row's keys and values, however the
samples fall; samples that all differ cost one copy each (the one that shares a prefill anyway).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Regrouping:
    """Rows after one token, and the copies that make them."""

    sample_row: Integers
    """[n] new row of each live sample."""
    row_token: Integers
    """[rows] token that each new row reads next."""
    source: Integers
    """Old rows to copy from; never among `target`."""
    target: Integers
    """Rows to copy to; every other new row is already in its place."""


def regroup(sample_row: Integers, token: Integers) -> Regrouping:
    """Rows for live samples that were in `sample_row` and drew `token`.

    Samples of one row that drew the same token stay together. A row's first child stays where it is, unless packing moves
    it; a target has no child that stays and hence no child at all, so no copy reads what another wrote.
    """
    width = int(token.max()) + 1
    children, child_of_sample = np.unique(sample_row * width + token, return_inverse=True)
    parent = children // width
    first = np.ones(len(parent), dtype=bool)
    first[1:] = parent[1:] != parent[:-1]
    stays = first & (parent < len(parent))
    taken = np.zeros(len(parent), dtype=bool)
    taken[parent[stays]] = True
    target = np.flatnonzero(~taken)
    row = np.where(stays, parent, 0)
    row[~stays] = target
    row_token = np.empty_like(children)
    row_token[row] = children % width
    return Regrouping(row[child_of_sample], row_token, parent[~stays], target)
