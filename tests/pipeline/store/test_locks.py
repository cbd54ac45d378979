"""Locks where others may write: no link is followed, and nothing is written but into a lock of ours."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.orchestration.flow_runs import _one_at_a_time
from pipeline.store.locks import locked, private_folder, read_note, try_lock, write_note
from pipeline.workers.gpu_locks import exclusive_devices


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    (tmp_path / "victim").write_text("precious")
    return tmp_path / "victim"


Plant = Callable[[Path, Path], object]
PLANTED: dict[str, Plant] = {
    "link": lambda place, victim: place.symlink_to(victim),
    "pipe": lambda place, victim: os.mkfifo(place),
    "folder": lambda place, victim: place.mkdir(),
    "dangling": lambda place, victim: place.symlink_to(victim.with_name("made through a link")),
}
HARD_LINK: dict[str, Plant] = {"hard link": lambda place, victim: place.hardlink_to(victim)}


@pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED)
def test_what_lies_in_the_place_of_a_lock_is_neither_followed_nor_awaited(
    tmp_path: Path, victim: Path, plant: Plant
) -> None:
    plant(tmp_path / "lock", victim)
    for take in (locked, try_lock):
        with pytest.raises(OSError, match="lock"), take(tmp_path / "lock"):
            pytest.fail("held")
    assert victim.read_text() == "precious"
    assert not victim.with_name("made through a link").exists()


@pytest.mark.parametrize("plant", (PLANTED | HARD_LINK).values(), ids=PLANTED | HARD_LINK)
def test_a_note_is_written_into_no_file_but_a_lock_of_ours(tmp_path: Path, victim: Path, plant: Plant) -> None:
    plant(tmp_path / "lock", victim)
    with pytest.raises(OSError, match="lock"):
        write_note(tmp_path / "lock", "owned")
    assert victim.read_text() == "precious"
    assert not victim.with_name("made through a link").exists()


def test_a_note_in_a_lock_that_is_held_is_read_and_replaced(tmp_path: Path) -> None:
    with locked(tmp_path / "lock"):
        write_note(tmp_path / "lock", "a longer note")
        write_note(tmp_path / "lock", "note")
        assert read_note(tmp_path / "lock") == "note"
    with pytest.raises(FileNotFoundError):
        read_note(tmp_path / "lock")


def test_a_private_folder_is_made_for_this_user_alone_and_found_again(tmp_path: Path) -> None:
    made = private_folder(tmp_path / "mine")
    assert made.stat().st_mode & 0o777 == 0o700
    assert private_folder(tmp_path / "mine") == made


def folder(place: Path, mode: int) -> None:
    place.mkdir()
    place.chmod(mode)


def link_to_a_folder(place: Path) -> None:
    (place.parent / "theirs").mkdir(mode=0o700)
    place.symlink_to(place.parent / "theirs")


def of_another_user(place: Path) -> None:
    if os.getuid():
        pytest.skip("only root can make a folder of another user")
    place.mkdir(mode=0o700)
    os.chown(place, 65534, 65534)


FOREIGN: dict[str, Callable[[Path], object]] = {
    "open to all": lambda place: folder(place, 0o777),
    "of the group": lambda place: folder(place, 0o770),
    "link to a folder": link_to_a_folder,
    "link to nowhere": lambda place: place.symlink_to(place.parent / "nowhere"),
    "file": lambda place: place.write_text(""),
    "of another user": of_another_user,
}


@pytest.mark.parametrize("use", ["devices", "flow runs"])
@pytest.mark.parametrize("plant", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_under_the_temporary_one_that_is_not_ours_alone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str, plant: Callable[[Path], object]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("COHORT_GPU_LOCKS", raising=False)
    name = {"devices": "cohort-gpus", "flow runs": "cohort"}[use]
    plant(tmp_path / f"{name}-{os.getuid()}")
    taking = exclusive_devices(1, holder="run") if use == "devices" else _one_at_a_time()
    with pytest.raises(ConfigError, match="expected a folder of this user"), taking:
        pytest.fail("held")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "note",
    ["", "[]", "5", "{", '{"run": 1}', '{"run": "\\u001b[2J", "pid": 1, "since": "now"}', "\x00" * 9999, "[" * 9999],
)
def test_an_unreadable_note_of_who_holds_a_device_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: str, recwarn: pytest.WarningsRecorder
) -> None:
    from pipeline.workers.gpu_locks import _holder

    monkeypatch.setenv("COHORT_GPU_LOCKS", str(tmp_path))
    with locked(tmp_path / "cuda-0.lock"):
        (tmp_path / "cuda-0.lock").write_text(note)
        assert _holder(tmp_path, "0").isprintable()
