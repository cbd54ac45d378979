"""Checks of the root folder: file system, space, commits of the store, locks between processes, records."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import psutil

from flows.doctor.examination import Finding, Severity, Subject
from flows.doctor.probe import probing
from flows.runs.paths import nearest
from flows.wording import size
from pipeline.config import ConfigError
from pipeline.remote.store import RemoteStore
from pipeline.store import Store
from pipeline.store.actions import read_call
from pipeline.store.context import Call
from pipeline.store.files import StoreError
from pipeline.store.locks import try_lock
from pipeline.workers.group import importing_ours

_NETWORK: Final = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "gluster", "lustre", "gpfs", "beegfs", "fuse.")
"""Prefixes of file systems that reach several hosts, or that a program in user space serves."""
_VOLATILE: Final = ("tmpfs", "ramfs")
_NO_SPACE: Final = 2e8
_LITTLE_SPACE: Final = 5e9
"""Bytes. Ours: a run of `arithmetic_cpu` writes some hundred megabytes; one checkpoint of a model of 0.5 B parameters, with
its optimizer's state, 6 GB."""
_FEW_FILES: Final = 1000
_SECONDS: Final = 20.0
_FREED: Final = 0.5
"""Seconds in which the lock of a killed process must be free."""
_NEWEST: Final = 10
_PATIENCE: Final = 10.0
"""Seconds for which a request to a remote store is repeated here; a run has more."""
_ELSEWHERE: Final = "choose another folder: --root, or COHORT_ROOT"


def file_system(subject: Subject) -> Iterator[Finding]:
    """Report the file system of the root."""
    root = subject.places.root
    kind = kind_of(nearest(root))
    found = f"{root} ({kind}{'' if root.exists() else '; is not there yet'})"
    advice = f"files in memory are gone at the next start; {_ELSEWHERE}"
    if kind.startswith(_NETWORK):
        advice = (
            "one host at a time, unless its locks reach all hosts; databases are safer on a local disk: name servers by "
            f"PREFECT_API_URL and MLFLOW_TRACKING_URI, or {_ELSEWHERE}"
        )
    severity: Severity = "warning" if kind.startswith((*_VOLATILE, *_NETWORK)) else "ok"
    yield Finding("root", severity, found, advice, {"root": str(root), "kind": kind})


def space(subject: Subject) -> Iterator[Finding]:
    """Report the bytes and files that the root's file system has left."""
    place = nearest(subject.places.root)
    free, files = shutil.disk_usage(place).free, os.statvfs(place)
    values = {"free": free, "free_files": files.f_favail if files.f_files else None}
    found = f"{size(free)} free" + (f", {files.f_favail:,} files" if files.f_files else "")
    if free < _NO_SPACE or (files.f_files and files.f_favail < _FEW_FILES):
        yield Finding("space", "problem", found, f"`cohort prune` frees old checkpoints; or {_ELSEWHERE}", values)
    elif free < _LITTLE_SPACE:
        yield Finding("space", "warning", found, "enough for the built-in recipes, not for large checkpoints", values)
    else:
        yield Finding("space", "ok", found, values=values)


def commits(subject: Subject) -> Iterator[Finding]:
    """Commit two artifacts of equal content and a record on this file system, as the store does."""
    try:
        with _scratch(subject) as folder:
            began = time.perf_counter()
            _commit(Store(folder / "store"))
            seconds = time.perf_counter() - began
            _write_below(subject)
    except (OSError, RuntimeError) as error:
        advice = f"fix permissions or space; {_ELSEWHERE}"
        yield Finding("store.write", "problem", f"cannot be written: {error}", advice)
        return
    found = f"two artifacts and a record committed in {1000 * seconds:.0f} ms"
    yield Finding("store.write", "ok", found, values={"seconds": round(seconds, 4)})
    if subject.places.upstream is not None and not subject.quick:
        yield shared(subject.places.upstream)


def shared(url: str) -> Finding:
    """Write to, list and delete from the store that several machines share, and compare the clocks."""
    try:
        began = time.perf_counter()
        upstream = RemoteStore(url, patience=_PATIENCE)
        skew, identity = upstream.probe(), upstream.identity(create=False)
        seconds = time.perf_counter() - began
    except (StoreError, ConfigError) as error:
        return Finding("store.remote", "problem", str(error), "fix it, or COHORT_STORE, before a run")
    known = f"store {identity[:12]}" if identity else "no store yet"
    found = f"{upstream.url}: {known}; written, listed and deleted in {seconds:.1f} s, clocks {abs(skew):.0f} s apart"
    return Finding("store.remote", "ok", found, values={"url": upstream.url, "seconds": seconds, "skew": skew})


def _commit(store: Store) -> None:
    def fill(draft: Path) -> None:
        (draft / "part").mkdir()
        (draft / "part" / "file").write_bytes(bytes(4096))

    digests = {store.publish(fill, about={}) for _ in range(2)}
    digest = digests.pop()
    made = Call("doctor", "1", {}).provenance()
    store.record("0" * 64, {**made, "result": digest, "type": "Folder", "seconds": 0.0})
    found = Store(store.root).find("0" * 64)
    if digests or found is None or found["result"] != digest or len(list(store.digests())) != 1:
        raise RuntimeError("what was written is not what is read back")


def _write_below(subject: Subject) -> None:
    """Write into each folder of the root: it may be a link to elsewhere, or belong to another user."""
    for place in (subject.places.root, subject.places.store, subject.places.runs, subject.places.prefect):
        if place.is_symlink() and not place.exists():
            raise FileNotFoundError(f"{place} is a link to what is not there")
        if place.exists():
            with tempfile.TemporaryFile(dir=place):
                pass


def locking(subject: Subject, holder: Sequence[str | Path] = ()) -> Iterator[Finding]:
    """Check locks between two processes: only one holds, and after it is killed the lock is free.

    Args:
        holder: a program that holds the lock of its last argument, prints "held", and waits.
    """
    try:
        with _scratch(subject) as folder:
            fault = exclusion(folder / "lock", holder or probing("lock"), subject)
    except OSError as error:
        fault = str(error)
    found = fault or "a second process waits, and a killed holder's lock is free"
    advice = f"this file system or its mount does not lock (NFS: mount without nolock); {_ELSEWHERE} on a local disk"
    yield Finding("locking", "problem" if fault else "ok", found, advice)


def exclusion(lock: Path, holder: Sequence[str | Path], subject: Subject) -> str:
    """Return what is wrong with locks on this file system; empty: nothing."""
    child = subprocess.Popen(
        [*holder, str(lock)],
        env=importing_ours(subject.environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    try:
        ready, _, _ = select.select([child.stdout], [], [], _SECONDS)
        if not ready or child.stdout.readline().strip() != b"held":
            return f"another process could not take a lock in {lock.parent}"
        with try_lock(lock) as taken:
            if taken:
                return "two processes held one lock at the same time: concurrent runs would damage each other's work"
    finally:
        child.kill()
        child.communicate()
    return "" if _becomes_free(lock) else "the lock of a killed process stays held"


def _becomes_free(lock: Path) -> bool:
    end = time.monotonic() + _FREED
    while time.monotonic() < end:
        with try_lock(lock) as taken:
            if taken:
                return True
        time.sleep(0.05)
    return False


def records(subject: Subject) -> Iterator[Finding]:
    """Count the store's records, and read the newest; `cohort verify` reads everything."""
    store = subject.places.store
    files = list(store.glob("actions/*/*.json"))
    if not files:
        yield Finding("store.read", "ok", "no records yet", values={"records": 0})
        return
    newest = sorted(files, key=_changed)[-_NEWEST:]
    faults = []
    for path in newest:
        try:
            read_call(path)
        except (StoreError, OSError) as error:
            faults.append(str(error).split(";")[0])
    values = {"records": len(files), "read": len(newest), "damaged": len(faults)}
    found = f"{len(files):,} records; the newest {len(newest)} are sound"
    if faults:
        found = f"{len(faults)} of {len(newest)} records: {faults[0]}"
    advice = f"cohort verify --repair{subject.places.option()}"
    yield Finding("store.read", "warning" if faults else "ok", found, advice, values)


def _changed(path: Path) -> float:
    """Return when a file was written; a run may remove it meanwhile."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def temporary(subject: Subject) -> Iterator[Finding]:
    """Report the folder for scratch files, where ranks and vLLM's worker have their sockets."""
    place = Path(tempfile.gettempdir())
    free = shutil.disk_usage(place).free
    found, values = f"{place}, {size(free)} free", {"folder": str(place), "free": free}
    yield Finding(
        "temporary", "problem" if free < _NO_SPACE else "ok", found, "free space there, or set TMPDIR", values
    )


@contextlib.contextmanager
def _scratch(subject: Subject) -> Iterator[Path]:
    """Yield a folder where the store is or will be, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix=".cohort-doctor-", dir=nearest(subject.places.store)) as folder:
        yield Path(folder)


def kind_of(path: Path) -> str:
    """Return the kind of file system that a path lies on, such as `ext4`."""
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    return str(max(mounts, key=lambda part: len(part.mountpoint)).fstype) if mounts else "unknown"
