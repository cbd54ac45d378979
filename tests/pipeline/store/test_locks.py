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


def link(place: Path, victim: Path) -> None:
    place.symlink_to(victim)


def hard_link(place: Path, victim: Path) -> None:
    place.hardlink_to(victim)


def pipe(place: Path, victim: Path) -> None:
    os.mkfifo(place)


def folder(place: Path, victim: Path) -> None:
    place.mkdir()


def dangling(place: Path, victim: Path) -> None:
    place.symlink_to(victim.with_name("made through a link"))


PLANTED = [link, pipe, folder, dangling]


@pytest.mark.parametrize("plant", PLANTED)
def test_what_lies_in_the_place_of_a_lock_is_neither_followed_nor_waited_for(
    tmp_path: Path, victim: Path, plant: Callable[[Path, Path], None]
) -> None:
    plant(tmp_path / "lock", victim)
    for take in (locked, try_lock):
        with pytest.raises(OSError, match="lock"), take(tmp_path / "lock"):
            pytest.fail("held")
    assert victim.read_text() == "precious"
    assert not victim.with_name("made through a link").exists()


@pytest.mark.parametrize("plant", [*PLANTED, hard_link])
def test_a_note_is_written_into_no_file_but_a_lock_of_ours(
    tmp_path: Path, victim: Path, plant: Callable[[Path, Path], None]
) -> None:
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


def open_to_all(place: Path) -> None:
    place.mkdir()
    place.chmod(0o777)


def of_the_group(place: Path) -> None:
    place.mkdir()
    place.chmod(0o770)


def link_to_a_folder(place: Path) -> None:
    (place.parent / "theirs").mkdir(mode=0o700)
    place.symlink_to(place.parent / "theirs")


def link_to_nowhere(place: Path) -> None:
    place.symlink_to(place.parent / "nowhere")


def file(place: Path) -> None:
    place.write_text("")


def of_somebody_else(place: Path) -> None:
    if os.getuid():
        pytest.skip("only root can make a folder of another user")
    place.mkdir(mode=0o700)
    os.chown(place, 65534, 65534)


@pytest.mark.parametrize("use", ["devices", "flow runs"])
@pytest.mark.parametrize(
    "plant", [open_to_all, of_the_group, link_to_a_folder, link_to_nowhere, file, of_somebody_else]
)
def test_a_folder_under_the_temporary_one_that_is_not_ours_alone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str, plant: Callable[[Path], None]
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
def test_a_strange_note_of_who_holds_a_device_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: str, recwarn: pytest.WarningsRecorder
) -> None:
    from pipeline.workers.gpu_locks import _holder

    monkeypatch.setenv("COHORT_GPU_LOCKS", str(tmp_path))
    with locked(tmp_path / "cuda-0.lock"):
        (tmp_path / "cuda-0.lock").write_text(note)
        assert _holder(tmp_path, "0").isprintable()
