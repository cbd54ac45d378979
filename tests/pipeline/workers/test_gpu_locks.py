"""One run at a time on a CUDA device, with names of devices that no machine needs to have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from pipeline.workers import gpu_locks
from pipeline.workers.gpu_locks import exclusive_devices, lock_folder, visible_devices

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COHORT_GPU_LOCKS", str(tmp_path / "locks"))
    monkeypatch.setattr(gpu_locks, "_POLL", 0.01)
    monkeypatch.setattr(gpu_locks, "_ours", [])


def driver(folder: Path, *uuids: str) -> Path:
    """What the driver leaves in /proc of devices with these UUIDs."""
    for number, uuid in enumerate(uuids):
        place = folder / "gpus" / f"0000:0{number}:00.0"
        place.mkdir(parents=True)
        (place / "information").write_text(
            f"Model: \t\t NVIDIA H200\nGPU UUID: \t GPU-{uuid}\nDevice Minor: \t {number}\n"
        )
    return folder / "gpus"


def holder(devices: str, count: int) -> subprocess.Popen[str]:
    """Another process that has taken devices, and keeps them until its input ends."""
    code = (
        "import sys\nfrom pipeline.workers.gpu_locks import exclusive_devices\n"
        f"with exclusive_devices({count}, holder='other-run') as d: print(','.join(d), flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": devices, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline().strip()
    return process


def test_a_machine_without_a_driver_has_no_devices_and_takes_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert visible_devices({}, tmp_path / "absent") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with exclusive_devices(1, holder="run") as devices:
        assert devices == []
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not lock_folder().exists()


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, ["0", "1", "2"]),
        ("2,0", ["2", "0"]),
        ("", []),
        ("-1", []),
        ("0,-1,2", ["0"]),
        ("GPU-bb,0", ["1", "0"]),
        ("1,GPU-bb22", ["1"]),
        ("MIG-77", ["MIG-77"]),
    ],
)
def test_the_names_of_devices_are_those_that_cuda_would_see(
    given: str | None, names: list[str], tmp_path: Path
) -> None:
    known = driver(tmp_path, "aa11", "bb22", "cc33")
    assert visible_devices({} if given is None else {"CUDA_VISIBLE_DEVICES": given}, known) == names


def test_runs_that_fit_side_by_side_see_different_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with exclusive_devices(2, holder="first") as first:
        monkeypatch.setattr(gpu_locks, "_ours", [])  # as another process would
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
        with exclusive_devices(1, holder="second") as second:
            assert (first, second) == (["4", "5"], ["6"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5,6"
    assert list(lock_folder().iterdir()) == []


def test_a_run_waits_for_a_device_and_says_who_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    ended: list[float] = []

    def first() -> None:
        with exclusive_devices(1, holder="grpo-s0"):
            inside.set()
            time.sleep(0.1)
            ended.append(time.monotonic())

    inside = threading.Event()
    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(5)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with exclusive_devices(1, holder="grpo-s1"):
            assert ended
    (warning,) = [str(one.message) for one in shown]
    assert warning.startswith(f"waiting for 1 of 1 CUDA devices; device 0: grpo-s0 (process {os.getpid()} since ")
    thread.join()


def test_a_later_run_of_a_process_has_the_device_that_its_cuda_context_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with exclusive_devices(1, holder="elsewhere"):
        monkeypatch.setattr(gpu_locks, "_ours", [])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with exclusive_devices(1, holder="here") as mine:
            assert mine == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with exclusive_devices(1, holder="here") as again:
        assert again == ["1"]


@pytest.mark.scale
def test_a_killed_holder_frees_its_devices_whatever_word_it_left(monkeypatch: pytest.MonkeyPatch) -> None:
    other = holder("0,1", 2)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert len(list(lock_folder().iterdir())) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        started = time.monotonic()
        with exclusive_devices(2, holder="next") as devices:
            assert devices == ["0", "1"]
        assert time.monotonic() - started < 1.0


@pytest.mark.scale
def test_twelve_runs_on_three_devices_never_share_one_while_some_are_killed(tmp_path: Path) -> None:
    """Each notes when it has which devices; those that are killed note no end."""
    code = (
        "import os, sys, time\nfrom pipeline.workers.gpu_locks import exclusive_devices\n"
        "with exclusive_devices(int(sys.argv[1]), holder=sys.argv[2]) as d:\n"
        "    for n in d:\n"
        f"        os.close(os.open({str(tmp_path)!r} + '/using-' + n, os.O_CREAT | os.O_EXCL))\n"
        "    time.sleep(0.1)\n"
        "    if sys.argv[2] in ('3', '7'):\n"
        f"        [os.unlink({str(tmp_path)!r} + '/using-' + n) for n in d]; os.kill(os.getpid(), 9)\n"
        f"    [os.unlink({str(tmp_path)!r} + '/using-' + n) for n in d]\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1,2", "PYTHONPATH": str(ROOT)}
    runs = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, str(1 + n % 2), str(n)], env=environment)
        for n in range(12)
    ]
    codes = [run.wait(timeout=120) for run in runs]
    assert codes == [-signal.SIGKILL if n in (3, 7) else 0 for n in range(12)]
