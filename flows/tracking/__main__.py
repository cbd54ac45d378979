"""The process that sends the runs of one project to MLflow: `python -m flows.tracking <root>`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flows.tracking.sender import Sender, folder_of, place_of
from pipeline.store.locks import lock_file
from pipeline.tracking.database import tracking_uri


def main(home: Path) -> None:
    """Send as the project's only process, or wait as its successor; end where both are there."""
    os.nice(5)  # training goes first
    folder, uri = folder_of(home), tracking_uri(home)
    name = f"sync-{place_of(uri)}"  # one for each place that is sent to
    with open(folder / f"{name}.lock", "w") as working:
        with open(folder / f"{name}.next.lock", "w") as waiting:
            if not lock_file(waiting, seconds=0.0):
                return  # the one that waits already will see every log that is there now
            lock_file(working)
        Sender(home, uri).follow()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
