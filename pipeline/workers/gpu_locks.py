"""One run at a time on a CUDA device of this host: a lock for each, which its holder cannot keep beyond its death.

Two runs on one device run out of memory, or slow each other down. So a run takes as many of the devices that it may see as it
asks for, waits while others have them, and sees no other ones. Nothing here asks CUDA: what the driver knows is in files.

Locks are files in the folder that COHORT_GPU_LOCKS names, else in one of this user's under the temporary folder. Processes that
name other folders (other users, containers, another TMPDIR) do not see each other's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from pipeline.store.files import printable
from pipeline.store.locks import private_folder, read_note, try_lock, write_note

FOLDER: Final = "COHORT_GPU_LOCKS"
_VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
_DRIVER: Final = Path("/proc/driver/nvidia/gpus")
_POLL: Final = 0.5
"""Seconds between two tries to have all devices at once. No process keeps some while waiting for more: none waits for ever."""

_ours: list[str] = []  # what this process had before: its CUDA context, once made, stays on the first of them


def visible_devices(environment: Mapping[str, str] = os.environ, driver: Path = _DRIVER) -> list[str]:
    """Return the names of the CUDA devices that a process may use, in CUDA's order; none without an NVIDIA driver.

    An index where CUDA_VISIBLE_DEVICES has one. A UUID of a device that the driver knows becomes its index, so that both names
    are one lock; parts of a device (MIG) keep theirs.
    """
    known = sorted(driver.iterdir()) if driver.is_dir() else []
    given = environment.get(_VISIBLE)
    if given is None:
        return [str(number) for number in range(len(known))]
    uuids = {uuid: str(number) for number, folder in enumerate(known) if (uuid := _uuid(folder))}
    names = []
    for name in (part.strip() for part in given.split(",")):
        if not name or name.startswith("-"):  # as for CUDA: what comes after is not there
            break
        names.append(next((number for uuid, number in uuids.items() if uuid.startswith(name)), name))
    return list(dict.fromkeys(names))


@contextlib.contextmanager
def exclusive_devices(count: int, *, holder: str, folder: Path | None = None) -> Iterator[list[str]]:
    """Have `count` of the visible devices inside the block, and let CUDA_VISIBLE_DEVICES name them; yields their names.

    Waits, with a warning that says who has the others. Where fewer are visible, all are taken: whether they suffice, the code
    that computes says. Nothing happens where none is. Call before CUDA is used for the first time.

    Args:
        holder: the name of the run, for the warnings of others that wait.
        folder: where the locks lie; `lock_folder()` by default.

    Raises:
        ConfigError: somebody else made the folder of this user under the temporary folder, or can write into it.
    """
    seen = visible_devices()
    if not seen:
        yield []
        return
    place = folder or lock_folder()
    if folder is None and not os.environ.get(FOLDER):
        private_folder(place)
    else:  # chosen, perhaps for several users
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    before = os.environ.get(_VISIBLE)
    with _taken(seen, min(count, len(seen)), place, holder) as devices:
        _ours[:] = devices
        if len(devices) < len(seen):
            os.environ[_VISIBLE] = ",".join(devices)
        try:
            yield devices
        finally:
            _restore(before)


def lock_folder() -> Path:
    """Return the folder of the locks of this user's runs."""
    given = os.environ.get(FOLDER)
    return Path(given) if given else Path(tempfile.gettempdir()) / f"cohort-gpus-{os.getuid()}"


@contextlib.contextmanager
def _taken(seen: Sequence[str], count: int, folder: Path, holder: str) -> Iterator[list[str]]:
    """Hold `count` devices, those that this process had before among them; all at once or none."""
    warned = ""
    while True:
        with contextlib.ExitStack() as held:
            devices: list[str] = []
            for device in [*_ours, *(device for device in seen if device not in _ours)]:
                if len(devices) == count:
                    break
                if held.enter_context(try_lock(_lock(folder, device))):
                    devices.append(device)
                elif device in _ours[:count]:
                    break
            if len(devices) == count:
                for device in devices:
                    _sign(_lock(folder, device), holder)
                yield sorted(devices, key=seen.index)
                return
        others = "; ".join(filter(None, (_holder(folder, device) for device in seen)))
        if others and others != warned:
            warned = others
            warnings.warn(f"waiting for {count} of {len(seen)} CUDA devices; {others}", stacklevel=4)
        time.sleep(_POLL)


def _lock(folder: Path, device: str) -> Path:
    return folder / f"cuda-{re.sub(r'[^A-Za-z0-9-]', '_', device)}.lock"


def _sign(lock: Path, holder: str) -> None:
    """Write who has it into the locked file, which goes with the lock."""
    about = {"run": holder, "pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%H:%M:%S")}
    write_note(lock, json.dumps(about))


def _holder(folder: Path, device: str) -> str:
    """Return who has a device, in words; empty where it is free."""
    lock = _lock(folder, device)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        about = json.loads(read_note(lock))
        with try_lock(lock) as free:  # what was killed leaves its word behind, and not the lock
            words = f"device {device}: {about['run']} (process {about['pid']} since {about['since']})"
            return "" if free else printable(words)[:200]
    return ""


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop(_VISIBLE, None)
    else:
        os.environ[_VISIBLE] = before


def _uuid(folder: Path) -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"GPU UUID:\s*(GPU-[0-9a-f-]+)", (folder / "information").read_text(encoding="utf-8"))
        return found[1] if found else ""
    return ""
