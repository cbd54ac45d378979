"""The peak of a block of work is the block's own."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from stages.training.hardware import peak_memory


def touch(mib: int) -> None:
    """Allocate memory, write to each page of it, free it."""
    np.ones(mib << 20, dtype=np.uint8)


def test_what_a_block_allocates_raises_its_peak() -> None:
    with peak_memory() as idle:
        pass
    with peak_memory() as busy:
        touch(80)
    assert busy.mib >= idle.mib + 64
    assert busy.mib < idle.mib + 200  # MiB, and not of other tests


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not reset the mark")
def test_a_later_block_does_not_inherit_the_peak_of_an_earlier_one() -> None:
    with peak_memory() as busy:
        touch(80)
    with peak_memory() as idle:
        pass
    assert idle.mib <= busy.mib - 64


def test_the_peak_of_a_block_that_fails_is_known_too() -> None:
    with pytest.raises(ZeroDivisionError), peak_memory() as peak:
        _ = 1 / 0
    assert peak.mib > 0


def test_without_a_reset_the_mark_is_the_highest_since_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    touch(80)
    monkeypatch.setattr(Path, "write_text", refuse)
    with peak_memory() as peak:
        pass
    resident_now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert peak.mib >= resident_now + 64
