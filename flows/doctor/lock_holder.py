"""Holds a lock of ours until its input ends or it is killed: the other process of the check of locking."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.store.locks import locked

if __name__ == "__main__":
    with locked(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
