"""Random numbers of one sample, from its seed and the token's index alone, so that no sample depends on its neighbours."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def sample_seed(seed: int, question_id: str, sample: int) -> int:
    """The seed of one (question, sample): 63 bits of sha256, so that it fits a signed column and never repeats in practice.

    Equal seeds within a group would give equal outputs and a zero spread of rewards.
    """
    digest = hashlib.sha256(f"{seed}\0{sample}\0{question_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def uniforms(seeds: NDArray[np.uint64], step: int) -> NDArray[np.float64]:
    """u_i in [0, 1): output number `step` of the SplitMix64 stream with seed `seeds[i]`.

    SplitMix64 (Steele, Lea and Flood 2014) is counter-based: state = seed + (step + 1) * golden ratio, then a finaliser.
    Kept to 40 bits, so that u times a sum near 1 stays below that sum.
    """
    with np.errstate(over="ignore"):
        z = seeds + np.uint64(step + 1) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(24)).astype(np.float64) * 2.0**-40
