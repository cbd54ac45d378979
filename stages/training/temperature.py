"""The temperature that outputs were sampled at: whoever scores them again must use the same."""

from __future__ import annotations

from stages.tables import Rollouts

__all__ = ["sampling_temperature"]


def sampling_temperature(outputs: Rollouts, expected: float | None = None) -> float:
    """The one temperature of `outputs`, which scales the logits of every policy that scores them.

    Sampled at T and scored at 1, a policy has a ratio other than 1 to itself: logits 2, 1, 0 give the second token -1.41 at
    T = 1 and -1.69 at T = 0.7, a ratio of 1.3 out of nothing.

    Args:
        expected: refuse any other.

    Raises:
        ValueError: several temperatures, 0, or another than expected.
    """
    import pyarrow.compute as pc

    found: list[float] = pc.unique(outputs.read().column("temperature")).to_pylist()
    if len(found) != 1:
        raise ValueError(f"expected outputs of one temperature, found {sorted(found)}; sample them with one")
    if found[0] == 0:
        raise ValueError("greedy outputs come from no distribution; sample with temperature above 0")
    if expected is not None and abs(found[0] - expected) > 1e-6 * expected:  # the table keeps float32
        raise ValueError(f"expected outputs sampled at temperature {expected:g}, found {found[0]:g} in all of them")
    return found[0]
