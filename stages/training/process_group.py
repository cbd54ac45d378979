"""Join the process group that DeepSpeed trains in: with one process only, or as one rank of several.

Of several, `pipeline/workers` runs this file: `make_handler` joins the group, then carries out the bodies of stages.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pipeline.workers.rpc import perform
from stages.training.hardware import training_device
from stages.training.ranks import RANK_VARIABLES, RENDEZVOUS, body_called, select_interface


def import_deepspeed(device: str) -> None:
    """Import DeepSpeed quietly, and on the CPU when that is where we train."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read at import; it would otherwise look for devices
    import deepspeed.ops

    # Its shared-memory collectives would be compiled now (minutes without a cache); torch has its own.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch renames; one line for each forward under ZeRO 3.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


def join_group(device: str) -> None:
    """Join the process group that this process is in already, else one with it as the only rank.

    The rendezvous of the latter is in memory: no port that another run could take, no address in the environment.
    """
    from deepspeed import comm

    if not torch.distributed.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        # Left to the interpreter's end it would print a warning about leaked resources.
        atexit.register(_leave_group)
    if not comm.is_initialized():
        with launched():
            comm.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """Make the environment agree with the process group while DeepSpeed reads it."""
    if torch.distributed.get_world_size() > 1:
        # Whoever started several ranks sets it (`stages/training/ranks.py`); else it is the rank, as on one host.
        os.environ.setdefault("LOCAL_RANK", str(torch.distributed.get_rank()))
        yield
        return
    # This is the only rank, whatever launcher may surround us.
    before = dict(os.environ)
    for name in [name for name in before if name.startswith(RANK_VARIABLES)]:
        del os.environ[name]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    try:
        yield
    finally:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
        # ZeRO 3 reads LOCAL_RANK again in every forward; it stays.
        os.environ.update({name: value for name, value in before.items() if name not in os.environ})


def make_handler() -> Callable[[dict[str, Any], Callable[[str, dict[str, Any]], None]], Any]:
    """Join the group; return the handler of orders, each of which names a stage's body."""
    select_interface()
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
        return perform(order, body_called(order["function"]), report if rank == 0 else _silent)

    return handle


def _silent(topic: str, values: dict[str, Any]) -> None:
    """Report nothing: every rank makes the same progress, and the first one's is shown."""
