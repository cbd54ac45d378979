"""An interrupt is never lost: whatever code it falls into, the block that it should end is ended."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.orchestration.interruption import check, exit_code, interruptible, is_interruption, settle, shielded
from pipeline.progress import report

ROOT = Path(__file__).parents[3]


def interrupt(number: int = signal.SIGINT) -> None:
    """Send a signal to this process, and run until its handler was called."""
    os.kill(os.getpid(), number)
    for _ in range(1000):
        pass


class _Finalised:
    def __del__(self) -> None:
        interrupt()


class _Resource:
    """Something that can be referred to weakly."""


def in_a_del() -> None:
    _Finalised()


def in_a_weakref_callback() -> None:
    resource = _Resource()
    reference = weakref.ref(resource, lambda _: interrupt())
    del resource
    assert reference() is None


def in_a_finalizer() -> None:
    resource = _Resource()
    weakref.finalize(resource, interrupt)
    del resource


def in_a_garbage_collection() -> None:
    def callback(phase: str, info: dict[str, int]) -> None:
        interrupt()

    gc.callbacks.append(callback)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(callback)


def in_a_bare_except() -> None:
    with contextlib.suppress(BaseException):
        interrupt()


SWALLOWING = [in_a_del, in_a_weakref_callback, in_a_finalizer, in_a_garbage_collection, in_a_bare_except]


@pytest.mark.claim("Ctrl-C that is swallowed")
@pytest.mark.parametrize("swallowing", SWALLOWING)
@pytest.mark.parametrize("point", [check, lambda: report("update_policy", done=1, total=2)], ids=["check", "report"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_was_swallowed_is_raised_at_the_next_point(
    swallowing: Callable[[], None], point: Callable[[], None]
) -> None:
    with interruptible():
        swallowing()
        with pytest.raises(KeyboardInterrupt):
            point()
    check()  # outside of the block nothing is left of it


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_code_without_any_point_is_interrupted_again_within_a_second() -> None:
    with interruptible():
        in_a_del()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(30)
        assert time.monotonic() - started < 10


def test_what_runs_because_of_the_interrupt_is_not_interrupted_again() -> None:
    done = []

    @contextlib.contextmanager
    def cleaning() -> Iterator[None]:
        try:
            yield
        finally:
            time.sleep(1.2)
            check()
            done.append("cleaned")

    with interruptible(), pytest.raises(KeyboardInterrupt), cleaning():
        interrupt()
    assert done == ["cleaned"]


def test_a_second_interrupt_cuts_the_cleaning_short_and_not_a_shield() -> None:
    done: list[str] = []

    def shielding() -> None:
        try:
            interrupt()
        finally:
            with shielded():
                interrupt()
                done.append("record")
            done.append("after it: the interrupt is the one on its way")

    def cleaning() -> None:
        try:
            interrupt()
        finally:
            interrupt()
            done.append("never")

    for work in (shielding, cleaning):
        with interruptible(), pytest.raises(KeyboardInterrupt):
            work()
    assert len(done) == 2


def test_a_shield_raises_when_it_ends() -> None:
    done = []

    def shielding() -> None:
        with shielded():
            interrupt()
            done.append("whole")

    with interruptible(), pytest.raises(KeyboardInterrupt):
        shielding()
    assert done == ["whole"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGHUP, 129)])
def test_three_signals_interrupt_and_a_closed_terminal_has_its_own_code(number: int, code: int) -> None:
    before = signal.getsignal(number)

    def printing_to_a_terminal_that_is_gone() -> None:
        try:
            interrupt(number)
        except KeyboardInterrupt:
            raise OSError("Input/output error") from None

    with interruptible(), pytest.raises(OSError, match="Input/output") as caught:
        printing_to_a_terminal_that_is_gone()
    assert is_interruption(caught.value)
    assert exit_code() == code
    assert signal.getsignal(number) is before


def test_an_error_of_its_own_is_no_interruption() -> None:
    with interruptible():
        assert not is_interruption(ValueError())
        settle()
        check()


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            interrupt(signal.SIGHUP)
            check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_block_inside_takes_the_signals_back_for_its_time() -> None:
    taken: list[int] = []
    with interruptible():
        ours = signal.signal(signal.SIGTERM, lambda number, _: taken.append(number))
        with interruptible():
            assert signal.getsignal(signal.SIGTERM) is ours
        interrupt(signal.SIGTERM)
    assert taken == [signal.SIGTERM]


def test_a_third_signal_ends_a_process_that_hangs_in_its_cleaning() -> None:
    code = """
import os, signal, time
from pipeline.orchestration.interruption import interruptible
with interruptible():
    try:
        os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)
    finally:
        for _ in range(2):
            try: os.kill(os.getpid(), signal.SIGINT); time.sleep(0.2)
            except KeyboardInterrupt: pass
        time.sleep(60)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=30, check=False).returncode == 130
