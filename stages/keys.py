"""Keys of rows, (question_id, sample), without a Python object for each: a million of them take milliseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

__all__ = ["repeated_key", "same_keys", "slots"]


def slots(ids: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int64]]:
    """The distinct ids in the order in which they first come, and for each row the place of its own among them."""
    import numpy as np

    encoded = ids.combine_chunks().dictionary_encode()
    names: list[str] = encoded.dictionary.to_pylist()
    return names, encoded.indices.to_numpy().astype(np.int64)


def repeated_key(table: pa.Table) -> tuple[str, int] | None:
    """The first key of `question_id` and `sample` that stands more than once; None where there is none."""
    import numpy as np

    if not table.num_rows:
        return None
    _, slot_N = slots(table["question_id"])
    sample_N = table["sample"].to_numpy().astype(np.int64)
    code_N = slot_N * (sample_N.max() - sample_N.min() + 1) + sample_N - sample_N.min()
    ordered_N = np.sort(code_N)
    if (ordered_N[1:] > ordered_N[:-1]).all():
        return None
    _, place_N, times = np.unique(code_N, return_inverse=True, return_counts=True)
    row = int(np.flatnonzero(times[place_N] > 1)[0])
    return table["question_id"][row].as_py(), int(sample_N[row])


def same_keys(one: pa.Table, other: pa.Table) -> bool:
    """Whether two tables have the same keys in the same order."""
    return all(one[name].equals(other[name]) for name in ("question_id", "sample"))
