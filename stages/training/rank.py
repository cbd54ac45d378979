"""One rank of a training group, run by `pipeline/workers/process.py`: joins its group, then runs the bodies of stages."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any

from pipeline.workers.rpc import perform
from stages.training.hosts import meet_by_address
from stages.training.ranks import RENDEZVOUS, body_called


def make_handler() -> Callable[[dict[str, Any], Callable[[str, dict[str, Any]], None]], Any]:
    """Join the group; the handler of orders, each of which names a stage's body."""
    import torch

    from stages.training.hardware import training_device

    meet_by_address()
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group(
        "nccl" if training_device() == "cuda" else "gloo",
        init_method=f"file://{os.environ[RENDEZVOUS]}",
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        # What hangs is ended by the launcher's deadline, which knows what is progress.
        timeout=datetime.timedelta(days=7),
    )

    def handle(order: dict[str, Any], report: Callable[[str, dict[str, Any]], None]) -> Any:
        return perform(order, body_called(order["function"]), report if rank == 0 else _keep_to_oneself)

    return handle


def _keep_to_oneself(topic: str, values: dict[str, Any]) -> None:
    """Every rank makes the same progress; the first one's is shown."""
