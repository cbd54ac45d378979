"""The root: locks, commits, records, file systems."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flows.doctor import places
from pipeline.store import Store
from tests.flows.doctor.subjects import only, subject
from tests.pipeline.calls import call


def test_locks_of_this_file_system_exclude_and_end_with_their_holder(tmp_path: Path) -> None:
    assert only(places.locking(subject(tmp_path))).severity == "ok"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("holder", "fault"),
    [
        ("print('held', flush=True); sys.stdin.read()", "two processes held one lock"),
        # The descriptor of the lock lives on in a child of the killed holder.
        (
            "import fcntl, subprocess; lock = open(sys.argv[-1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX);"
            "subprocess.Popen(['sleep', '5'], pass_fds=[lock.fileno()], stdout=2); print('held', flush=True); sys.stdin.read()",
            "the lock of a killed process stays held",
        ),
        ("sys.exit('no locks available')", "could not take a lock"),
    ],
)
def test_locks_that_do_not_exclude_or_outlive_their_holder_are_problems(
    tmp_path: Path, holder: str, fault: str
) -> None:
    found = only(places.locking(subject(tmp_path), [sys.executable, "-c", f"import sys; {holder}"]))
    assert found.severity == "problem"
    assert fault in found.found


def test_the_store_commits_here_and_what_was_written_is_removed(tmp_path: Path) -> None:
    assert only(places.commits(subject(tmp_path / "not" / "there" / "yet"))).severity == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_nowhere_a_file_in_the_way_and_damaged_records_are_named(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "store").symlink_to(tmp_path / "unmounted")
    assert "is a link to what is not there" in only(places.commits(subject(root))).found
    (root / "store").unlink()
    (root / "runs").write_text("a file in the way")
    assert "runs" in only(places.commits(subject(root))).found
    store = Store(root / "store")
    for number in range(3):
        store.record(f"{number}" * 64, call("0" * 64))
    assert only(places.records(subject(root))).severity == "ok"
    path = root / "store" / "actions" / "11" / f"{'1' * 64}.json"
    path.chmod(0o644)
    path.write_text(path.read_text().replace("0000", "0001", 1))
    found = only(places.records(subject(root)))
    assert (found.severity, found.values["damaged"]) == ("warning", 1)
    assert f"cohort verify --repair --root {root}" in found.advice


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory")
def test_a_root_in_memory_is_warned_of() -> None:
    found = only(places.file_system(subject(Path("/dev/shm/cohort-doctor-none/artifacts"))))
    assert (found.severity, found.values["kind"]) == ("warning", "tmpfs")
