"""Folders that weights are handed over in: nothing of a killed process stays, nothing of a live one goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from stages.models.folders import weights_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from stages.models.folders import weights_folder
with weights_folder(Path(sys.argv[1])) as folder:
    (folder / "model.safetensors").write_bytes(b"weights")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_folder_and_its_lock_are_gone_after_the_block(tmp_path: Path) -> None:
    with weights_folder(tmp_path) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "model.safetensors").write_bytes(b"weights")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_live_folders_stay(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[3], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = {path for path in tmp_path.iterdir() if path.is_dir()}
    assert len(left) == 1
    with weights_folder(tmp_path) as live:
        assert not any(path.exists() for path in left)
        (live / "model.safetensors").write_bytes(b"weights")
        with weights_folder(tmp_path) as other:
            assert other != live
            assert (live / "model.safetensors").read_bytes() == b"weights"
    assert os.listdir(tmp_path) == []
