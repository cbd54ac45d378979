"""Residency: one object a slot, the old one freed before the new one is made."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest

from pipeline.residency import evict, resident


@pytest.fixture(autouse=True)
def nothing_resident() -> Iterator[None]:
    evict()
    yield
    evict()


class Engine:
    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


def test_the_same_key_gives_the_same_object_and_another_key_a_new_one() -> None:
    first = resident("trainer", ("a", 1), Engine)
    assert resident("trainer", ("a", 1), Engine) is first
    second = resident("trainer", ("a", 2), Engine)
    assert second is not first
    assert first.closed
    assert not second.closed


def test_slots_do_not_disturb_each_other() -> None:
    trainer, generator = resident("trainer", 1, Engine), resident("generator", 1, Engine)
    evict("trainer")
    assert trainer.closed
    assert resident("generator", 1, Engine) is generator


def test_the_old_object_is_freed_before_the_new_one_is_made() -> None:
    alive = weakref.ref(resident("trainer", 1, Engine))
    seen: list[object] = []

    def make() -> Engine:
        seen.append(alive())
        return Engine()

    resident("trainer", 2, make)
    assert seen == [None]


def test_a_maker_that_fails_leaves_the_slot_empty() -> None:
    old = resident("trainer", 1, Engine)
    with pytest.raises(MemoryError):
        resident("trainer", 2, lambda: (_ for _ in ()).throw(MemoryError()))
    assert old.closed
    assert resident("trainer", 1, Engine) is not old
